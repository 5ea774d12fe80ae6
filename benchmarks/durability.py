"""Measure what syncing costs: a ReST^EM run as it is against one whose `os.fsync` does nothing.

In: a number of pairs. Out: the median of the paired differences by the clock, and the time spent in
`os.fsync` itself, which stand in results/faults.md. The two kinds alternate; runs are those of the tests,
so that a round takes a second and syncing weighs far more than where a round takes hours.

    python benchmarks/durability.py --pairs 15
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]  # the runs are those of the tests


def main() -> None:
    """Run pairs and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    warnings.filterwarnings("ignore")
    from fault_runs import write_inputs

    with tempfile.TemporaryDirectory(prefix="durability-", dir=options.folder) as folder:
        base = Path(folder)
        write_inputs(base / "inputs")
        _run(base, "warm-up", syncs=True)
        pairs = []
        for number in range(options.pairs):
            order = (True, False) if number % 2 else (False, True)
            times = {syncs: _run(base, f"{number}-{syncs}", syncs) for syncs in order}
            pairs.append((times[True], times[False]))
    shares = [synced[0] / free[0] - 1.0 for synced, free in pairs]
    in_sync = [synced[1] for synced, _ in pairs]
    whole = statistics.median(synced[0] for synced, _ in pairs)
    print(f"pairs: {len(pairs)}; a run of two rounds: {whole:.2f} s; syncs: {pairs[0][0][2]}")
    print(f"difference, paired, median: {statistics.median(shares):+.1%}")
    print(f"seconds in os.fsync, median: {statistics.median(in_sync):.3f}")


def _run(base: Path, name: str, syncs: bool) -> tuple[float, float, int]:
    """Return the seconds of a run in a process of its own, those in `os.fsync`, and its calls."""
    from processes import call

    listing = base / f"{name}.json"
    arguments = (str(base / name), str(base / "inputs"), syncs, str(listing))
    assert call(_timed, *arguments, log=base / "printed.txt") == 0
    seconds, in_sync, calls = json.loads(listing.read_text())
    return seconds, in_sync, calls


def _timed(folder: str, inputs: str, syncs: bool, listing: str) -> None:
    from fault_runs import run

    fsync, spent = os.fsync, []

    def timed(descriptor: int) -> None:
        started = time.perf_counter()
        if syncs:
            fsync(descriptor)
        spent.append(time.perf_counter() - started)

    os.fsync = timed
    started = time.perf_counter()
    run(folder, "ReST^EM", inputs, None)
    seconds = time.perf_counter() - started
    Path(listing).write_text(json.dumps([seconds, sum(spent), len(spent)]))


if __name__ == "__main__":
    main()
