"""Functions of the user's that run in killable processes.

In: a function, from a module, a script, a notebook or another function. Out: a pool of processes that
have loaded it. It is sent once per process: by its name if it is importable, and otherwise by value
with dill, with the globals and variables that it uses.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from trl_selfplay.rewards.worker import WorkerPool


def import_function(path: str) -> Any:
    """Return the function with an import path; modules in the current folder count.

    Raises:
        ImportError: There is no such module or function.
    """
    if os.getcwd() not in sys.path:  # noqa: PTH109  # a string
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ImportError(f"{path!r} is no import path; give module.function.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # one that the module itself imports
        raise ImportError(
            f"there is no module {error.name!r} for {path!r}, neither in the current folder nor "
            "installed."
        ) from error
    if not hasattr(module, name):
        raise ImportError(f"{module_name} has no function {name!r}.")
    return getattr(module, name)


def pool_for(function: Callable[..., Any], module: str, caller: str) -> WorkerPool:
    """Return the processes for a function; equal functions share them.

    Args:
        function: To be called in the processes, where `loaded_function` returns it.
        module: The module with the function `caller`. It needs this module's `prepare`.
        caller: Name of a function there that is called with the arguments, and calls it.

    Raises:
        TypeError: The function can't be sent.
    """
    import dill

    try:
        # With the globals that the function uses, not with all of its module.
        sent = dill.dumps(function, recurse=True)
    except Exception as error:  # whatever the objects' own methods raise
        raise TypeError(
            f"{name_of(function)!r} can't be sent to another process: {error}. It uses a variable that "
            "can't be copied, such as a generator or a connection; make it inside the function."
        ) from error
    return _pool(module, caller, sent)


@functools.cache
def _pool(module: str, caller: str, sent: bytes) -> WorkerPool:
    return WorkerPool(module, caller, settings={"function": sent})


def name_of(function: Any) -> str:
    """Return a callable's name, or that of its class."""
    return getattr(function, "__name__", type(function).__name__)


# In the process.

_function: Callable[..., Any] | None = None


def prepare(function: bytes) -> None:
    """Load the function of this process.

    Raises:
        ImportError: Its module, or one that it needs, isn't there.
        RuntimeError: It can't be loaded for another reason.
    """
    import dill

    global _function
    try:
        _function = dill.loads(function)
    except ImportError:
        raise
    except Exception as error:  # what another module's code raises
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def loaded_function() -> Callable[..., Any]:
    """Return the function of this process."""
    assert _function is not None
    return _function
