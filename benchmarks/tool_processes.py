"""What a process for tools costs: its start, a call, an environment, against a new interpreter for each.

In: tools that import nothing, and tools whose module imports NumPy and pandas. Out: a table on standard output.
Each number is the median of repetitions, which alternate between the ways.

    OMP_NUM_THREADS=1 python benchmarks/tool_processes.py
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from trl_selfplay.tools.environments import Environments
from trl_selfplay.tools.record import ToolCall
from trl_selfplay.tools.tool_set import ToolSet

MODULE = '''
{imports}

def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return str(a + b)


class Counter:
    def reset(self, **columns):
        self.count = 0

    def increase(self) -> str:
        """Count on."""
        self.count += 1
        return str(self.count)
'''
KINDS = {"light": "", "heavy": "import numpy\nimport pandas"}
AT_ONCE, CALLS = 64, 3


def seconds(work: Callable[[], Any]) -> float:
    """Return how long some work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(kind: str, repetitions: int) -> dict[str, float]:
    """Return the milliseconds of each kind of work."""
    module = import_module(f"{kind}_tools")
    increase, add = ToolCall("increase", {}), ToolCall("add", {"a": 1, "b": 2})
    found: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], Any]) -> None:
        found.setdefault(name, []).append(1000 * seconds(work))

    def play(environments: Environments, count: int) -> None:
        sessions = [environments.open({}, key) for key in range(count)]
        for _ in range(CALLS):
            for session in sessions:
                assert not session.call(increase).failed
        for session in sessions:
            session.close()

    def anew() -> None:
        with closing(Environments(module.Counter, [], 60.0)) as environments:
            play(environments, 1)

    for _ in range(repetitions):
        with (
            closing(ToolSet([module.add], 60.0)) as tools,
            closing(Environments(module.Counter, [], 60.0)) as environments,
        ):
            note(
                "first call of a run: an interpreter that loads the tools",
                lambda t=tools: t.call(add),
            )
            note("a further call", lambda t=tools: t.call(add))
            environments.observation({})
            note("an environment with 3 calls", lambda e=environments: play(e, 1))
            note(
                f"{AT_ONCE} environments at once with 3 calls each",
                lambda e=environments: play(e, AT_ONCE),
            )
            note("an environment with 3 calls in an interpreter of its own", anew)
    return {name: median(values) for name, values in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5, help="of each number")
    repetitions = parser.parse_args().repetitions
    with tempfile.TemporaryDirectory() as folder:
        for kind, imports in KINDS.items():
            Path(folder, f"{kind}_tools.py").write_text(MODULE.format(imports=imports))
        sys.path.insert(0, folder)
        results = {kind: measure(kind, repetitions) for kind in KINDS}
    print(
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, median of {repetitions}\n"
    )
    print("| Milliseconds | light module | NumPy and pandas |\n|---|---|---|")
    for name in results["light"]:
        print(f"| {name} | {results['light'][name]:.1f} | {results['heavy'][name]:.1f} |")


if __name__ == "__main__":
    main()
