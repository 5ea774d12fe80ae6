"""Which processes there are, and their end.

In: the folder `/proc`. Out: children, counts, memory. `zygote.py` loads this file as well, so only
the standard library is imported.
"""

import contextlib
import os
import resource
import signal
import time


class Processes:
    """What `/proc` tells, as a file descriptor: it may be out of sight, and number otherwise."""

    def __init__(self, proc: int) -> None:
        self._proc = proc

    def tasks(self, pid: str) -> list[str]:
        """Return the threads of a process."""
        try:
            descriptor = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._proc)
        except OSError:
            return []
        try:
            return os.listdir(descriptor)
        except OSError:
            return []
        finally:
            os.close(descriptor)

    def children(self, pid: str = "self") -> list[str]:
        """Return the children of a process."""
        found: list[str] = []
        for task in self.tasks(pid):
            with contextlib.suppress(OSError):
                found += self._read(f"{pid}/task/{task}/children").split()
        return found

    def memory_bytes(self, pid: str) -> int:
        """Return the memory of a process, with what it shares with others."""
        try:
            return int(self._read(f"{pid}/statm").split()[1]) * resource.getpagesize()
        except OSError:
            return 0

    def count_own(self) -> int:
        """Return how many processes and threads this user has."""
        count = 0
        for pid in filter(str.isdigit, os.listdir(self._proc)):
            with contextlib.suppress(OSError):
                # The owner of the folder is root where a process is hidden from its user.
                _, user = self._read(f"{pid}/status").split("\nUid:")
                if int(user.split()[0]) == os.geteuid():
                    count += len(self.tasks(pid))
        return count

    def end_children(self, within_s: float) -> bool:
        """End the children of this process, and those that it adopts from them.

        Returns:
            Whether none is left.
        """
        ends = time.monotonic() + within_s
        while children := self.children():
            if time.monotonic() >= ends:
                return False
            if os.getpid() == 1:  # of a namespace, whose numbers aren't the host's
                _kill(-1)
            else:
                for pid in map(int, children):
                    # The group of a program first: none of it can start another one meanwhile. A
                    # child that isn't reaped keeps its number, so the group is its own.
                    _kill(-pid)
                    _kill(pid)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.001)
        return True

    def end_session(self, session: int, within_s: float) -> bool:
        """End the processes of another session, where no ancestor is left that could.

        Returns:
            Whether none is left.
        """
        ends = time.monotonic() + within_s
        while groups := self._groups(session):
            if time.monotonic() >= ends:
                return False
            for group in groups:
                _kill(-group)
            time.sleep(0.001)
        return True

    def _groups(self, session: int) -> set[int]:
        """Return the groups of a session that have living processes."""
        found = set()
        for pid in filter(str.isdigit, os.listdir(self._proc)):
            with contextlib.suppress(OSError):
                # Behind the name, which may contain anything.
                state, _, group, of, *_ = self._read(f"{pid}/stat").rpartition(")")[2].split()
                if int(of) == session and state not in "ZX":
                    found.add(int(group))
        return found

    def _read(self, name: str) -> str:
        with open(os.open(name, os.O_RDONLY, dir_fd=self._proc), errors="replace") as file:
            return file.read()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
