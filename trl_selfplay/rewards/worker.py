"""A killable process that computes one verdict at a time.

In: a module and function by name, and its arguments as JSON lines. Out: its return value, or a
`WorkerFailure` when it raised, died or ran over its deadline. The process is a fresh interpreter
(no fork of a process with threads, no guard needed in the user's script), serves many calls, and is
killed and replaced after a failure. It ends by itself when its parent goes: its input closes.
"""

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from typing import Any

_MEMORY_LIMIT_BYTES = 4 * 2**30
# Starting the interpreter and importing the function's module is not the function's time.
_START_DEADLINE_S = 120.0


class WorkerFailure(Exception):
    """The call gave no value: it raised, the process died, or the deadline passed."""


class Worker:
    """A lazily started process that runs `module.function`; safe to call from any thread."""

    def __init__(self, module: str, function: str) -> None:
        self._target = f"{module}:{function}"
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def call(self, *arguments: Any, deadline_s: float) -> Any:
        """Return `function(*arguments)`; arguments and value travel as JSON.

        Raises:
            WorkerFailure: No value within the deadline (seconds, after the process has started).
            ImportError: The function's module lacks a package.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
                self._process.stdin.flush()
                answer = self._read(deadline_s)
            except (OSError, WorkerFailure) as error:
                self._kill()
                raise (
                    error if isinstance(error, WorkerFailure) else WorkerFailure(str(error))
                ) from error
            except (
                BaseException
            ):  # Ctrl-C: the answer still to come would be taken for the next one
                self._kill()
                raise
        if "error" in answer:
            raise WorkerFailure(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the process, if one runs."""
        with self._lock:
            self._kill()

    def _start(self) -> None:
        self._kill()
        # A failed check of another package must not print into ours; errors go to the parent's.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trl_selfplay.rewards.worker", self._target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C goes to the parent, which decides
        )
        try:
            ready = self._read(_START_DEADLINE_S)
        except WorkerFailure:
            self._kill()
            raise
        if "error" in ready:
            self._kill()
            raise ImportError(ready["error"])

    def _read(self, deadline_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        ends = time.monotonic() + deadline_s
        received = b""
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                left = ends - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise WorkerFailure(f"no answer within {deadline_s:g} s")
                part = os.read(descriptor, 65536)
                if not part:
                    raise WorkerFailure("the process died")
                received += part
        return json.loads(received)

    def _kill(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # unsent bytes to a dead process
                if stream is not None:
                    stream.close()
        self._process.wait()
        self._process = None


def main() -> None:
    """Serve calls from standard input until it closes."""
    import importlib
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    # What the function prints must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def reply(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    module, name = sys.argv[1].split(":")
    try:
        function = getattr(importlib.import_module(module), name)
        function.prepare()
    except ImportError as error:
        reply({"error": str(error)})
        return
    reply({"ready": True})
    for line in sys.stdin:
        try:
            reply({"value": function(*json.loads(line))})
        except Exception as error:  # the graders' boundary: any failure is no verdict
            reply({"error": f"{type(error).__name__}: {error}"[:500]})


if __name__ == "__main__":
    main()
