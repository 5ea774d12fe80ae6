"""Reward functions that misbehave in the call with a run's 20th sample, and what becomes of the run.

In: nothing. Out: `CASES` by name, their `KINDS`, and a `FEW` for CI. A `Case` acts on the right scores and on the function's
arguments, and returns what the function returns.
"""

import asyncio
import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tiny_rewards import contains_solution

from trl_selfplay.rewards import guarded_call

Act = Callable[[list[float], dict[str, Any]], Any]


class Case(NamedTuple):
    """One way to misbehave.

    Attributes:
        act: Takes the right scores and the arguments of a call.
        says: What the run prints beside the function's name; "" if it prints nothing of the function.
        end: What becomes of the run. "stops": an error tells how to go on, and the mended function ends it
            like a run without a fault. "equal": it ends like that at once. "accepted": it ends with other
            scores, which stay. "dies": the process is gone without a word, and the mended function goes on.
    """

    act: Act
    says: str = ""
    end: Literal["stops", "equal", "accepted", "dies"] = "stops"


class Misbehaves:
    """A reward function that does what a case says, once."""

    __name__ = "graded"  # that of the mended function

    def __init__(self, act: Act) -> None:
        self._act, self._seen = act, 0

    def __call__(self, **given: Any) -> Any:
        before, self._seen = self._seen, self._seen + len(given["completions"])
        scores = contains_solution(**given)
        return self._act(scores, given) if before < 20 <= self._seen else scores


class NoText(Exception):
    """An error that can't be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class OwnBase(BaseException):
    """An error that `except Exception` doesn't catch."""


def _raises(error: BaseException, says: str = "") -> Case:
    def act(scores: Any, given: Any) -> Any:
        raise error

    return Case(act, f"raised {type(error).__name__}: {says or error}")


def _recurse(*anything: Any) -> Any:
    return _recurse(*anything)


def _returns(value: Any, says: str, end: Literal["stops", "equal", "accepted"] = "stops") -> Case:
    """Return a value, or what a function makes of the scores."""
    return Case(lambda scores, given: value(scores) if callable(value) else value, says, end)


def _first(value: Any) -> Callable[[Any], Any]:
    return lambda scores: [value, *scores[1:]]


def _does(*acts: Callable[[], Any], says: str = "") -> Case:
    def act(scores: Any, given: Any) -> Any:
        for each in acts:
            each()
        return scores

    return Case(act, says and f"changed {says}, which the run depends on", "equal")


def _clear(scores: Any, given: Any) -> Any:
    for value in given.values():
        if isinstance(value, list):
            value.clear()
    return scores


def _change(scores: Any, given: Any) -> Any:
    given["completions"].sort()
    for ids in given["completion_ids"]:
        ids.append(0)
    given["solution"][:] = ["x"] * len(scores)
    return scores


def _hang(scores: Any, given: Any) -> Any:
    """Return when the log has said that it hangs."""
    said = threading.Event()
    guarded_call.logger.addFilter(lambda record: said.set() is None)
    guarded_call.SLOW_AFTER_S = 0.01
    with guarded_call.mentioned_if_slow("graded", "4 completions"):
        said.wait()
    return scores


def _leave_alarm() -> None:
    def late(*_: Any) -> None:
        raise TimeoutError("late")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 5.0)  # not yet in the call itself


def _remove_directory() -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    Path("../gone").rmdir()


ERRORS = {
    "plain": _raises(ValueError("sample 20")),
    "without text": _raises(NoText(), "(an error that can't be printed)"),
    "missing column": Case(lambda scores, given: given["no such column"], "raised KeyError"),
    "BaseException": _raises(OwnBase("own")),
    "GeneratorExit": _raises(GeneratorExit()),
    "CancelledError": _raises(asyncio.CancelledError()),
    "StopIteration": _raises(StopIteration()),
    "MemoryError": _raises(MemoryError()),
    "disk full": _raises(OSError(28, "No space left on device")),
    "out of memory": _raises(torch.OutOfMemoryError("CUDA out of memory.")),
    "recursion": Case(_recurse, "raised RecursionError"),
    "exit": Case(lambda scores, given: sys.exit(0), "raised SystemExit: 0"),
    "exit at once": Case(lambda scores, given: os._exit(0), end="dies"),
}
ANSWERS = {
    "too few": _returns(lambda scores: scores[:-1], "returned 3 scores for 4"),
    "too many": _returns(lambda scores: [*scores, 1.0], "returned 5 scores for 4"),
    "empty": _returns([], "returned 0 scores"),
    "strings": _returns(lambda scores: [*map(str, scores)], "returned '0.0' for completion 0"),
    "text": _returns(lambda scores: "1" * len(scores), "returned str"),
    "infinite": _returns(_first(float("inf")), "returned inf for completion 0"),
    "huge": _returns(_first(1e308), "returned 1e+308 for completion 0"),
    "huge integer": _returns(_first(10**400), "returned 1000"),
    "complex": _returns(_first(1j), "returned 1j for completion 0"),
    "column tensor": _returns(lambda scores: torch.tensor(scores)[:, None], "returned [0.0] for"),
    "scalar tensor": _returns(torch.tensor(1.0), "returned float"),
    "number": _returns(1.0, "returned float"),
    "nothing": _returns(None, "returned NoneType"),
    "generator": _returns(lambda scores: (x for x in scores), "returned generator"),
    "nested": _returns(lambda scores: [[x] for x in scores], "returned [0.0] for completion 0"),
    "dictionary": _returns(lambda scores: dict(enumerate(scores)), "returned dict"),
    "set": _returns(set, "returned set"),
}
OTHER_FORMS = {
    "booleans": _returns(lambda scores: [x > 0 for x in scores], "", "equal"),
    "numpy": _returns(np.array, "", "equal"),
    "numpy scalars": _returns(lambda scores: [*map(np.float32, scores)], "", "equal"),
    "tensor": _returns(lambda scores: torch.tensor(scores, requires_grad=True), "", "equal"),
    "bf16": _returns(lambda scores: torch.tensor(scores, dtype=torch.bfloat16), "", "equal"),
    "tensors": _returns(lambda scores: [*map(torch.tensor, scores)], "", "equal"),
    "tensors of one": _returns(lambda scores: [torch.tensor([x]) for x in scores], "", "equal"),
    "NaN": _returns(_first(float("nan")), "", "accepted"),
    "all None": _returns(lambda scores: [None] * len(scores), "", "accepted"),
    "random": _returns(lambda scores: [random.random() for _ in scores], "", "accepted"),
}
CHANGES = {
    "clears arguments": Case(_clear, end="equal"),
    "changes arguments": Case(_change, end="equal"),
    "hangs": Case(_hang, "has not returned after", "equal"),
    "prints": _does(lambda: sys.stdout.write("x" * 5_000_000)),
    "prints control": _does(lambda: sys.stdout.write("\x1b[2J\x1b]0;title\x07")),
    "closes stdout": _does(lambda: sys.stdout.close(), says="sys.stdout"),
    "takes stdout": _does(lambda: setattr(sys, "stdout", None), says="sys.stdout"),
    "forks": Case(lambda scores, given: [os.fork(), scores][1], "forked this process", "equal"),
    "thread": _does(lambda: threading.Thread(target=threading.main_thread().join).start()),
    "alarm": _does(_leave_alarm, says="the timer of signal.setitimer"),
    "directory": _does(lambda: os.chdir("/"), says="the working directory"),
    "directory gone": _does(_remove_directory, says="the working directory"),
    "locale": _does(lambda: locale.setlocale(locale.LC_ALL, "C"), says="the locale"),
    "mask": _does(lambda: os.umask(0o777), says="the mask of new files"),
    "dtype": _does(lambda: torch.set_default_dtype(torch.float64), says="torch's default dtype"),
    "device": _does(lambda: torch.set_default_device("meta"), says="torch's default device"),
    "gradients": _does(lambda: torch.set_grad_enabled(False), says="torch's gradient mode"),
    "threads": _does(lambda: torch.set_num_threads(2), says="torch's number of threads"),
    "random state": _does(random.seed, np.random.seed, torch.seed),
    "SIGINT": _does(
        lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), says="the handler of SIGINT"
    ),
    "SIGTERM": _does(
        lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), says="the handler of SIGTERM"
    ),
    "logging": _does(logging.disable, says="logging.disable"),
    "environment": _does(os.environ.clear),
    "garbage": _does(gc.disable),
    "numpy's errors": _does(lambda: np.seterr(all="raise")),
}
KINDS = {"errors": ERRORS, "answers": ANSWERS, "other forms": OTHER_FORMS, "changes": CHANGES}
CASES = {name: case for cases in KINDS.values() for name, case in cases.items()}
# One of each that went unnoticed once, or that takes a way of its own.
FEW = [
    "exit", "exit at once", "generator", "changes arguments", "closes stdout", "forks", "mask", "dtype",
]  # fmt: skip
