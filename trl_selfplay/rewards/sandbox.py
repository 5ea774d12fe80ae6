"""Run programs that a model wrote: as a whole, or function by function.

In: source code, standard input or arguments, limits. Out: what a program printed or returned, and
how it ended. Programs run in isolated processes (`zygote.py`), one zygote per concurrent thread;
nothing that is expected of a program enters the process that runs it. What comes back is data that
the program may have forged, never a verdict. Linux only.
"""

import atexit
import contextlib
import fcntl
import json
import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

import trl_selfplay.rewards.isolation as isolations
import trl_selfplay.rewards.literals as literals
from trl_selfplay.rewards.isolation import Isolation, Limits
from trl_selfplay.rewards.processes import Processes

Ending = Literal[
    "ok",
    "raised",
    "late",
    "killed",
    "too much output",
    "too much memory",
    "too many processes",
]
_OWN_ENDINGS = get_args(Ending)[1:]
_START_DEADLINE_S = 60.0
# A zygote ends a program itself at its deadline. After this long it is ended with it.
_GRACE_S = 0.5
_STOP_DEADLINE_S = 10.0
_LONGEST_S = 86_400.0
# Of one zygote. After that many it is replaced, in case something has piled up in it.
_MOST_PROGRAMS = 1000
# A zygote may have been ended from outside, as where a machine is out of memory.
_MOST_ATTEMPTS = 2
_LENGTH_BYTES = 4
_ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True)
class Ran:
    """What a program printed, and how it ended."""

    stdout: str
    ending: Ending


@dataclass(frozen=True, slots=True)
class Raised:
    """The name of an exception's nearest built-in type, and its message.

    It is `LiteralError` where a result can't be sent.
    """

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Called:
    """What a call returned, or, if `raised` isn't None, what it raised."""

    value: Any = None
    raised: Raised | None = None


class ProgramEnded(Exception):
    """The program of a session has ended, so it can't answer.

    Attributes:
        ending: How.
    """

    def __init__(self, ending: Ending, detail: str = "") -> None:
        super().__init__(f"the program ended: {ending}{detail and f' ({detail})'}")
        self.ending = ending


class _WorkerLost(Exception):
    """A zygote gave no answer."""


class Sandbox:
    """A pool of isolated interpreters, for any number of threads.

    Args:
        limits: What each program may use.
        workers: Programs that run at the same time; other threads wait. None: one per CPU.
        allow_weak_isolation: Where nothing better can be had, run programs with limits and a filter of
            system calls alone: they can then read and write this user's files and, other than as
            root, the memory of this user's processes.

    Raises:
        RuntimeError: The machine offers no isolation.
    """

    def __init__(
        self,
        limits: Limits = Limits(),  # noqa: B008  # frozen
        workers: int | None = None,
        allow_weak_isolation: bool = False,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1.")
        self.limits = limits
        self._workers = workers or len(os.sched_getaffinity(0))
        self._reset()
        self.isolation, first = _choose(limits, allow_weak_isolation)
        self._idle.append(first)
        atexit.register(self.close)

    def _reset(self, inherited: Sequence["_Worker"] = ()) -> None:
        for worker in inherited:
            worker.forget()
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(self._workers)
        self._idle: list[_Worker] = []
        self._ending: list[_Worker] = []  # a deadline doesn't wait for them
        self._epoch = 0  # incremented by `close`; zygotes of an old epoch are ended after use

    def close(self) -> None:
        """End the processes; a later call starts new ones. Also done at exit."""
        if self._owner != os.getpid():  # they belong to the process that has forked this one
            return
        with self._lock:
            closing, self._idle, self._ending = [*self._idle, *self._ending], [], []
            self._epoch += 1
        for worker in closing:
            worker.end()
        for worker in closing:
            worker.wait()

    def run(self, source: str, stdin: str = "", *, deadline_s: float) -> Ran:
        """Run a program as `__main__`, and return what it printed.

        Args:
            source: Python code.
            stdin: Its standard input.
            deadline_s: Wall-clock seconds. Waiting for other threads' programs isn't included.

        Raises:
            RuntimeError: The machine can't start another process.
        """
        _check_deadline(deadline_s)
        for _ in range(_MOST_ATTEMPTS):
            with self._worker() as worker:
                started = time.monotonic()
                try:
                    return worker.run(source, stdin, deadline_s, self.limits.output_bytes)
                except _WorkerLost:
                    deadline_s -= time.monotonic() - started
            if deadline_s <= 0:
                break
        return Ran("", "killed")

    @contextlib.contextmanager
    def session(self, source: str, *, deadline_s: float) -> Iterator["Session"]:
        """Run a program as a module, whose functions can then be called.

        Args:
            source: Python code.
            deadline_s: Wall-clock seconds for the program and all calls.

        Raises:
            ProgramEnded: The program raised, or has ended.
        """
        _check_deadline(deadline_s)
        with self._worker() as worker:
            session = Session(worker, deadline_s, self.limits.output_bytes)
            try:
                session._load(source, deadline_s)
                yield session
            except _WorkerLost as error:
                raise ProgramEnded("killed", str(error)) from error
            finally:
                with contextlib.suppress(_WorkerLost):
                    session._end()

    @contextlib.contextmanager
    def _worker(self) -> Iterator["_Worker"]:
        if self._owner != os.getpid():  # a fork: the zygotes are those of its parent
            self._reset([*self._idle, *self._ending])
        with self._free:
            worker, epoch = self._take()
            if worker is None:
                worker = _Worker(self.isolation, self.limits)
            try:
                yield worker
            finally:
                with self._lock:
                    is_kept = worker.is_reusable and epoch == self._epoch
                    (self._idle if is_kept else self._ending).append(worker)
                if not is_kept:
                    worker.end()

    def _take(self) -> tuple["_Worker | None", int]:
        """Return an idle zygote, if there is one; forget those that have ended."""
        with self._lock:
            ended = [worker for worker in (*self._idle, *self._ending) if not worker.is_alive]
            self._idle = [worker for worker in self._idle if worker not in ended]
            self._ending = [worker for worker in self._ending if worker not in ended]
            worker = self._idle.pop() if self._idle else None
            epoch = self._epoch
        for worker_that_ended in ended:
            worker_that_ended.end()
            worker_that_ended.wait()
        return worker, epoch


class Session:
    """The functions of a program that runs; made by `Sandbox.session`."""

    def __init__(self, worker: "_Worker", deadline_s: float, most_bytes: int) -> None:
        self._worker = worker
        self._ends = time.monotonic() + deadline_s
        self._most_bytes = most_bytes
        self._ended: Ending | None = None
        # Pipes, because a socket would name the process at its other end.
        reading, self._requests = os.pipe()
        self._answers, writing = os.pipe()
        self._theirs = [reading, writing]
        os.set_blocking(self._requests, False)

    def call(
        self, name: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Called:
        """Call a function, and give the mutable arguments the contents that it leaves them.

        Args:
            name: The function's name, with dots for attributes.
            args: Positional arguments; values that `literals.encode` takes.
            kwargs: Named arguments.

        Raises:
            LiteralError: An argument can't be sent.
            ProgramEnded: The program gave no answer, or one that can't be read.
        """
        if self._ended is not None:
            raise ProgramEnded(self._ended)
        shared: list[Any] = []
        request = (name, tuple(args), tuple((kwargs or {}).items()))
        message = literals.encode(request, shared)
        count = len(shared)
        try:
            self._write(len(message).to_bytes(_LENGTH_BYTES, "big") + message)
            return self._answer(shared, count)
        except ProgramEnded as error:
            self._ended = error.ending
            raise

    def _load(self, source: str, deadline_s: float) -> None:
        try:
            self._worker.begin("session", source, self._theirs, deadline_s)
        finally:
            for descriptor in self._theirs:
                os.close(descriptor)
        called = self._answer([], 0)
        if called.raised is not None:
            raise ProgramEnded("raised", f"{called.raised.kind}: {called.raised.message}")

    def _answer(self, shared: list[Any], count: int) -> Called:
        length = int.from_bytes(self._read(_LENGTH_BYTES), "big")
        if length > self._most_bytes:
            raise ProgramEnded("too much output")
        data = self._read(length)
        try:
            match literals.decode(data, shared):
                case ("returned", value, tuple(contents)):
                    called = Called(value)
                case ("raised", str(kind), str(message), tuple(contents)):
                    called = Called(raised=Raised(kind, message))
                case _:
                    raise literals.LiteralError("not an answer")
            for container, elements in zip(shared[:count], contents, strict=False):
                literals.refill(container, elements)
        except literals.LiteralError as error:
            raise ProgramEnded("killed", f"its answer can't be read: {error}") from error
        return called

    def _write(self, message: bytes) -> None:
        unsent = memoryview(message)
        while unsent:
            self._wait(self._requests, select.POLLOUT)
            try:
                unsent = unsent[os.write(self._requests, unsent) :]
            except BrokenPipeError:
                self._raise_ending()

    def _read(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            self._wait(self._answers, select.POLLIN)
            part = os.read(self._answers, min(count - len(received), 65536))
            if not part:
                self._raise_ending()
            received += part
        return bytes(received)

    def _wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(1000 * max(0.0, self._ends - time.monotonic())):
            raise ProgramEnded("late")

    def _raise_ending(self) -> NoReturn:
        # It has closed its files, most likely because it is ending.
        ending = self._worker.stop(patience_s=_GRACE_S)
        raise ProgramEnded(cast(Ending, ending) if ending in _OWN_ENDINGS else "killed")

    def _end(self) -> None:
        os.close(self._requests)
        os.close(self._answers)
        self._worker.stop()


class _Worker:
    """One zygote and its monitor, used by one thread at a time."""

    def __init__(self, isolation: Isolation, limits: Limits) -> None:
        self._left = 1 if isolation == "bubblewrap per program" else _MOST_PROGRAMS
        self._ending: str | None = "ok"
        self._errors = os.memfd_create("errors")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._folder = _open_folder() if isolation == "weak" else None
        settings = isolations.describe(isolation, limits, self._folder or "/tmp")
        settings["control"] = theirs.fileno()
        with theirs:
            self._process = subprocess.Popen(
                [*isolations.command(), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=isolations.ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C only reaches the grader, which decides
            )
        try:
            self._reply(time.monotonic() + _START_DEADLINE_S)
        except _WorkerLost as error:
            self.end()
            self.wait()
            raise RuntimeError(f"no isolated interpreter could be started: {error}") from error
        except BaseException:
            self.end()
            self.wait()
            raise

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def is_reusable(self) -> bool:
        return self._ending is not None and self._left > 0

    def begin(self, kind: str, source: str, files: list[int], deadline_s: float) -> None:
        """Start a program."""
        self._left -= 1
        self._ending = None
        program = _file_of(source)
        request = json.dumps({"kind": kind, "deadline_s": deadline_s})
        try:
            socket.send_fds(self._control, [request.encode()], [program, *files])
        except OSError as error:
            raise _WorkerLost(str(error)) from error
        finally:
            os.close(program)

    def run(self, source: str, stdin: str, deadline_s: float, most_bytes: int) -> Ran:
        """Run a program, and read what it prints."""
        ends = time.monotonic() + deadline_s + _GRACE_S
        reading, writing = os.pipe()
        standard_input = _file_of(stdin)
        try:
            try:
                self.begin("run", source, [standard_input, writing], deadline_s)
            finally:
                os.close(standard_input)
                os.close(writing)
            printed = _read_all(reading, most_bytes + 1, ends)
        finally:
            os.close(reading)
        text = printed[:most_bytes].decode(errors="replace")
        if len(printed) > most_bytes:
            self.stop()
            return Ran(text, "too much output")
        return Ran(text, cast(Ending, self.finish(ends)))

    def finish(self, ends: float) -> str:
        """Wait for the end of the program, and return how it ended."""
        if self._ending is None:
            if not self._has_answer(ends):
                return "late"  # and the zygote can't be used again
            self._ending = self._reply(ends)["ending"]
        return self._ending

    def stop(self, patience_s: float = 0.0) -> str:
        """End the program if it doesn't end by itself, and return how it ended."""
        if self._ending is None and not self._has_answer(time.monotonic() + patience_s):
            with contextlib.suppress(OSError):
                self._control.send(b"stop")  # without effect if it has just ended
        return self.finish(time.monotonic() + _GRACE_S)

    def end(self) -> None:
        """Have the zygote end, with all that it has started; `wait` must follow."""
        self._control.close()
        self._process.terminate()

    def wait(self) -> None:
        """Wait until the zygote has ended, and remove what is left of it; once."""
        try:
            self._process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._errors)
        if self._folder is not None:
            # If the monitor has ended first, as where a machine is out of memory.
            proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
            Processes(proc).end_session(self._process.pid, _STOP_DEADLINE_S)
            os.close(proc)
            shutil.rmtree(self._folder, ignore_errors=True)

    def forget(self) -> None:
        """Release a zygote that belongs to the parent of this process."""
        self._control.close()
        os.close(self._errors)
        self._process.returncode = 0  # not ours to wait for

    def _has_answer(self, ends: float) -> bool:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        return bool(poll.poll(1000 * max(0.0, ends - time.monotonic())))

    def _reply(self, ends: float) -> dict[str, Any]:
        if not self._has_answer(ends):
            raise _WorkerLost("no answer")
        try:
            data = self._control.recv(4096)
        except ConnectionResetError:
            data = b""
        if not data:
            raise _WorkerLost(self._last_error() or "the isolated interpreter died")
        reply = json.loads(data)
        if "error" in reply:
            raise RuntimeError(f"no isolated process could be started: {reply['error']}")
        return reply

    def _last_error(self) -> str:
        lines = os.pread(self._errors, 10_000, 0).decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


def _choose(limits: Limits, allow_weak_isolation: bool) -> tuple[Isolation, _Worker]:
    """Return the best isolation that works here, and its first zygote."""
    reasons = []
    for isolation in isolations.candidates(allow_weak_isolation):
        worker = None
        try:
            worker = _Worker(isolation, limits)
            ran = worker.run("print(1)", "", _START_DEADLINE_S, 100)
            if ran != Ran("1\n", "ok"):
                raise RuntimeError(f"a trial program ended with {ran}")
            return isolation, worker
        except (_WorkerLost, RuntimeError, OSError) as error:
            reasons.append(f"{isolation}: {error}")
            if worker is not None:
                worker.end()
                worker.wait()
    raise RuntimeError(
        "programs that a model wrote can't be isolated here: "
        + "; ".join(reasons)
        + ". Install bubblewrap, allow unprivileged user namespaces (in Docker with `--security-opt "
        "seccomp=unconfined --security-opt apparmor=unconfined`), or pass allow_weak_isolation=True "
        "inside a container or virtual machine that may be damaged."
    )


def _check_deadline(deadline_s: float) -> None:
    if not 0 < deadline_s <= _LONGEST_S:
        raise ValueError(f"deadline_s is {deadline_s}; it must be between 0 and {_LONGEST_S:.0f}.")


def _open_folder() -> str:
    folder = tempfile.mkdtemp(prefix="programs-")
    if os.geteuid() == 0:  # programs run as another user
        Path(folder).chmod(0o777)
    return folder


def _file_of(text: str) -> int:
    """Return a descriptor of an unnamed file that can only be read."""
    descriptor = os.memfd_create("text", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text.encode(errors="surrogatepass"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _ALL_SEALS)
    return descriptor


def _read_all(descriptor: int, most_bytes: int, ends: float) -> bytes:
    """Read until the end of the file, `most_bytes`, or the time."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    received = bytearray()
    while len(received) < most_bytes:
        if not poll.poll(1000 * max(0.0, ends - time.monotonic())):
            break
        part = os.read(descriptor, min(65536, most_bytes - len(received)))
        if not part:
            break
        received += part
    return bytes(received)
