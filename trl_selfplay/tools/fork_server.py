"""A clean interpreter that has loaded a run's tools, and forks a process for each that is needed.

In: on a socket, the tools, then a pair of sockets per process: one for its calls, one that is its lifeline. Out:
a process that answers calls (`called.py`), until either end of its lifeline closes: it is then killed, with all
that it has started. Importing a tool's libraries takes seconds and happens once; a fork takes milliseconds. This
process itself calls no tool, and ends with its parent.
"""

import contextlib
import os
import select
import signal
import socket
import sys
from typing import NoReturn

from trl_selfplay.rewards.processes import Processes
from trl_selfplay.tools.called import LENGTH, Tools, send_json

_POLL_MS = 500
_MEMORY_BYTES = 4 * 2**30  # of a process, above what loading the tools took


def main() -> None:
    """Serve until the parent closes the control socket, or ends."""
    control = socket.socket(fileno=int(sys.argv[1]))
    parent = int(sys.argv[2])
    try:
        tools = Tools.load(_read(control, *LENGTH.unpack(_read(control, LENGTH.size))))
    except ImportError as error:
        send_json(control, {"error": str(error), "is_import": True})
        return
    except Exception as error:  # whatever another module's code raises when it is imported
        send_json(control, {"error": f"{type(error).__name__}: {error}", "is_import": False})
        return
    if sys.platform == "linux":
        from trl_selfplay.rewards.syscalls import adopt_orphans

        adopt_orphans()
    send_json(control, {"ready": True})
    _Server(control, parent, tools).serve()


def _read(source: socket.socket, count: int) -> bytes:
    with source.makefile("rb", buffering=0) as file:
        received = b""
        while part := file.read(count - len(received)):
            received += part
    return received


class _Server:
    """The processes under way, by number, each with its lifeline."""

    def __init__(self, control: socket.socket, parent: int, tools: Tools) -> None:
        self._control = control
        self._parent = parent
        self._tools = tools
        self._children: dict[int, socket.socket] = {}
        self._woken, self._wakes = os.pipe()

    def serve(self) -> None:
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wakes, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        try:
            while os.getppid() == self._parent and self._step():
                pass
        finally:
            for pid in self._children:
                _kill(pid)
            while self._children:
                self._reap(os.WEXITED)

    def _step(self) -> bool:
        """Do what there is to do; return whether the parent may want more."""
        poll = select.poll()
        sockets = (self._control, *self._children.values())
        for descriptor in (self._woken, *(each.fileno() for each in sockets)):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(_POLL_MS)}
        if self._woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)
            while self._reap(os.WEXITED | os.WNOHANG):
                pass
        for pid, lifeline in self._children.items():
            if lifeline.fileno() in ready:
                _kill(pid)
        if self._control.fileno() not in ready:
            return True
        message, descriptors, _, _ = socket.recv_fds(self._control, 1, 2)
        if not message:
            return False
        self._begin(*(socket.socket(fileno=each) for each in descriptors))
        return True

    def _begin(self, calls: socket.socket, lifeline: socket.socket) -> None:
        with calls:
            pid = os.fork()
            if pid == 0:
                self._live(calls, lifeline)
        self._children[pid] = lifeline

    def _live(self, calls: socket.socket, lifeline: socket.socket) -> NoReturn:
        """Be the process that makes calls, from the fork to the end."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for inherited in (self._control, lifeline, *self._children.values()):
                inherited.close()
            os.close(self._woken)
            os.close(self._wakes)
            os.setsid()  # so that what a tool starts is killed with it
            if sys.platform == "linux":
                from trl_selfplay.rewards.syscalls import adopt_orphans, die_with_parent

                die_with_parent()
                adopt_orphans()
            _limit_memory()
            self._tools.serve(calls)
        finally:
            os._exit(1)

    def _reap(self, options: int) -> bool:
        """Take note of a child's end, and end what it has started; return whether there was one."""
        try:
            # Without reaping it: as long as its number is its own, so is that of its group.
            ended = os.waitid(os.P_ALL, 0, options | os.WNOWAIT)
        except ChildProcessError:
            return False
        if ended is None:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(ended.si_pid, signal.SIGKILL)
        os.waitpid(ended.si_pid, 0)
        lifeline = self._children.pop(ended.si_pid, None)
        if lifeline is not None:
            self._end_strangers()
            lifeline.close()
        return True

    def _end_strangers(self) -> None:
        """End the processes that this one has adopted from those that ended."""
        if not os.path.isdir("/proc/self/task"):  # noqa: PTH112  # elsewhere a group is all that is known
            return
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        try:
            found = Processes(proc)
            while strangers := {int(pid) for pid in found.children()} - {*self._children}:
                for pid in strangers:
                    _kill(pid)
                for pid in strangers:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, 0)
        finally:
            os.close(proc)


def _kill(pid: int) -> None:
    """Kill a child that isn't reaped, and its group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _limit_memory() -> None:
    import resource

    used = 0
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:  # noqa: PTH123
        used = int(file.read().split()[5]) * resource.getpagesize()
    # What it writes to: libraries such as CUDA's reserve far more addresses than they use.
    with contextlib.suppress(ValueError, OSError):  # where the limit of this process is lower
        resource.setrlimit(resource.RLIMIT_DATA, (used + _MEMORY_BYTES, used + _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
