"""Killable processes that compute a function's values.

In: the name of a module and function, and pickled arguments. Out: the function's return value as
JSON, so that nothing that ran there can run code here, or a `WorkerFailure` if it raised, died or
missed its deadline. A process is a fresh interpreter: processes with threads aren't forked, and the
user's script needs no `__main__` guard. It serves many calls, and is killed and replaced after a
failure. It ends when its parent does: its input closes, and a timer ends a call that nobody awaits.
POSIX only: Windows has neither `poll` on pipes nor these limits.
"""

import atexit
import contextlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

_MEMORY_LIMIT_BYTES = 4 * 2**30
# Separate deadline for starting the interpreter and importing the function's module.
_START_DEADLINE_S = 120.0
# A worker ends a call by itself only this long after the parent should have killed it.
_ORPHAN_GRACE_S = 5.0
_LENGTH = struct.Struct("!Q")  # of the settings
_HEADER = struct.Struct("!Qd")  # of a request: the length of the arguments, the deadline in seconds
# A process holds the next call while it computes one, so that it never waits for its parent.
_CALLS_HELD = 2
# Starting a process takes seconds: a further one has to have this many calls to make.
_CALLS_PER_START = 8
_MOST_WORKERS = 8
MOST_LATE_CALLS = 4
_LATE = "no answer within the deadline"
_DIED = "the process died"
_NOT_TRIED = f"not tried after {MOST_LATE_CALLS} of the same prompt without an answer"


class WorkerFailure(Exception):
    """The call returned no value: it raised, the process died, or the deadline passed.

    Attributes:
        cause: What happened, in words that are the same for all failures of a kind.
    """

    def __init__(self, cause: str, details: str = "") -> None:
        super().__init__(f"{cause}: {details}" if details else cause)
        self.cause = cause


def environment_of_worker() -> dict[str, str]:
    """Return the environment of an interpreter that finds what this one finds, and computes on one core."""
    folders = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109  # a string
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folders}


class _Worker:
    """One process, used by one thread at a time. It answers calls in the order it gets them."""

    def __init__(self, target: str, settings: bytes) -> None:
        self._process = subprocess.Popen(
            # -P: a file in the user's folder must not shadow a module of a library.
            [sys.executable, "-P", "-m", "trl_selfplay.rewards.worker", target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment_of_worker(),
            start_new_session=True,  # Ctrl-C only reaches the parent, which decides
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        for pipe in (self._requests, self._answers):
            os.set_blocking(pipe.fileno(), False)
        self._target = target
        self._unsent = bytearray(_LENGTH.pack(len(settings)) + settings)
        self._received = bytearray()
        self.is_ready = False
        self.calls: deque[bytes] = deque()  # pickled arguments, the first being at work
        self.calls_made = 0
        self.ends = time.monotonic() + _START_DEADLINE_S  # of the start, then of the first call

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def waits_for(self) -> list[tuple[int, int]]:
        """The file descriptors and events to poll."""
        writing = [(self._requests.fileno(), select.POLLOUT)] if self._unsent else []
        return [(self._answers.fileno(), select.POLLIN), *writing]

    def send(self, call: bytes, deadline_s: float) -> None:
        if not self.calls:
            self.ends = time.monotonic() + deadline_s
        self.calls.append(call)
        self.calls_made += 1
        self._unsent += _HEADER.pack(len(call), deadline_s) + call
        self._write()

    def exchange(self, deadline_s: float) -> list[tuple[bytes, dict[str, Any]]]:
        """Write and read what the pipes hold; return calls with their answers.

        Raises:
            WorkerFailure: The first of the calls has no answer, and won't have one.
            ImportError: The function's module needs a package that isn't installed.
            RuntimeError: The process can't be started, or its `prepare` raised this.
        """
        self._write()
        has_ended = False
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._answers.fileno(), 65536):
                self._received += part
            has_ended = True
        *lines, self._received = self._received.split(b"\n")
        if lines and not self.is_ready:
            start = json.loads(lines.pop(0))
            if "error" in start:
                kind = ImportError if start["is_import"] else RuntimeError
                raise kind(start["error"])
            self.is_ready = True
        answered = [(self.calls.popleft(), json.loads(line)) for line in lines]
        now = time.monotonic()
        if answered:
            self.ends = now + deadline_s
        elif has_ended or (now >= self.ends and (self.calls or not self.is_ready)):
            cause = _DIED if has_ended else _LATE
            if not self.is_ready:
                raise RuntimeError(f"the grading process for {self._target} didn't start: {cause}")
            raise WorkerFailure(cause)
        return answered

    def _write(self) -> None:
        # A broken pipe is found by reading, behind the last answers.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                del self._unsent[: os.write(self._requests.fileno(), self._unsent)]

    def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # and what it has started
        self._requests.close()
        self._answers.close()
        self._process.wait()

    def forget(self) -> None:
        """Release a process that belongs to the parent of this one."""
        self._requests.close()
        self._answers.close()
        self._process.returncode = 0  # not ours to wait for


class WorkerPool:
    """Processes for one function, started on demand.

    A thread that makes calls has a process at once, and further ones while the pool has fewer than
    `workers` at work.

    Args:
        module: The function's module. If it has a `prepare()`, that is called once per process
            before the first call, for slow imports; its ImportError or RuntimeError is passed on.
        function: The function's name.
        workers: Most processes that a call of `call_each` uses; by default one per CPU, at most 8.
        calls_per_worker: A process is replaced after as many calls, since caches grow.
        settings: Named arguments of `prepare`.
    """

    def __init__(
        self,
        module: str,
        function: str,
        workers: int | None = None,
        calls_per_worker: int = 10_000,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._target = f"{module}:{function}"
        self._settings = pickle.dumps(dict(settings or {}))
        self.workers = workers or min(_MOST_WORKERS, _cpu_count())
        self._calls_per_worker = calls_per_worker
        self._idle: list[_Worker] = []
        self._busy = 0
        self._epoch = 0  # incremented by `close`; processes of an old epoch are killed
        self._lock = threading.Lock()
        self._is_registered = False

    def call(self, *arguments: Any, deadline_s: float) -> Any:
        """Return `function(*arguments)`, from any thread.

        Raises:
            WorkerFailure: No value within the deadline (in seconds, once a process is ready).
            ImportError: The function's module needs a package that isn't installed.
            RuntimeError: The process can't be started.
        """
        (value,), failures = self.call_each([arguments], deadline_s)
        if failures:
            raise failures[0]
        return value

    def call_each(
        self,
        calls: Sequence[tuple[Any, ...]],
        deadline_s: float,
        groups: Sequence[Hashable] | None = None,
    ) -> tuple[list[Any], dict[int, WorkerFailure]]:
        """Return the value of each call (None if it failed), and the failures by index.

        Several processes compute at the same time. Calls with equal arguments (equal pickles) are
        computed once. The values depend neither on the order of the calls nor on the number of
        processes.

        Args:
            calls: The arguments of each call.
            deadline_s: Deadline per call.
            groups: A key per call, such as its prompt. A timeout costs the whole deadline and a
                process, so after four timeouts in a group its other calls fail without being
                tried. Shorter calls of a group come first. None: all calls are tried.

        Raises:
            ImportError: The function's module needs a package that isn't installed.
            RuntimeError: A process can't be started.
        """
        work = _Work([pickle.dumps(arguments) for arguments in calls], groups)
        crew: list[_Worker] = []
        started_in, epoch = self._epoch, None
        try:
            while work.left or any(worker.calls for worker in crew):
                self._give_out(work, crew, deadline_s)
                self._take_in(work, crew, deadline_s)
            epoch = started_in
        finally:  # after Ctrl-C, pending answers would be read as those of later calls
            for worker in reversed(crew):  # those still starting are taken last
                self._release(worker, epoch)
        return work.outcomes()

    def close(self) -> None:
        """End the processes; busy ones end after their calls. A later call starts new ones."""
        with self._lock:
            closing, self._idle = self._idle, []
            self._epoch += 1
        for worker in closing:
            worker.kill()

    def _give_out(self, work: "_Work", crew: list[_Worker], deadline_s: float) -> None:
        """Bring in as many processes as the calls need, and send calls to those that are free."""
        while len(crew) < min(self.workers, work.left):
            is_needed = len(crew) * _CALLS_PER_START < work.left
            worker = self._take(is_first=not crew, may_start=is_needed)
            if worker is None:
                break
            crew.append(worker)
        for worker in list(crew):
            while worker.is_ready and len(worker.calls) < _CALLS_HELD:
                is_spent = worker.calls_made >= self._calls_per_worker
                call = None if is_spent else work.take()
                if call is None:
                    break
                worker.send(call, deadline_s)
            if work.left and worker.is_ready and not worker.calls:  # it is spent
                crew.remove(worker)
                self._release(worker, self._epoch)

    def _take_in(self, work: "_Work", crew: list[_Worker], deadline_s: float) -> None:
        """Wait for an answer or a deadline, and note answers and failures."""
        poll = select.poll()
        for worker in crew:
            for descriptor, events in worker.waits_for:
                poll.register(descriptor, events)
        ends = [worker.ends for worker in crew if worker.calls or not worker.is_ready]
        if ends:
            poll.poll(max(0.0, min(ends) - time.monotonic()) * 1000)
        for worker in list(crew):
            try:
                for call, answer in worker.exchange(deadline_s):
                    work.note(call, answer)
            except WorkerFailure as failure:
                if worker.calls:
                    work.note_failure(worker.calls.popleft(), failure)
                work.take_back(worker.calls)
                crew.remove(worker)
                self._release(worker, None)

    def _take(self, is_first: bool, may_start: bool) -> _Worker | None:
        """Return an idle process or a new one; None if there is none for this call."""
        with self._lock:
            if not self._is_registered:
                self._is_registered = True
                _pools.append(self)
                atexit.register(self.close)
                # A forked process must not write into its parent's pipes.
                os.register_at_fork(after_in_child=self._forget)
            if not is_first and self._busy >= self.workers:
                return None
            self._busy += 1
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    return worker
                worker.kill()
            if not is_first and not may_start:
                self._busy -= 1
                return None
        try:
            return _Worker(self._target, self._settings)
        except BaseException:
            with self._lock:
                self._busy -= 1
            raise

    def _release(self, worker: _Worker, epoch: int | None) -> None:
        """Keep a process for later calls, or end it if it is spent or of an old epoch or none."""
        with self._lock:
            self._busy -= 1
            is_kept = epoch == self._epoch and worker.calls_made < self._calls_per_worker
            if is_kept:
                self._idle.append(worker)
        if not is_kept:
            worker.kill()

    def _forget(self) -> None:
        self._lock = threading.Lock()  # another thread may have held it
        for worker in self._idle:
            worker.forget()
        self._idle, self._busy = [], 0


class _Work:
    """The distinct calls of one batch: which is next, and what came of each.

    Args:
        calls: The pickled arguments of each call.
        groups: As for `WorkerPool.call_each`.
    """

    def __init__(self, calls: Sequence[bytes], groups: Sequence[Hashable] | None) -> None:
        self._rows = list(zip(calls, groups or [None] * len(calls), strict=True))
        self._most_late = len(calls) if groups is None else MOST_LATE_CALLS
        # The order within a group must not depend on that of the calls.
        ordered = sorted(dict.fromkeys(self._rows), key=lambda row: (len(row[0]), row[0]))
        self._place = {row: place for place, row in enumerate(ordered)}
        self._waiting = deque(ordered)
        self._taken: set[bytes] = set()
        self._returned = deque[bytes]()
        self._values: dict[bytes, Any] = {}
        self._failures: dict[bytes, WorkerFailure] = {}

    @property
    def left(self) -> int:
        """An upper bound of the number of calls that `take` will still return."""
        return len(self._returned) + len(self._waiting)

    def take(self) -> bytes | None:
        """Return a call to be made next; None if none is left."""
        if self._returned:
            return self._returned.popleft()
        while self._waiting:
            row = self._waiting.popleft()
            if row[0] not in self._taken and not self._is_given_up(row):
                self._taken.add(row[0])
                return row[0]
        return None

    def take_back(self, calls: Iterable[bytes]) -> None:
        self._returned.extend(calls)

    def note(self, call: bytes, answer: dict[str, Any]) -> None:
        if "error" in answer:
            self.note_failure(call, WorkerFailure(*answer["error"]))
        else:
            self._values[call] = answer["value"]

    def note_failure(self, call: bytes, failure: WorkerFailure) -> None:
        self._values[call] = None
        self._failures[call] = failure

    def outcomes(self) -> tuple[list[Any], dict[int, WorkerFailure]]:
        values: list[Any] = []
        failures: dict[int, WorkerFailure] = {}
        for index, row in enumerate(self._rows):
            # A call may have been made for another group, or by another process meanwhile.
            failure = (
                WorkerFailure(_NOT_TRIED) if self._is_given_up(row) else self._failures.get(row[0])
            )
            values.append(self._values[row[0]] if failure is None else None)
            if failure is not None:
                failures[index] = failure
        return values, failures

    def _is_given_up(self, row: tuple[bytes, Hashable]) -> bool:
        """Return whether enough calls before this one of its group were late."""
        if len(self._failures) < self._most_late:
            return False
        place = self._place[row]
        before = (
            self._place.get((call, row[1]), place)
            for call, failure in self._failures.items()
            if failure.cause == _LATE
        )
        return sum(other < place for other in before) >= self._most_late


def _cpu_count() -> int:
    """Return the number of CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


_pools: list[WorkerPool] = []


def close_workers() -> None:
    """End all grading processes; the next call starts new ones. Also done at exit."""
    for pool in _pools:
        pool.close()


def main() -> None:
    """Serve calls from standard input until it closes."""
    import importlib
    import resource

    with contextlib.suppress(ValueError, OSError):  # macOS doesn't support this limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    # The function may print or read: keep that apart from answers and requests.
    requests = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def reply(message: dict[str, Any]) -> None:
        line = json.dumps(message).encode()
        answers.write(line + b"\n")
        answers.flush()

    module_name, name = sys.argv[1].split(":")
    try:
        module = importlib.import_module(module_name)
        settings = pickle.loads(requests.read(*_LENGTH.unpack(requests.read(_LENGTH.size))))
        getattr(module, "prepare", dict)(**settings)
        function = getattr(module, name)
    except (ImportError, RuntimeError) as error:
        reply({"error": str(error), "is_import": isinstance(error, ImportError)})
        return
    reply({"ready": True})
    while header := requests.read(_HEADER.size):
        length, deadline_s = _HEADER.unpack(header)
        arguments = pickle.loads(requests.read(length))
        # If the parent is gone and the call never returns, the kernel ends this process.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + _ORPHAN_GRACE_S)
        try:
            answer = {"value": function(*arguments)}
            json.dumps(answer)
        except Exception as error:  # graders may fail in any way
            answer = {"error": (f"it raised {type(error).__name__}", str(error)[:200])}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(answer)


if __name__ == "__main__":
    main()
