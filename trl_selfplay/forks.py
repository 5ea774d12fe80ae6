"""What processes that this one forks must do at once, such as close their copies of its locks.

In: a function. Out: it is called in each process forked within a context. Reward functions and data
loaders fork processes that may outlive a run, and a copy of an open file keeps alive what it stands for.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FUNCTIONS: dict[object, Callable[[], object]] = {}


@contextmanager
def in_forks(function: Callable[[], object]) -> Iterator[None]:
    """Call a function in each process that is forked within this context, but not in forks of those.

    Only forks by Python call it: what must hold for forks by foreign code must not rely on it.
    """
    key = object()
    _FUNCTIONS[key] = function
    try:
        yield
    finally:
        _FUNCTIONS.pop(key, None)


def _call_all() -> None:
    while _FUNCTIONS:
        _FUNCTIONS.popitem()[1]()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_call_all)
