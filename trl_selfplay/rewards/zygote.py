"""A clean interpreter that forks an isolated process per program.

In: settings as its argument, and on a socket, per program, its source and its files. Out: how each
program ended. It never runs a program itself. Three kinds of processes run this file: the monitor,
which stays outside and ends when the grader does; the zygote, in namespaces of its own; and per
program a process that is the first one of namespaces of its own, with which all that it has started
dies. Only the standard library is imported.
"""

import atexit
import contextlib
import gc
import importlib.util
import itertools
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import types
import typing
from pathlib import Path

if typing.TYPE_CHECKING:
    import trl_selfplay.rewards.literals as literals
    import trl_selfplay.rewards.syscalls as syscalls

_NOBODY = 65534
_LENGTH_BYTES = 4
_IS_MADE_BY_CODE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_POLL_S = 0.01
_MONITOR_POLL_S = 0.5
_KILL_S = 2.0
_TEMPORARY = "/tmp"
# What programs often import, so that it is there already.
_PRELOADED = (
    "array bisect cmath collections copy dataclasses datetime decimal enum fractions functools "
    "hashlib heapq io numbers operator queue random re statistics string textwrap"
)


def _load(name: str) -> typing.Any:
    """Import a module beside this file: its package needs more than the standard library."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(settings: dict[str, typing.Any]) -> None:
    """Run as the monitor, or, where bubblewrap has started it, as the zygote."""
    control = socket.socket(fileno=settings["control"])
    try:
        if "proc" in settings:
            _serve(control, settings)
            return
        settings["proc"] = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        if settings["isolation"] == "namespaces":
            _leave_namespaces(settings["proc"])
        child = os.fork()
        if child == 0:
            syscalls.die_with_parent()
            if settings["isolation"] == "bubblewrap":
                for inherited in (settings["proc"], settings["control"]):
                    os.set_inheritable(inherited, True)
                os.execvp("bwrap", [*settings["command"], json.dumps(settings)])
            if settings["isolation"] == "namespaces":
                _build_root(settings)
            _serve(control, settings)
            os._exit(0)
    except OSError as error:
        with contextlib.suppress(OSError):
            control.send(json.dumps({"error": str(error)}).encode())
        os._exit(1)
    control.close()
    _monitor(child, settings["parent"])


def _monitor(child: int, parent: int) -> None:
    """Wait until the child has ended; end it when the parent has ended, or at SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    poll = select.poll()
    poll.register(os.pidfd_open(child), select.POLLIN)
    try:
        # A parent-death signal would already come when the thread ends that has started this.
        while os.getppid() == parent and not poll.poll(1000 * _MONITOR_POLL_S):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


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
    for folder in settings["folders"]:
        os.makedirs(f"/new{folder}")
        syscalls.mount(f"/old{folder}", f"/new{folder}", flags=syscalls.BIND | syscalls.RECURSIVE)
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


def _become_nobody() -> None:
    if os.geteuid() == 0:
        # Where a container's root has no right to this, the count of processes is polled alone.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    syscalls.stay_visible()
    syscalls.die_with_parent()  # a change of user has switched it off


def _serve(control: socket.socket, settings: dict[str, typing.Any]) -> None:
    """Run programs one after the other until the socket is closed."""
    _become_nobody()
    zygote = _Zygote(control, settings)
    for name in _PRELOADED.split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.disable()
    control.send(json.dumps({"ready": True}).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
        if not message:
            return
        if message == b"stop":  # of a program that has ended by itself meanwhile
            continue
        reply = zygote.run(json.loads(message), descriptors)
        control.send(json.dumps(reply).encode())


class _Zygote:
    def __init__(self, control: socket.socket, settings: dict[str, typing.Any]) -> None:
        self._control = control
        self._proc = settings["proc"]
        self._limits = settings["limits"]
        self._is_weak = settings["isolation"] == "none"
        if self._is_weak:
            syscalls.adopt_orphans()  # so that `_children` finds them
        self._filter = syscalls.build_filter() if syscalls.has_numbers() else None
        self._pid = os.readlink("self", dir_fd=self._proc)
        self._page_bytes = resource.getpagesize()

    def run(self, request: dict[str, typing.Any], descriptors: list[int]) -> dict[str, str]:
        """Run one program, and say how it ended."""
        ends = time.monotonic() + request["deadline_s"]
        told, telling = os.pipe()
        folder = tempfile.mkdtemp() if self._is_weak else None
        child = (
            os.fork()
            if self._is_weak
            else syscalls.fork_into(
                syscalls.NEW_USER | syscalls.NEW_MOUNTS | syscalls.NEW_PIDS | syscalls.NEW_IPC
            )
        )
        if child == 0:
            self._run_in_child(request, descriptors, telling, folder)
        os.close(telling)
        for descriptor in descriptors:
            os.close(descriptor)
        trouble = os.read(told, 1000)
        os.close(told)
        alive = os.pidfd_open(child)
        try:
            reason = self._watch(alive, ends)
            if reason is not None:
                signal.pidfd_send_signal(alive, signal.SIGKILL)
                if not _is_readable(alive, _KILL_S):
                    os._exit(1)  # and all that is inside with this process
        finally:
            os.close(alive)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if folder is not None:
            self._kill_children()
            shutil.rmtree(folder, ignore_errors=True)
        if trouble != b"ready":
            return {"error": trouble.decode(errors="replace") or "a program could not be started"}
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
        processes = pages = 0
        pending = self._children(self._pid)
        while pending:
            pid = pending.pop()
            with contextlib.suppress(OSError):
                descriptor = os.open(f"{pid}/statm", os.O_RDONLY, dir_fd=self._proc)
                with open(descriptor, "rb") as file:
                    pages += int(file.read().split()[1])
                pending += self._children(pid)
            with contextlib.suppress(OSError):
                descriptor = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._proc)
                processes += len(os.listdir(descriptor))
                os.close(descriptor)
        if pages * self._page_bytes > self._limits["memory_bytes"]:
            return "too much memory"
        if processes > self._limits["processes"]:
            return "too many processes"
        return None

    def _children(self, pid: str) -> list[str]:
        found: list[str] = []
        with contextlib.suppress(OSError):
            tasks = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._proc)
            for task in os.listdir(tasks):
                with contextlib.suppress(OSError):
                    descriptor = os.open(f"{task}/children", os.O_RDONLY, dir_fd=tasks)
                    with open(descriptor) as file:
                        found += file.read().split()
            os.close(tasks)
        return found

    def _kill_children(self) -> None:
        """End what a program has left behind; only needed where it has no namespace."""
        ends = time.monotonic() + _KILL_S
        while (children := self._children(self._pid)) and time.monotonic() < ends:
            for pid in map(int, children):
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)

    def _run_in_child(
        self,
        request: dict[str, typing.Any],
        descriptors: list[int],
        telling: int,
        folder: str | None,
    ) -> typing.NoReturn:
        status = 1
        try:
            try:
                source, channel = self._confine(request, descriptors, telling, folder)
            except Exception as error:
                os.write(telling, f"{type(error).__name__}: {error}".encode()[:900])
                os._exit(1)
            os.write(telling, b"ready")
            os.close(telling)
            gc.enable()
            if request["kind"] == "run":
                status = _run_program(source)
            else:
                _serve_calls(source, channel, self._limits["output_bytes"])
        finally:
            os._exit(status)

    def _confine(
        self,
        request: dict[str, typing.Any],
        descriptors: list[int],
        telling: int,
        folder: str | None,
    ) -> tuple[bytes, int]:
        """Give this process what its program may have, and take away all else."""
        if folder is None:
            _map_user(self._proc, _NOBODY, os.geteuid(), os.getegid())
            options = f"size={self._limits['file_bytes']},nr_inodes=1024,mode=700"
            flags = syscalls.NO_SUID | syscalls.NO_DEVICES | syscalls.NO_EXEC
            syscalls.mount("tmpfs", _TEMPORARY, "tmpfs", flags, options)
        os.chdir(folder or _TEMPORARY)
        with contextlib.suppress(OSError):
            _write(self._proc, "self/oom_score_adj", "1000")
        os.setsid()
        program, *channels = descriptors
        with open(program, "rb") as file:
            source = file.read()
        null = os.open(os.devnull, os.O_RDWR)
        is_session = request["kind"] == "session"
        # What is received comes after standard input, output and errors, which are open.
        for target, descriptor in enumerate(
            [null, null, null] if is_session else [*channels, null]
        ):
            os.dup2(descriptor, target)
        _close_all_but({0, 1, 2, telling, *(channels if is_session else ())})
        self._set_limits(request["deadline_s"])
        syscalls.drop_privileges()
        if self._filter is not None:
            syscalls.filter_calls(self._filter)
        return source, channels[0]

    def _set_limits(self, deadline_s: float) -> None:
        limits = self._limits
        cpu_s = math.ceil(limits["cpu_s"] or deadline_s + 1)
        for kind, most in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, cpu_s),
            (resource.RLIMIT_AS, limits["memory_bytes"]),
            (resource.RLIMIT_FSIZE, limits["file_bytes"]),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
            (resource.RLIMIT_NOFILE, limits["open_files"]),
            (resource.RLIMIT_NPROC, limits["processes"]),
            (resource.RLIMIT_SIGPENDING, limits["processes"]),
        ):
            resource.setrlimit(kind, (most, most))


def _is_readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def _close_all_but(kept: set[int]) -> None:
    """Close all open files with other numbers, which include 0."""
    ordered = [*sorted(kept), 2**20]
    for before, after in itertools.pairwise(ordered):
        if before + 1 < after:  # an empty range isn't empty to `closerange`
            os.closerange(before + 1, after)


def _run_program(source: bytes) -> int:
    """Run a program as `python program.py` would, and return its exit status."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    status = 0
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        status = 1
    try:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    return status & 255


def _serve_calls(source: bytes, channel: int, most_bytes: int) -> None:
    """Run a program as a module, then call its functions as the channel asks."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except BaseException as error:
        _send(channel, literals.encode(("raised", *_describe(error), ())))
    else:
        _send(channel, literals.encode(("returned", None, ())))
    while request := _receive(channel):
        shared: list[typing.Any] = []
        name, args, kwargs = literals.decode(request, shared)
        count = len(shared)
        try:
            function: typing.Any = module
            for part in name.split("."):
                function = getattr(function, part)
            outcome: tuple[typing.Any, ...] = ("returned", function(*args, **dict(kwargs)))
        except BaseException as error:
            outcome = ("raised", *_describe(error))
        _send(channel, _encode(outcome, shared, count))


def _encode(outcome: tuple[typing.Any, ...], shared: list[typing.Any], count: int) -> bytes:
    """Return an outcome and what has become of the arguments, or why they can't be written."""
    known = shared[:count]
    try:
        return literals.encode((*outcome, tuple(map(literals.contents, known))), known.copy())
    except literals.LiteralError as error:
        return literals.encode(("raised", type(error).__name__, str(error), ()))
    except BaseException as error:
        return literals.encode(("raised", *_describe(error), ()))


def _describe(error: BaseException) -> tuple[str, str]:
    """Return the name of an exception's nearest built-in type, and its message."""
    kind = next(base for base in type(error).__mro__ if base.__flags__ & _IS_MADE_BY_CODE == 0)
    try:
        return kind.__name__, str(error)[:1000]
    except BaseException:  # a hostile __str__
        return kind.__name__, ""


def _send(channel: int, message: bytes) -> None:
    unsent = memoryview(len(message).to_bytes(_LENGTH_BYTES, "big") + message)
    while unsent:
        unsent = unsent[os.write(channel, unsent) :]


def _receive(channel: int) -> bytes:
    header = _read(channel, _LENGTH_BYTES)
    return _read(channel, int.from_bytes(header, "big")) if header else b""


def _read(channel: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = os.read(channel, count - len(parts))
        if not part:
            return b""
        parts += part
    return bytes(parts)


if __name__ == "__main__":
    literals = _load("literals")
    syscalls = _load("syscalls")
    main(json.loads(sys.argv[1]))
