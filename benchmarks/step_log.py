"""Measure what a trajectory's steps on disk cost: a round with synced results against one without.

In: a number of pairs. Out: the table in results/step_log.md. The round is that of the tests: a random model of two
layers writes 96 trajectories, and each of its calls takes next to no time, so that writing weighs far more than where
a model takes seconds for a turn. The two kinds alternate.

    OMP_NUM_THREADS=1 python benchmarks/step_log.py --pairs 12
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults"), str(TESTS / "rollouts")]  # the round is theirs

COUNT = 96


def main() -> None:
    """Run pairs and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    options = parser.parse_args()
    from fault_runs import write_inputs
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="step-log-", dir=options.folder) as folder:
        base = Path(folder)
        write_inputs(base / "inputs")
        tokenizer = AutoTokenizer.from_pretrained(base / "inputs" / "model")
        model = AutoModelForCausalLM.from_pretrained(base / "inputs" / "model")
        _round(model, tokenizer, base / "warm-up", syncs=True)
        rounds: dict[bool, list[SimpleNamespace]] = {True: [], False: []}
        for number in range(options.pairs):
            for syncs in (True, False) if number % 2 else (False, True):
                found = _round(model, tokenizer, base / f"{number}-{syncs}", syncs)
                rounds[syncs].append(found)
    first = rounds[True][0]
    print(
        f"{COUNT} trajectories, {first.turns} turns, {first.results} results, {first.bytes:,} bytes\n"
    )
    print("| | synced | not synced |\n|---|---|---|")
    for name, text in (
        ("seconds", "seconds of a round, by the clock"),
        ("cpu", "CPU seconds of its process"),
        ("writing", "seconds in the step log, of all threads"),
        ("syncing", "of these, seconds in fsync"),
    ):
        cells = [statistics.median(getattr(r, name) for r in rounds[s]) for s in (True, False)]
        print(f"| {text} | {cells[0]:.3f} | {cells[1]:.3f} |")
    shares = [s.seconds / f.seconds - 1.0 for s, f in zip(*rounds.values(), strict=True)]
    print(
        f"\nDifference by the clock, paired, median of {len(shares)}: {statistics.median(shares):+.1%}"
    )


def _round(model: object, tokenizer: object, folder: Path, syncs: bool) -> SimpleNamespace:
    """Sample and grade a round; return its times and counts."""
    from test_trajectory_rollouts import collect

    from trl_selfplay.tools import step_log

    found = SimpleNamespace(writing=0.0, syncing=0.0, turns=0, results=0, bytes=0)

    def fsync(descriptor: int) -> None:
        started = time.perf_counter()
        if syncs:
            os.fsync(descriptor)
        found.syncing += time.perf_counter() - started

    class TimedLog(step_log.StepLog):
        def add(self, *arguments: object) -> None:
            found.turns += 1
            self._timed(super().add, *arguments)

        def add_result(self, *arguments: object) -> None:
            found.results += 1
            self._timed(super().add_result, *arguments)

        def _timed(self, write: object, *arguments: object) -> None:
            started = time.perf_counter()
            write(*arguments)
            found.writing += time.perf_counter() - started

        def close(self) -> None:
            found.bytes += self._file.tell()
            super().close()

    from trl_selfplay.tools import trajectories

    step_log.os, trajectories.StepLog = SimpleNamespace(fsync=fsync), TimedLog
    started, cpu = time.perf_counter(), time.process_time()
    collect(model, tokenizer, folder, count=COUNT)
    found.seconds, found.cpu = time.perf_counter() - started, time.process_time() - cpu
    return found


if __name__ == "__main__":
    main()
