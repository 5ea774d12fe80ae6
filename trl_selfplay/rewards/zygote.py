"""A clean interpreter that forks an isolated process per program.

In: settings as its argument, and on a socket, per program, its source and its files. Out: how each
program ended. It never runs a program itself. Three kinds of processes run this file: the monitor,
which stays outside and ends when the grader does; the zygote, in namespaces of its own; and per
program a process that is the first one of namespaces of its own, with which all that it has started
dies. Only the standard library is imported.
"""

import contextlib
import gc
import importlib.util
import itertools
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import time
import typing
from pathlib import Path

if typing.TYPE_CHECKING:
    import trl_selfplay.rewards.processes as processes
    import trl_selfplay.rewards.program as program
    import trl_selfplay.rewards.syscalls as syscalls

_NOBODY = 65534
_READY = b"ready"
_POLL_S = 0.01
_MONITOR_POLL_S = 0.5
_KILL_S = 2.0
_MONITOR_KILL_S = 30.0
_TEMPORARY = "/tmp"
# What programs often import, so that it is there already.
_PRELOADED = (
    "array bisect cmath collections copy dataclasses datetime decimal enum fractions functools "
    "heapq io numbers operator re string textwrap"
)


def _load(name: str, **needed: typing.Any) -> typing.Any:
    """Import a module beside this file: its package needs more than the standard library.

    Args:
        name: Of the module.
        needed: Modules that it uses, loaded before.
    """
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(needed)
    spec.loader.exec_module(module)
    return module


def main(settings: dict[str, typing.Any]) -> None:
    """Run as the monitor, or, where bubblewrap has started it, as the zygote."""
    control = socket.socket(fileno=settings["control"])
    os.umask(0o022)
    try:
        if "proc" in settings:
            _serve(control, settings)
            return
        settings["proc"] = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        syscalls.adopt_orphans()
        if settings["isolation"] == "namespaces":
            _leave_namespaces(settings["proc"])
        child = os.fork()
        if child == 0:
            syscalls.die_with_parent()
            if settings["command"]:
                for inherited in (settings["proc"], settings["control"]):
                    os.set_inheritable(inherited, True)
                os.execvp(settings["command"][0], [*settings["command"], json.dumps(settings)])
            if settings["isolation"] == "namespaces":
                _build_root(settings)
            _serve(control, settings)
            os._exit(0)
    except OSError as error:
        with contextlib.suppress(OSError):
            control.send(json.dumps({"error": str(error)}).encode())
        os._exit(1)
    control.close()
    _monitor(child, processes.Processes(settings["proc"]), settings["parent"])


def _monitor(child: int, found: "processes.Processes", parent: int) -> None:
    """Wait until the child has ended; end it when the parent has ended, or at SIGTERM."""
    events = {signal.SIGTERM, signal.SIGCHLD}
    # A second SIGTERM must not interrupt the end.
    signal.pthread_sigmask(signal.SIG_BLOCK, events)
    alive = os.pidfd_open(child)
    # A parent-death signal would already come when the thread ends that has started this.
    while os.getppid() == parent and not _is_readable(alive, 0.0):
        event = signal.sigtimedwait(events, _MONITOR_POLL_S)
        if event is not None and event.si_signo == signal.SIGTERM:
            break
    # Bubblewrap's root may not signal the zygote when it dies, so that comes here as an orphan. So
    # does, where isolation is weak, all that a program has started.
    found.end_children(_MONITOR_KILL_S)


def _leave_namespaces(proc: int) -> None:
    """Enter new namespaces; the next child is the first process of its own."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        _map_two_users(proc)
    else:
        syscalls.unshare(syscalls.NEW_USER)
        _map_user(proc, _NOBODY, uid, gid)
    syscalls.unshare(
        syscalls.NEW_MOUNTS
        | syscalls.NEW_PIDS
        | syscalls.NEW_NET
        | syscalls.NEW_IPC
        | syscalls.NEW_UTS
    )


def _map_user(proc: int, inside: int, uid: int, gid: int) -> None:
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside} {uid} 1"),
        ("gid_map", f"{inside} {gid} 1"),
    ):
        _write(proc, f"self/{name}", text)


def _map_two_users(proc: int) -> None:
    """Enter a user namespace that has root and nobody, who is subject to all limits."""
    pid = int(os.readlink("self", dir_fd=proc))
    ready, begin = os.pipe()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(begin)
            os.read(ready, 1)
            for name in ("uid_map", "gid_map"):
                _write(proc, f"{pid}/{name}", f"0 0 1\n{_NOBODY} {_NOBODY} 1")
            status = 0
        finally:
            os._exit(status)
    syscalls.unshare(syscalls.NEW_USER)
    os.close(begin)
    os.close(ready)
    if os.waitpid(helper, 0)[1] != 0:  # the root of a container without these rights
        _map_user(proc, 0, 0, 0)


def _write(folder: int, name: str, text: str) -> None:
    descriptor = os.open(name, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        error.filename = name
        raise
    finally:
        os.close(descriptor)


def _build_root(settings: dict[str, typing.Any]) -> None:
    """Replace the root folder by one that holds libraries alone, and can't be written to."""
    syscalls.mount("none", "/", flags=syscalls.PRIVATE | syscalls.RECURSIVE)
    # Mounting on a folder hides what is in it; what was there is found again under /old.
    syscalls.mount("tmpfs", _TEMPORARY, "tmpfs", options="mode=755")
    for name in ("old", "new"):
        os.mkdir(f"{_TEMPORARY}/{name}")
    syscalls.pivot(_TEMPORARY, f"{_TEMPORARY}/old")
    syscalls.mount("tmpfs", "/new", "tmpfs", options="mode=755")
    for folder, source in settings["folders"].items():
        os.makedirs(f"/new{folder}")
        syscalls.mount(f"/old{source}", f"/new{folder}", flags=syscalls.BIND | syscalls.RECURSIVE)
    for folder in settings["hidden"]:
        syscalls.mount("tmpfs", f"/new{folder}", "tmpfs")
    syscalls.restrict_mounts("/new", syscalls.NO_SUID_ATTRIBUTE | syscalls.NO_DEVICES_ATTRIBUTE)
    for link, target in settings["links"].items():
        os.makedirs(os.path.dirname(f"/new{link}"), exist_ok=True)
        os.symlink(target, f"/new{link}")
    for name in ("dev", "tmp"):
        os.mkdir(f"/new/{name}")
    for device in settings["devices"]:
        os.close(os.open(f"/new{device}", os.O_CREAT | os.O_WRONLY))
        syscalls.mount(f"/old{device}", f"/new{device}", flags=syscalls.BIND)
    syscalls.restrict_mounts("/new", syscalls.READ_ONLY_ATTRIBUTE)
    syscalls.enter_root("/new")


def _become_nobody(is_visible: bool) -> None:
    """Become a user without rights, with files in /proc that this user may write or not."""
    if os.geteuid() == 0:
        # Where a container's root has no right to this, the count of processes is polled alone.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    syscalls.set_visible(is_visible)
    syscalls.die_with_parent()  # a change of user has switched it off


def _serve(control: socket.socket, settings: dict[str, typing.Any]) -> None:
    """Run programs one after the other until the socket is closed."""
    # Before the change of user, who may not be allowed to read the library.
    for name in (*_PRELOADED.split(), *(() if _nests(settings) else ("shutil",))):
        importlib.import_module(name)
    # In its own namespaces a program doesn't find this process. Else it must not write its memory.
    _become_nobody(is_visible=_nests(settings))
    zygote = _Zygote(control, settings)
    gc.collect()
    gc.freeze()
    gc.disable()
    control.send(json.dumps({"ready": True}).encode())
    while True:
        # While the caller is busy with the last answer.
        zygote.prepare()
        message, descriptors = _receive(control)
        if not message:
            return
        if message == b"stop":  # of a program that has ended by itself meanwhile
            continue
        reply = zygote.run(message, descriptors)
        control.send(json.dumps(reply).encode())


def _nests(settings: dict[str, typing.Any]) -> bool:
    """Return whether each program has namespaces of its own within those of the zygote."""
    return settings["isolation"] in ("bubblewrap", "namespaces")


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    message, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
    return message, descriptors


class _Zygote:
    """Processes for programs, one ready in advance and at most one at work."""

    def __init__(self, control: socket.socket, settings: dict[str, typing.Any]) -> None:
        self._control = control
        self._proc = settings["proc"]
        self._limits = settings["limits"]
        self._nests = _nests(settings)
        self._processes = processes.Processes(settings["proc"])
        self._most_processes = self._limits["processes"]
        if not self._nests:
            syscalls.adopt_orphans()  # so that they are found
            # The kernel counts all that the user runs.
            self._most_processes += self._processes.count_own()
        self._is_weak = settings["isolation"] == "weak"
        self._filter = syscalls.build_filter()
        self._child: int | None = None
        self._parent_folder = settings["folder"]
        self._folder: str | None = None

    def prepare(self) -> None:
        """Fork a process that waits for a program, unless there is one."""
        if self._child is not None:
            return
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                if self._nests:
                    child = syscalls.fork_into(
                        syscalls.NEW_USER
                        | syscalls.NEW_MOUNTS
                        | syscalls.NEW_PIDS
                        | syscalls.NEW_IPC
                    )
                else:
                    self._folder = _make_folder(self._parent_folder)
                    child = os.fork()
            except OSError as error:
                theirs.send(str(error).encode())
                return
            if child == 0:
                self._live(theirs)
        self._child = child
        self._alive = os.pidfd_open(child)

    def run(self, message: bytes, descriptors: list[int]) -> dict[str, str]:
        """Run one program, and say how it ended."""
        self.prepare()
        deadline_s = json.loads(message)["deadline_s"]
        ends = time.monotonic() + deadline_s
        with self._requests:
            ready = self._requests.recv(1000) if _is_readable(self._requests, deadline_s) else b""
            if ready == _READY:
                socket.send_fds(self._requests, [message], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        if self._child is None:
            return {"error": ready.decode(errors="replace")}
        reason = self._watch(self._alive, ends) if ready == _READY else "late"
        if reason is not None:
            signal.pidfd_send_signal(self._alive, signal.SIGKILL)
            if not _is_readable(self._alive, _KILL_S):
                os._exit(1)  # and all that is inside with this process
        os.close(self._alive)
        if not self._nests:
            # Before its number, which is the group's, is free for others.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        self._child = None
        if self._folder is not None:
            if not self._processes.end_children(_KILL_S):
                os._exit(1)  # and the monitor goes on
            _remove_folder(self._folder)
        if ready not in (b"", _READY):
            return {"error": ready.decode(errors="replace")}
        if reason is None:
            reason = "ok" if status == 0 else "raised" if status > 0 else "killed"
        return {"ending": reason}

    def _watch(self, alive: int, ends: float) -> str | None:
        """Wait for the end of a program. Return why it has to be killed, or None."""
        poll = select.poll()
        poll.register(alive, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        while True:
            left = ends - time.monotonic()
            if left <= 0:
                return "late"
            ready = {descriptor for descriptor, _ in poll.poll(1000 * min(left, _POLL_S))}
            if alive in ready:
                return None
            if ready:
                # Anything says that the caller has seen enough; nothing, that it is gone.
                if not self._control.recv(100):
                    os._exit(0)
                return "stopped"
            excess = self._excess()
            if excess is not None:
                return excess

    def _excess(self) -> str | None:
        """Return what the program's processes use too much of together."""
        count = memory_bytes = 0
        pending = self._processes.children()
        while pending:
            pid = pending.pop()
            count += len(self._processes.tasks(pid))
            memory_bytes += self._processes.memory_bytes(pid)
            pending += self._processes.children(pid)
        if memory_bytes > self._limits["memory_bytes"]:
            return "too much memory"
        if count > self._limits["processes"]:
            return "too many processes"
        return None

    def _live(self, requests: socket.socket) -> typing.NoReturn:
        """Be the process of one program, from the fork to the end."""
        status = 1
        try:
            try:
                self._confine(requests.fileno())
            except Exception as error:
                requests.send(f"{type(error).__name__}: {error}".encode()[:900])
                os._exit(1)
            requests.send(_READY)
            message, descriptors = _receive(requests)
            requests.close()
            if message:
                status = self._start(json.loads(message), *descriptors)
        finally:
            os._exit(status)

    def _confine(self, kept: int) -> None:
        """Take away from this process all that programs must not have."""
        if self._nests:
            _map_user(self._proc, _NOBODY, os.geteuid(), os.getegid())
            options = f"size={self._limits['file_bytes']},nr_inodes=1024,mode=700"
            flags = syscalls.NO_SUID | syscalls.NO_DEVICES | syscalls.NO_EXEC
            syscalls.mount("tmpfs", _TEMPORARY, "tmpfs", flags, options)
        else:
            assert self._folder is not None
            syscalls.die_with_parent()
            syscalls.set_visible(True)
            os.environ.update(HOME=self._folder, TMPDIR=self._folder)
        os.chdir(os.environ["TMPDIR"])
        with contextlib.suppress(OSError):
            _write(self._proc, "self/oom_score_adj", "1000")
        # Its own group, or kill(0) would reach the zygote; a session costs a millisecond more.
        os.setpgid(0, 0)
        _close_all_but({0, 1, 2, kept})
        self._set_limits()
        syscalls.drop_privileges()
        syscalls.filter_calls(syscalls.build_filter(os.getpid()) if self._is_weak else self._filter)

    def _start(self, request: dict[str, typing.Any], file: int, *channels: int) -> int:
        cpu_s = math.ceil(self._limits["cpu_s"] or request["deadline_s"] + 1)
        _limit(resource.RLIMIT_CPU, cpu_s)
        with open(file, "rb") as opened:
            source = opened.read()
        gc.enable()
        if request["kind"] == "session":
            program.serve_calls(source, *channels)
            return 0
        for standard, channel in enumerate(channels):
            os.dup2(channel, standard)
            os.close(channel)
        return program.run(source)

    def _set_limits(self) -> None:
        limits = self._limits
        for kind, most in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_AS, limits["memory_bytes"]),
            (resource.RLIMIT_FSIZE, limits["file_bytes"]),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
            (resource.RLIMIT_NOFILE, limits["open_files"]),
            (resource.RLIMIT_NPROC, self._most_processes),
            (resource.RLIMIT_SIGPENDING, limits["processes"]),
        ):
            _limit(kind, most)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]  # the grader's own, which can't be raised
    least = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (least, least))


def _make_folder(parent: str) -> str:
    folder = f"{parent}/{os.urandom(8).hex()}"
    os.mkdir(folder, 0o700)
    return folder


def _remove_folder(folder: str) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _is_readable(descriptor: int | socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def _close_all_but(kept: set[int]) -> None:
    """Close all open files but these, which include 0."""
    ordered = [*sorted(kept), 2**20]
    for before, after in itertools.pairwise(ordered):
        if before + 1 < after:  # an empty range isn't empty to `closerange`
            os.closerange(before + 1, after)


if __name__ == "__main__":
    processes = _load("processes")
    program = _load("program", literals=_load("literals"))
    syscalls = _load("syscalls")
    main(json.loads(sys.argv[1]))
