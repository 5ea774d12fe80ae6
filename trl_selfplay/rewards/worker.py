"""Killable processes that compute one value at a time.

In: the name of a module and function, and pickled arguments. Out: the function's return value as
JSON, so that nothing that ran there can run code here, or a `WorkerFailure` if it raised, died or
missed its deadline. A process is a fresh interpreter: processes with threads aren't forked, and the
user's script needs no `__main__` guard. It serves many calls, and is killed and replaced after a
failure. It ends when its parent does: its input closes, and a timer ends a call that nobody awaits.
POSIX only: Windows has neither `select` on pipes nor these limits.
"""

import atexit
import contextlib
import json
import os
import pickle
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

_MEMORY_LIMIT_BYTES = 4 * 2**30
# Separate deadline for starting the interpreter and importing the function's module.
_START_DEADLINE_S = 120.0
# A worker ends a call by itself only this long after the parent should have killed it.
_ORPHAN_GRACE_S = 5.0
_LENGTH_BYTES = 8
MOST_LATE_CALLS = 4
_LATE = "no answer within the deadline"
_NOT_TRIED = f"not tried after {MOST_LATE_CALLS} of the same prompt without an answer"


class WorkerFailure(Exception):
    """The call returned no value: it raised, the process died, or the deadline passed."""


class _Worker:
    """One process, used by one thread at a time."""

    def __init__(self, target: str) -> None:
        self._process = subprocess.Popen(
            # -P: a file in the user's folder must not shadow a module of a library.
            [sys.executable, "-P", "-m", "trl_selfplay.rewards.worker", target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # noqa: PTH109  # a string
            },
            start_new_session=True,  # Ctrl-C only reaches the parent, which decides
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        os.set_blocking(self._requests.fileno(), False)
        try:
            ready = self._read(time.monotonic() + _START_DEADLINE_S)
        except WorkerFailure as failure:
            self.kill()
            raise RuntimeError(
                f"the grading process for {target} didn't start: {failure}"
            ) from failure
        except BaseException:
            self.kill()
            raise
        if "error" in ready:
            self.kill()
            raise ImportError(ready["error"])

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def call(self, arguments: tuple[Any, ...], deadline_s: float) -> dict[str, Any]:
        ends = time.monotonic() + deadline_s
        payload = pickle.dumps((arguments, deadline_s))
        self._write(len(payload).to_bytes(_LENGTH_BYTES, "big") + payload, ends)
        return self._read(ends)

    def _write(self, message: bytes, ends: float) -> None:
        unsent = memoryview(message)
        with selectors.DefaultSelector() as selector:
            selector.register(self._requests, selectors.EVENT_WRITE)
            while unsent:
                if not selector.select(max(0.0, ends - time.monotonic())):
                    raise WorkerFailure(_LATE)
                try:
                    unsent = unsent[os.write(self._requests.fileno(), unsent) :]
                except BrokenPipeError as error:
                    raise WorkerFailure("the process died") from error

    def _read(self, ends: float) -> dict[str, Any]:
        received = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0.0, ends - time.monotonic())):
                    raise WorkerFailure(_LATE)
                part = os.read(self._answers.fileno(), 65536)
                if not part:
                    raise WorkerFailure("the process died")
                received += part
        return json.loads(received)

    def kill(self) -> None:
        self._process.kill()
        self._requests.close()
        self._answers.close()
        self._process.wait()

    def forget(self) -> None:
        """Release a process that belongs to the parent of this one."""
        self._requests.close()
        self._answers.close()
        self._process.returncode = 0  # not ours to wait for


class WorkerPool:
    """Processes for one function, one per concurrent thread, started on demand.

    Args:
        module: The function's module. If it has a `prepare()`, that is called once per process
            before the first call, for slow imports; its ImportError is passed on.
        function: The function's name.
    """

    def __init__(self, module: str, function: str) -> None:
        self._target = f"{module}:{function}"
        self._idle: list[_Worker] = []
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
        worker, epoch = self._take()
        try:
            answer = worker.call(arguments, deadline_s)
        except BaseException:
            # After Ctrl-C as well: the pending answer would be read as that of the next call.
            worker.kill()
            raise
        with self._lock:
            is_kept = epoch == self._epoch
            if is_kept:
                self._idle.append(worker)
        if not is_kept:
            worker.kill()
        if "error" in answer:
            raise WorkerFailure(answer["error"])
        return answer["value"]

    def call_each(
        self,
        calls: Sequence[tuple[Any, ...]],
        deadline_s: float,
        groups: Sequence[Hashable] | None = None,
    ) -> tuple[list[Any], Counter[str]]:
        """Return the value of each call (None if it failed), and a count of failures by reason.

        Calls with equal arguments (equal pickles) are computed once.

        Args:
            calls: The arguments of each call.
            deadline_s: Deadline per call.
            groups: A key per call, such as its prompt. A timeout costs the whole deadline and a
                process, so after four timeouts in a group its other calls fail without being
                tried. None: all calls are tried.
        """
        known: dict[bytes, tuple[Any, str | None]] = {}
        late = Counter[Hashable]()
        values: list[Any] = []
        reasons = Counter[str]()
        for arguments, group in zip(calls, groups or [None] * len(calls), strict=True):
            key = pickle.dumps(arguments)
            if key not in known and late[group] >= MOST_LATE_CALLS:
                values.append(None)
                reasons[_NOT_TRIED] += 1
                continue
            if key not in known:
                try:
                    known[key] = (self.call(*arguments, deadline_s=deadline_s), None)
                except WorkerFailure as failure:
                    known[key] = (None, str(failure))
                    late[group] += groups is not None and str(failure) == _LATE
            value, reason = known[key]
            values.append(value)
            if reason is not None:
                reasons[reason] += 1
        return values, reasons

    def close(self) -> None:
        """End the processes; busy ones end after their call. A later call starts new ones."""
        with self._lock:
            closing, self._idle = self._idle, []
            self._epoch += 1
        for worker in closing:
            worker.kill()

    def _take(self) -> tuple[_Worker, int]:
        with self._lock:
            if not self._is_registered:
                self._is_registered = True
                _pools.append(self)
                atexit.register(self.close)
                # A forked process must not write into its parent's pipes.
                os.register_at_fork(after_in_child=self._forget)
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    return worker, self._epoch
                worker.kill()
            epoch = self._epoch
        return _Worker(self._target), epoch

    def _forget(self) -> None:
        self._lock = threading.Lock()  # another thread may have held it
        for worker in self._idle:
            worker.forget()
        self._idle = []


_pools: list[WorkerPool] = []


def close_workers() -> None:
    """End all grading processes; the next call starts new ones. Also done at exit."""
    for pool in _pools:
        pool.close()


def main() -> None:
    """Serve calls from standard input until it closes."""
    import importlib
    import resource
    import signal

    with contextlib.suppress(ValueError, OSError):  # macOS doesn't support this limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    # The function may print or read: keep that apart from answers and requests.
    requests = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def reply(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    module_name, name = sys.argv[1].split(":")
    try:
        module = importlib.import_module(module_name)
        getattr(module, "prepare", lambda: None)()
        function = getattr(module, name)
    except ImportError as error:
        reply({"error": str(error)})
        return
    reply({"ready": True})
    while length := requests.read(_LENGTH_BYTES):
        arguments, deadline_s = pickle.loads(requests.read(int.from_bytes(length, "big")))
        # If the parent is gone and the call never returns, the kernel ends this process.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + _ORPHAN_GRACE_S)
        try:
            answer = {"value": function(*arguments)}
        except Exception as error:  # graders may fail in any way
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(answer)


if __name__ == "__main__":
    main()
