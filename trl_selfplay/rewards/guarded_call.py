"""Call a function of the user's so that whatever it does to the process or to its arguments ends with it.

In: a function's name and a call. Out: what it returned, or an error that names it. What it changed of the
process is put back, and said once.
"""

import locale
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from trl_selfplay.disk import RESUME
from trl_selfplay.file_mask import mask_of_new_files

logger = logging.getLogger(__name__)

SLOW_AFTER_S = 60.0
MENDED = f"The samples are on disk; fix the function and {RESUME}."


class _Setting(NamedTuple):
    """Something of a process that sampling, training or files depend on."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]


def call_guarded(name: str, call: Callable[[], Any]) -> Any:
    """Return what a function returned.

    A process that it forked, and that comes back from the call as well, is ended: it would go on with the
    run beside this one.

    Raises:
        RuntimeError: It raised anything but KeyboardInterrupt, or tried to exit.
    """
    process = os.getpid()
    try:
        return call()
    except KeyboardInterrupt:
        raise
    # All others: a SystemExit would end the run with code 0, as if it had come to its end.
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RuntimeError(
            f"reward function {name!r} raised {type(error).__name__}: {_text_of(error)} (line "
            f"{place.lineno} of {place.filename}). {MENDED}"
        ) from error
    finally:
        if os.getpid() != process:
            _end_fork(name)


@contextmanager
def settings_kept(names: str, told: set[tuple[str, str]]) -> Iterator[None]:
    """Put back what functions change of this process, and say so.

    Random states are theirs to change: neither samples nor training depend on them.

    Args:
        names: The functions' names, for the log.
        told: What the log has said before, which isn't said again.
    """
    before = _read_settings()
    try:
        yield
    finally:
        for setting, value in before:
            _put_back(names, setting, value, told)


def own_copy(value: Any) -> Any:
    """Return a value whose lists and dicts are new, at any depth, for a function that may change them."""
    if type(value) is list:
        return [own_copy(each) for each in value]
    if type(value) is dict:
        return {key: own_copy(each) for key, each in value.items()}
    return value


@contextmanager
def mentioned_if_slow(names: str, about: str) -> Iterator[None]:
    """Warn once if functions take long, since a hung function looks like a busy one."""
    timer = threading.Timer(
        SLOW_AFTER_S,
        logger.warning,
        (
            "reward function %s has not returned after %.0f s on %s; still waiting. A function that "
            "may hang needs a timeout of its own.",
            names,
            SLOW_AFTER_S,
            about,
        ),
    )
    timer.daemon = True
    if names:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if names:
            timer.join()


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of an error whose own text fails
        return "(an error that can't be printed)"


def _end_fork(name: str) -> None:
    sys.stderr.write(
        f"reward function {name!r} forked this process, and the new one came back from it: it is "
        "ended. End it in the function, with os._exit.\n"
    )
    sys.stderr.flush()
    os._exit(1)


def _settings() -> Iterator[_Setting]:
    yield _Setting("the working directory", os.getcwd, os.chdir)
    yield _Setting(
        "the locale",
        lambda: locale.setlocale(locale.LC_ALL),
        lambda value: locale.setlocale(locale.LC_ALL, value),
    )
    yield _Setting("the mask of new files", mask_of_new_files, os.umask)
    for number, name in ((1, "stdout"), (2, "stderr")):
        yield _Setting(
            f"sys.{name}", partial(_open_stream, name), partial(_put_stream_back, name, number)
        )
    yield _Setting("logging.disable", lambda: logging.root.manager.disable, logging.disable)
    yield _Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype)
    yield _Setting("torch's default device", torch.get_default_device, torch.set_default_device)
    yield _Setting("torch's gradient mode", torch.is_grad_enabled, torch.set_grad_enabled)
    yield _Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads)
    if threading.current_thread() is not threading.main_thread():
        return  # which alone may set handlers
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not None:  # one that isn't Python's can't be set again
            yield _Setting(
                f"the handler of {number.name}",
                partial(signal.getsignal, number),
                partial(signal.signal, number),
            )
    if hasattr(signal, "setitimer") and not signal.getitimer(signal.ITIMER_REAL)[0]:
        yield _Setting(
            "the timer of signal.setitimer",
            lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0,
            lambda _: signal.setitimer(signal.ITIMER_REAL, 0),
        )


def _open_stream(name: str) -> Any:
    """Return a stream of `sys`, or None if there is none that is open."""
    stream = getattr(sys, name)
    return None if getattr(stream, "closed", False) else stream


def _put_stream_back(name: str, number: int, stream: Any) -> None:
    """Let `sys` have its stream again; in the place of one that was closed, another to the same file."""
    if getattr(stream, "closed", False):
        stream = open(number, "w", closefd=False)  # noqa: SIM115  # a descriptor, for good
    setattr(sys, name, stream)


def _read_settings() -> list[tuple[_Setting, Any]]:
    """Return what can be read and written again; a working directory that is gone can't."""
    found = []
    for setting in _settings():
        try:
            found.append((setting, setting.read()))
        except OSError:
            continue
    return found


def _put_back(names: str, setting: _Setting, value: Any, told: set[tuple[str, str]]) -> None:
    try:
        if setting.read() == value:
            return
    except OSError:  # a working directory that is gone
        pass
    setting.write(value)
    if (names, setting.name) not in told:
        told.add((names, setting.name))
        logger.warning(
            "reward function %s changed %s, which the run depends on; it was put back. Let the function "
            "put it back itself.",
            names,
            setting.name,
        )
