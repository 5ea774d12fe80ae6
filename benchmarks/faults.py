"""Kill runs of all trainers at random moments, and count what is lost and what is done twice.

In: a number of kills and a seed. Out: a table, which stands in results/faults.md. Each run is killed
several times, one process after the other, and goes on to its end; it is then compared with a run that
was never stopped, bit for bit. Seconds are of the processor, so that other work on the machine doesn't
count.

    python benchmarks/faults.py --kills 120
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]  # the runs are those of the tests
_KILLS_PER_RUN = 5


def main() -> None:
    """Kill, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigterm", action="store_true", help="send SIGTERM instead of SIGKILL")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        _measure(Path(folder), options)


def _measure(base: Path, options: argparse.Namespace) -> None:
    from fault_runs import RUNS, write_inputs
    from survival import Survivor, run_whole

    write_inputs(base / "inputs")
    wholes = {}
    for name in RUNS:
        wholes[name] = run_whole(base, name)
        if name == "STaR":
            shutil.copytree(wholes[name], base / "inputs" / "star")
    survivors: dict[str, list[Survivor]] = defaultdict(list)
    number = done = 0
    while done < options.kills:
        name = list(RUNS)[number % len(RUNS)]
        rng = random.Random(f"{options.seed} {number}")
        survivor = _kill(base, name, wholes[name], rng, options, f"killed-{number}")
        survivors[name].append(survivor)
        done += len(survivor.exit_codes) - 1
        print(
            name,
            survivor.exit_codes,
            survivor.difference or "equal",
            done,
            file=sys.stderr,
            flush=True,
        )
        number += 1
    _print_table(survivors)


def _kill(
    base: Path, name: str, whole: Path, rng: random.Random, options: argparse.Namespace, label: str
) -> Any:
    """End a run five times: at an instant, or at a random event, half of these in the midst of a file."""
    import signal

    from fault_events import Fault, read_events
    from survival import survive

    events = read_events(whole.with_name(f"{whole.name}.events"))[-1]
    seconds = events[-1]["seconds"] - events[0]["seconds"]
    number = signal.SIGTERM if options.sigterm else signal.SIGKILL
    faults = []
    for _ in range(_KILLS_PER_RUN):
        if rng.random() < 0.5:
            after = rng.uniform(0.0, 1.5 * seconds / _KILLS_PER_RUN)
            faults.append(Fault("seconds", after, number=number))
        else:
            after = rng.randrange(len(events) * 3 // (2 * _KILLS_PER_RUN))
            torn = rng.random() < 0.5 and not options.sigterm
            faults.append(Fault("", after, torn, number))
    return survive(base, name, whole, faults, label)


def _print_table(survivors: dict[str, list[Any]]) -> None:
    print(
        "| Run | Runs | Kills | Runs that ended equal | Samples of complete shards sampled again |"
    )
    print("|---|---|---|---|---|")
    every = {**survivors, "all": [s for runs in survivors.values() for s in runs]}
    for name, runs in every.items():
        kills = [r for run in runs for r in run.repeated]
        equal = sum(run.difference is None for run in runs)
        print(
            f"| {name} | {len(runs)} | {len(kills)} | {equal} | {sum(k.lost_samples for k in kills)} |"
        )
    print()
    print(
        "| Run | Seconds repeated, median | worst | Samples repeated, median | worst | Steps, worst |"
    )
    print("|---|---|---|---|---|---|")
    for name, runs in every.items():
        kills = [r for run in runs for r in run.repeated]
        seconds, samples = [k.seconds for k in kills], [k.samples for k in kills]
        print(
            f"| {name} | {statistics.median(seconds):.2f} | {max(seconds):.2f} "
            f"| {statistics.median(samples):g} | {max(samples)} | {max(k.steps for k in kills)} |"
        )
    leaving = [seconds for run in every["all"] for seconds in run.leaving]
    print(f"\nFrom the signal to the end of the process: worst {max(leaving):.1f} s by the clock.")


if __name__ == "__main__":
    main()
