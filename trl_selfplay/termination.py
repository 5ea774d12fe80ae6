"""End at SIGTERM within 30 s: schedulers send it before they take a machine away.

In: SIGTERM while `train()` runs. Out: `Terminated` in the main thread, as Ctrl-C raises
KeyboardInterrupt there. On its way out, what is finished is saved and child processes end; uncaught, it
ends the process with exit code 143.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from trl_selfplay.disk import RESUME
from trl_selfplay.forks import in_forks

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
    reading, writing = socket.socketpair()
    reading.setblocking(True)
    writing.setblocking(False)
    left = threading.Event()
    watcher = threading.Thread(target=_watch, args=(reading, left), name="sigterm", daemon=True)
    watcher.start()
    waking = _Waking(reading, writing)
    signal.signal(signal.SIGTERM, waking.handle)
    previous = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        with in_forks(waking.forget):
            yield
    finally:
        left.set()
        signal.set_wakeup_fd(previous)
        if signal.getsignal(signal.SIGTERM) == waking.handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Closing it wouldn't end the watcher while a forked process has a copy.
        with suppress(OSError):  # it is closed already in a fork
            writing.shutdown(socket.SHUT_WR)
        watcher.join()
        waking.close()


class _Waking:
    """The handler of one context."""

    def __init__(self, reading: socket.socket, writing: socket.socket) -> None:
        self._reading, self._writing = reading, writing
        self._has_raised = False

    def handle(self, *_: Any) -> None:
        """Raise Terminated, once: what cleans up isn't interrupted again."""
        if not self._has_raised:
            self._has_raised = True
            raise Terminated

    def forget(self) -> None:
        """Let SIGTERM end a forked process, without a word to this one's watcher."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.close()

    def close(self) -> None:
        self._writing.close()
        self._reading.close()


def _watch(reading: socket.socket, left: threading.Event) -> None:
    """Wait for SIGTERM, and then for the main thread to leave the context."""
    while number := reading.recv(1):
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
