"""End at SIGTERM within 30 s: schedulers send it before they take a machine away.

In: SIGTERM while `train()` runs. Out: `Terminated` in the main thread, as Ctrl-C raises
KeyboardInterrupt there. On its way out, what is finished is saved and child processes end; uncaught, it
ends the process with exit code 143.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from trl_selfplay.disk import RESUME

logger = logging.getLogger(__name__)

EXIT_CODE = 143  # 128 + SIGTERM, as a shell says it
# Kubernetes and most others send SIGKILL 30 s after SIGTERM.
_PATIENCE_S = 20.0


class Terminated(SystemExit, KeyboardInterrupt):
    """SIGTERM arrived. Code that lets Ctrl-C or an exit through lets this through too."""

    def __init__(self) -> None:
        super().__init__("SIGTERM")
        self.code = EXIT_CODE


@contextmanager
def ends_at_sigterm() -> Iterator[None]:
    """Raise Terminated in the main thread where SIGTERM arrives within this context.

    If the context isn't left within 20 s, since foreign code doesn't return to Python or catches
    everything, the process ends without further ado, with the same exit code. Only code that holds
    Python's lock all that time can prevent that.

    Nothing is done in another thread than the main one, or if SIGTERM has a handler already.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    left = threading.Event()
    watcher = threading.Thread(target=_watch, args=(reading, left), name="sigterm", daemon=True)
    watcher.start()
    waking = _Waking(writing)
    signal.signal(signal.SIGTERM, waking.handle)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=waking.forget)
    try:
        yield
    finally:
        left.set()
        waking.is_over = True
        signal.set_wakeup_fd(previous)
        if signal.getsignal(signal.SIGTERM) == waking.handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(writing)
        watcher.join()
        os.close(reading)


class _Waking:
    """The handler of one context."""

    def __init__(self, writing: int) -> None:
        self.writing = writing
        self.is_over = False
        self._has_raised = False

    def handle(self, *_: Any) -> None:
        """Raise Terminated, once: what cleans up isn't interrupted again."""
        if not self._has_raised:
            self._has_raised = True
            raise Terminated

    def forget(self) -> None:
        """Let SIGTERM end a forked process, without a word to this one's watcher."""
        if not self.is_over:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(reading: int, left: threading.Event) -> None:
    """Wait for SIGTERM, and then for the main thread to leave the context."""
    while number := os.read(reading, 1):
        if number[0] == signal.SIGTERM and not left.wait(_PATIENCE_S):
            _end()


def _end() -> NoReturn:
    logger.critical(
        "SIGTERM: what runs now doesn't end by itself and is given up after %.0f s. What was "
        "complete on disk is kept; %s, on the same output_dir.",
        _PATIENCE_S,
        RESUME,
    )
    os._exit(EXIT_CODE)
