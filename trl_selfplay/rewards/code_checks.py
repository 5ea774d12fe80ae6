"""Run the tests of programming tasks on a program that is somewhere else.

In: `CallTests`, and a way to call the program's functions, or the program. Out: which checks hold.
The program's functions are proxies here: a call of one sends its arguments away, so that the program
sees neither the tests nor what they expect.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from trl_selfplay.rewards.code_tests import CHECK, MARK, CallTests


class Unsendable(BaseException):
    """A test passes something to the program that isn't a value. No test can catch this."""


class ProgramOver(BaseException):
    """The program has ended, or its time has. No test can catch this."""


class NotAValue(Exception):
    """The program returned something other than a value, so that the check fails."""


class _Checks:
    """Notes which of the marked statements hold.

    Args:
        count: Number of checks.
        stop_early: End the tests at the first check that doesn't hold.
    """

    def __init__(self, count: int, stop_early: bool) -> None:
        self.has_ended = False  # without an exception
        self.spoilt = False  # by what a test may have caught
        self._spoilt_between = False
        self._open: list[int] = []  # a check may run within another
        self._outcomes: list[tuple[int, bool]] = []
        self._count, self._stop_early = count, stop_early

    def __call__(self, index: int) -> "_Checks":
        if not self._open:
            self._spoilt_between |= self.spoilt
            self.spoilt = False
        self._open.append(index)
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        holds = error is None and not self.spoilt
        self._outcomes.append((self._open.pop(), holds))
        self.spoilt = False
        if isinstance(error, ProgramOver) or (self._stop_early and not holds):
            raise ProgramOver from error
        return not isinstance(error, Unsendable)

    @property
    def held(self) -> list[bool]:
        spoilt = self.spoilt or self._spoilt_between
        return _held(self._count, self._outcomes, self.has_ended and not spoilt)


def _held(count: int, outcomes: Sequence[Sequence[Any]], has_ended: bool) -> list[bool]:
    """Return which checks ran and held each time.

    Tests that an exception ended don't all hold: after the last check, it counts as that one's.
    """
    failed = {index for index, holds in outcomes if not holds}
    held = {index for index, _ in outcomes} - failed
    return [i in held and (has_ended or i < count - 1) for i in range(count)]


def run_calls(
    tests: CallTests,
    call: Callable[[str, tuple[Any, ...], dict[str, Any]], Any],
    candidate: str | None = None,
    stop_early: bool = False,
) -> tuple[list[bool], int]:
    """Run tests in this process; return which checks hold, and how many calls were made.

    Args:
        tests: Tests without an obstacle.
        call: Calls the program's function of a name. It returns the value and updates the arguments in
            place, or raises what the program raised, `NotAValue`, `Unsendable` or `ProgramOver`.
        candidate: Name of the function that `check` gets.
        stop_early: Don't run the checks after one that doesn't hold.

    Raises:
        Unsendable: A test passes something that can't be sent.
    """
    checks, calls = _Checks(tests.num_checks, stop_early), 0

    def proxy(name: str) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            try:
                return call(name, args, kwargs)
            except (NotAValue, ProgramOver):
                checks.spoilt = True
                raise

        stand_in.__name__ = name
        return stand_in

    namespace: dict[str, Any] = {"__name__": "__main__", MARK: checks}
    namespace |= {name: proxy(name) for name in tests.names}
    try:
        exec(compile(tests.source, "tests", "exec"), namespace)
        if tests.takes_candidate:
            namespace[CHECK](proxy(candidate or ""))
        checks.has_ended = True
    except Unsendable:
        raise
    except BaseException:  # pytest's failures are no Exceptions
        pass
    return checks.held, calls


# Runs the program and its tests in one interpreter; the last line that it prints holds the outcome.
_TOGETHER = """
def _run(program, tests, candidate, nonce):
    import json, sys
    outcomes, opened, has_ended = [], [], False
    class Checks:
        def __call__(self, index):
            opened.append(index)
            return self
        def __enter__(self):
            pass
        def __exit__(self, kind, error, trace):
            outcomes.append((opened.pop(), error is None))
            return True
    write, flush = sys.stdout.write, sys.stdout.flush
    names = {"__name__": "program"}
    try:
        exec(compile(program, "program", "exec"), names)
        names |= {"__name__": "__main__", MARK: Checks()}
        exec(compile(tests, "tests", "exec"), names)
        if candidate is not None:
            names[CHECK](names[candidate])
        has_ended = True
    except BaseException:
        pass
    write("\\n" + nonce + json.dumps([outcomes, has_ended]) + "\\n")
    flush()
"""


def together(tests: CallTests, program: str, candidate: str | None, nonce: str) -> str:
    """Return one program that runs a program and its tests, and prints which checks hold.

    The program can read the tests and forge the outcome; only `read_outcome` is strict.

    Args:
        tests: The tests.
        program: The program's source.
        candidate: Name of the function that `check` gets; None without `check`.
        nonce: Text that the program can't print by chance.
    """
    source = _TOGETHER.replace("MARK", repr(MARK)).replace("CHECK", repr(CHECK))
    return f"{source}\n_run({program!r}, {tests.source!r}, {candidate!r}, {nonce!r})\n"


def read_outcome(tests: CallTests, printed: str, nonce: str) -> list[bool]:
    """Return which checks hold, from what `together` printed; none if it didn't get to its end."""
    outcome = printed.rstrip("\n").rpartition("\n")[2]
    if not outcome.startswith(nonce):
        return [False] * tests.num_checks
    return _held(tests.num_checks, *json.loads(outcome.removeprefix(nonce)))
