"""Processes in which tools and environments are called, and which can be killed at any time.

In: tools and factories of environments. Out: `ToolProcesses`, which starts one in milliseconds, from an
interpreter that has loaded them once (`fork_server.py`). None outlives this process.
"""

import contextlib
import json
import os
import pickle
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from trl_selfplay.rewards.worker import environment_of_worker
from trl_selfplay.tools.called import LENGTH

_START_DEADLINE_S = 120.0
_END_DEADLINE_S = 10.0
_DIED = "the process died"


class ProcessEnded(Exception):
    """A process gave no answer, and is gone."""


class ToolProcess:
    """A process for calls, one after the other.

    Args:
        calls: The socket on which it answers.
        lifeline: Closed by its end, and closing it ends it.
    """

    def __init__(self, calls: socket.socket, lifeline: socket.socket) -> None:
        self._calls = calls
        self._lifeline = lifeline
        self._received = bytearray()
        self._in_use = threading.Lock()

    @property
    def is_alive(self) -> bool:
        """Whether it hasn't ended."""
        poll = select.poll()
        poll.register(self._lifeline, select.POLLIN)
        return not poll.poll(0)

    def ask(self, kind: str, *arguments: Any, seed: int, deadline_s: float) -> dict[str, Any]:
        """Return the answer to a request.

        Args:
            kind: "reset" (name and columns), "call" (name and arguments) or "reward".
            *arguments: See `called.Tools`.
            seed: Of Python's, NumPy's and torch's random numbers during the call.
            deadline_s: Seconds until it is killed.

        Raises:
            ProcessEnded: It died, missed its deadline, or was closed.
        """
        with self._in_use:
            request = pickle.dumps((kind, seed, *arguments))
            ends = time.monotonic() + deadline_s
            try:
                self._calls.settimeout(deadline_s)
                self._calls.sendall(LENGTH.pack(len(request)) + request)
            except TimeoutError as error:
                raise ProcessEnded(_late(deadline_s)) from error
            except OSError as error:
                raise ProcessEnded(_DIED) from error
            return self.receive(ends, _late(deadline_s))

    def receive(self, ends: float, if_late: str) -> dict[str, Any]:
        """Return the next answer; see `ask`."""
        poll = select.poll()
        for waiting in (self._calls, self._lifeline):
            poll.register(waiting, select.POLLIN)
        self._calls.settimeout(0)
        while (end := self._received.find(b"\n")) < 0:
            ready = poll.poll(max(0.0, ends - time.monotonic()) * 1000)
            part = b""
            with contextlib.suppress(BlockingIOError, OSError):
                part = self._calls.recv(65536)
            if not part:
                raise ProcessEnded(_DIED if ready else if_late)
            self._received += part
        line, self._received = self._received[:end], self._received[end + 1 :]
        try:
            answer = json.loads(line)
        except ValueError as error:  # a tool wrote into the socket
            raise ProcessEnded(_DIED) from error
        if not isinstance(answer, dict):
            raise ProcessEnded(_DIED)
        return answer

    def close(self) -> None:
        """End the process, also while another thread waits for its answer."""
        for end in (self._calls, self._lifeline):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._in_use:
            self._calls.close()
            self._lifeline.close()


class ToolProcesses:
    """Starts processes, and keeps those that any trajectory may use.

    Args:
        functions: Tools by name.
        factories: Factories of environments, by name.

    Raises:
        TypeError: They can't be sent to another process.
    """

    def __init__(
        self, functions: Mapping[str, Callable[..., Any]], factories: Mapping[str | None, Any]
    ) -> None:
        import dill

        try:
            # With the globals that a function uses, not with all of its module.
            self._sent = dill.dumps((dict(functions), dict(factories)), recurse=True)
        except Exception as error:  # whatever the objects' own methods raise
            raise TypeError(
                f"the tools {[*functions, *filter(None, factories)]} can't be sent to another process: {error}. "
                "One uses a variable that can't be copied, such as a generator or a connection; make it "
                "inside the function."
            ) from error
        self._lock = threading.Lock()
        self._idle: list[ToolProcess] = []
        self._servers: list[_Server] = []
        self._end = weakref.finalize(self, _end, self._idle, self._servers, os.getpid())

    def start(self) -> ToolProcess:
        """Return a new process.

        Raises:
            ImportError: A tool needs a package that isn't installed.
            RuntimeError: The tools can't be loaded, or no process can be started.
        """
        with self._lock:
            if self._servers:
                with contextlib.suppress(ProcessEnded):
                    return self._servers[-1].fork()
                self._servers.pop().end()  # it was killed from outside
            server = _Server(self._sent)
            self._servers.append(server)
            try:
                return server.fork()
            except ProcessEnded as error:
                raise RuntimeError(f"no process for tools could be started: {error}") from error

    def take(self) -> ToolProcess:
        """Return a process that has nothing of any trajectory; see `start`."""
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                return self.start()
            if process.is_alive:
                return process
            process.close()

    def give_back(self, process: ToolProcess) -> None:
        """Keep a process for later calls."""
        with self._lock:
            self._idle.append(process)

    def close(self) -> None:
        """End all processes; a later call starts new ones. Also done at exit."""
        with self._lock:
            _end(self._idle, self._servers, os.getpid())


class _Server:
    """The interpreter that has loaded the tools."""

    def __init__(self, sent: bytes) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: a file in the user's folder must not shadow a module of a library.
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "trl_selfplay.tools.fork_server",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # What a tool returns must not depend on the order of a set.
                env={**environment_of_worker(), "PYTHONHASHSEED": "0"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C only reaches the parent, which decides
            )
        try:
            self._control.settimeout(_START_DEADLINE_S)
            self._control.sendall(LENGTH.pack(len(sent)) + sent)
            with self._control.makefile("rb") as answers:
                answer = json.loads(
                    answers.readline() or b'{"error": "it died", "is_import": false}'
                )
        except OSError as error:
            self.end()
            raise RuntimeError(f"the tools couldn't be loaded: {error}") from error
        except BaseException:
            self.end()
            raise
        if "error" in answer:
            self.end()
            kind = ImportError if answer["is_import"] else RuntimeError
            raise kind(f"the tools can't be loaded in a process of their own: {answer['error']}")

    def fork(self) -> ToolProcess:
        """Return a new process; ProcessEnded if this interpreter is gone."""
        ours, theirs = socket.socketpair()
        lifeline, other_end = socket.socketpair()
        with theirs, other_end:
            try:
                socket.send_fds(self._control, [b"f"], [theirs.fileno(), other_end.fileno()])
            except OSError as error:
                ours.close()
                lifeline.close()
                raise ProcessEnded(_DIED) from error
        process = ToolProcess(ours, lifeline)
        try:
            process.receive(time.monotonic() + _START_DEADLINE_S, "it didn't start")
        except ProcessEnded:
            process.close()
            raise
        return process

    def end(self) -> None:
        with contextlib.suppress(OSError):  # it is gone
            # Also where a process that this one has forked holds the socket open.
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        try:
            self._process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # and what it has forked, which dies with it
            self._process.wait()


def _end(idle: list[ToolProcess], servers: list[_Server], owner: int) -> None:
    if os.getpid() != owner:  # a fork: they belong to its parent
        return
    for process in idle:
        process.close()
    for server in servers:
        server.end()
    idle.clear()
    servers.clear()


def _late(deadline_s: float) -> str:
    return f"no answer within {deadline_s:g} s"
