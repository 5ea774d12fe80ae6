"""Reward functions that do what they shouldn't at the 20th sample of a run, as a table.

In: nothing. Out: `REWARDS`, by name: functions of the right scores and of the arguments of that call, which
return what the reward function returns.
"""

import asyncio
import locale
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_runs import contains_solution

_FIRST = 20


class At:
    """A reward function that misbehaves once, in the call with the 20th sample."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self._seen = 0

    def __call__(self, **given: Any) -> Any:
        before, self._seen = self._seen, self._seen + len(given["completions"])
        scores = contains_solution(**given)
        if not before < _FIRST <= self._seen:
            return scores
        return REWARDS[self.__name__](scores, given)


class NoText(Exception):
    """An error that can't be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class OwnBase(BaseException):
    """An error that `except Exception` doesn't catch."""


def _raise(error: BaseException) -> Any:
    raise error


def _set(*acts: Callable[[], Any]) -> Callable[[Any, Any], Any]:
    def function(scores: Any, given: Any) -> Any:
        for act in acts:
            act()
        return scores

    return function


def _recurse(depth: int = 0) -> Any:
    return _recurse(depth + 1)


def _hang(scores: Any, given: Any) -> Any:
    time.sleep(2.0)
    return scores


def _fork(scores: Any, given: Any) -> Any:
    os.fork()
    return scores


def _alarm(scores: Any, given: Any) -> Any:
    def late(*_: Any) -> None:
        raise TimeoutError("late")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    return scores


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


def _thread(scores: Any, given: Any) -> Any:
    threading.Thread(target=time.sleep, args=(3.0,)).start()
    return scores


def _devnull() -> None:
    sys.stdout.close()
    sys.stdout = None  # type: ignore[assignment]


def _first(value: Any) -> Callable[[Any, Any], Any]:
    return lambda scores, given: [value, *scores[1:]]


REWARDS: dict[str, Callable[[Any, Any], Any]] = {
    "raises": lambda s, g: _raise(ValueError("sample 20")),
    "raises_without_text": lambda s, g: _raise(NoText()),
    "raises_key": lambda s, g: g["no such column"],
    "raises_base": lambda s, g: _raise(OwnBase("own")),
    "raises_generator_exit": lambda s, g: _raise(GeneratorExit()),
    "raises_cancelled": lambda s, g: _raise(asyncio.CancelledError()),
    "raises_stop": lambda s, g: _raise(StopIteration()),
    "raises_memory": lambda s, g: _raise(MemoryError()),
    "raises_os_error": lambda s, g: _raise(OSError(28, "No space left on device")),
    "raises_out_of_memory": lambda s, g: _raise(torch.OutOfMemoryError("CUDA out of memory.")),
    "recurses": lambda s, g: _recurse(),
    "hangs": _hang,
    "exits": lambda s, g: sys.exit(0),
    "exits_at_once": lambda s, g: os._exit(0),
    "too_few": lambda s, g: s[:-1],
    "too_many": lambda s, g: [*s, 1.0],
    "empty": lambda s, g: [],
    "strings": lambda s, g: [str(x) for x in s],
    "text": lambda s, g: "1" * len(s),
    "nan": _first(float("nan")),
    "inf": _first(float("inf")),
    "huge": _first(1e308),
    "huge_integer": _first(10**400),
    "complex": _first(1j),
    "booleans": lambda s, g: [x > 0 for x in s],
    "numpy": lambda s, g: np.array(s),
    "numpy_scalars": lambda s, g: [np.float32(x) for x in s],
    "tensor": lambda s, g: torch.tensor(s, requires_grad=True),
    "tensor_bf16": lambda s, g: torch.tensor(s, dtype=torch.bfloat16),
    "tensors": lambda s, g: [torch.tensor(x) for x in s],
    "tensors_of_one": lambda s, g: [torch.tensor([x]) for x in s],
    "column_tensor": lambda s, g: torch.tensor(s)[:, None],
    "scalar_tensor": lambda s, g: torch.tensor(1.0),
    "number": lambda s, g: 1.0,
    "nothing": lambda s, g: None,
    "all_none": lambda s, g: [None] * len(s),
    "generator": lambda s, g: (x for x in s),
    "nested": lambda s, g: [[x] for x in s],
    "dictionary": lambda s, g: dict(enumerate(s)),
    "set": lambda s, g: set(s),
    "clears_arguments": _clear,
    "changes_arguments": _change,
    "changes_its_mind": lambda s, g: [random.random() for _ in s],
    "prints": _set(lambda: sys.stdout.write("x" * 5_000_000)),
    "prints_control": _set(lambda: sys.stdout.write("\x1b[2J\x1b]0;title\x07")),
    "closes_stdout": _set(_devnull),
    "forks": _fork,
    "starts_thread": _thread,
    "leaves_alarm": _alarm,
    "changes_directory": _set(lambda: os.chdir("/")),
    "removes_directory": _set(
        lambda: (Path("gone").mkdir(), os.chdir("gone"), Path("../gone").rmdir())
    ),
    "changes_locale": _set(lambda: locale.setlocale(locale.LC_ALL, "C")),
    "changes_mask": _set(lambda: os.umask(0o777)),
    "changes_dtype": _set(lambda: torch.set_default_dtype(torch.float64)),
    "changes_device": _set(lambda: torch.set_default_device("meta")),
    "stops_gradients": _set(lambda: torch.set_grad_enabled(False)),
    "changes_threads": _set(lambda: torch.set_num_threads(1)),
    "changes_random_state": _set(
        lambda: random.seed(1), lambda: np.random.seed(1), lambda: torch.manual_seed(1)
    ),
    "ignores_interrupts": _set(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)),
    "ignores_termination": _set(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)),
    "disables_logging": _set(lambda: __import__("logging").disable()),
    "clears_environment": _set(lambda: os.environ.clear()),
    "collects_nothing": _set(lambda: __import__("gc").disable()),
    "sets_numpy_errors": _set(lambda: np.seterr(all="raise")),
}
