"""The process of a vLLM engine, as its parent sees it: start, messages, failures, end.

In: the arguments of an engine, and messages for vllm_worker.py. Out: its messages, or an
`EngineFailure` that says what happened and what the process printed last. After `end`, neither the
process nor anything that it has started is left.
"""

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from trl_selfplay.generation.engine import LEAST_VLLM
from trl_selfplay.generation.vllm_worker import AT_ONCE, tells_of_memory

_WORKER = Path(__file__).with_name("vllm_worker.py")
_LENGTH = struct.Struct("!I")
_NUM_LAST_LINES = 20
_LAST_BYTES = 1 << 14
# The worker's own grace is 2 s; killing all it has started takes moments.
_END_PATIENCE_S = 60.0
# Of a launcher such as torchrun: the engine is no member of the trainer's group.
_OF_LAUNCHERS = (
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "WORLD_SIZE",
)


class EngineFailure(RuntimeError):
    """The engine could not be started, or has stopped.

    Attributes:
        may_pass: Whether another try with less memory may succeed.
        out_of_memory: Whether the engine said that memory did not suffice.
    """

    def __init__(self, message: str, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass
        self.out_of_memory = may_pass and tells_of_memory(message)


class EngineProcess:
    """A running engine, used by one thread at a time.

    The constructor returns once the engine is ready.

    Args:
        python: The interpreter; None for this one.
        arguments: Arguments of vLLM's `EngineArgs`, as JSON values.
        environment: Variables of the process, see `engine_environment`.
        start_patience_s: Seconds within which it must be ready.
        step_patience_s: Seconds within which it must say something while it is waited for.

    Attributes:
        ready: What the engine says about itself: `version`, `dtype`, `quantization`,
            `max_model_length`.

    Raises:
        EngineFailure: It didn't start.
        FileNotFoundError: There is no such interpreter.
    """

    def __init__(
        self,
        python: str | None,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        start_patience_s: float,
        step_patience_s: float,
    ) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._unsent = bytearray()
        self._received = bytearray()
        self._inbox: deque[dict[str, Any]] = deque()
        self._has_ended = False
        try:
            self._process = subprocess.Popen(
                [
                    python or sys.executable,
                    str(_WORKER),
                    *map(str, (requests, answers)),
                ],
                stdin=subprocess.PIPE,
                stdout=self._printed,
                stderr=self._printed,
                pass_fds=(requests, answers),
                env=dict(environment),
                start_new_session=True,  # Ctrl-C only reaches the parent, which decides
            )
        except OSError as error:
            self._close()
            raise FileNotFoundError(
                f"vllm_python={python!r} can't be run ({error}); give the path of an interpreter, "
                "such as /path/to/venv/bin/python."
            ) from error
        finally:
            os.close(requests)
            os.close(answers)
        os.set_blocking(self._requests, False)
        os.set_blocking(self._answers, False)
        try:
            self.send({"arguments": dict(arguments), "least_version": LEAST_VLLM})
            self._patience_s = start_patience_s
            self.ready: dict[str, Any] = self._next("ready")
            self._patience_s = step_patience_s
        except BaseException:  # also Ctrl-C while it starts
            self.end(at_once=True)
            raise

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, as far as the pipe takes it; `receive` sends the rest."""
        body = json.dumps(message, separators=(",", ":")).encode()
        self._unsent += _LENGTH.pack(len(body)) + body
        self._write()

    def receive(self) -> list[list[Any]]:
        """Wait for the news of a step: `[id, new tokens, their log-probs or None, finished]` each.

        Raises:
            EngineFailure: The engine raised, ended, or said nothing within its patience. It is
                ended then.
        """
        news: list[list[Any]] = self._next("out")
        return news

    def end(self, at_once: bool = False) -> None:
        """End the process and all that it has started; return when they are gone.

        Args:
            at_once: Whether to kill it at once; else it may end by itself within 2 seconds.

        Raises:
            RuntimeError: Something can't be ended; the error names it.
        """
        if self._printed.closed:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), AT_ONCE if at_once else b".")
        self._process.stdin.close()
        os.close(self._requests)
        self._requests = -1
        left: list[int] = []
        try:
            self._process.wait(_END_PATIENCE_S)
        except subprocess.TimeoutExpired:
            left = [p.pid for p in psutil.Process(self._process.pid).children(recursive=True)]
            for pid in [*left, self._process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
        self._close()
        # The watcher ends after all others; only one that was itself killed leaves any.
        left = self._left_in_session()
        if left:
            raise RuntimeError(
                f"of the vLLM engine, the processes {', '.join(map(str, left))} can't be ended and "
                "may hold the device's memory. End them, and resume the run."
            )

    def _left_in_session(self) -> list[int]:
        """Kill what is left of the process's session, and return what doesn't end."""
        ends = time.monotonic() + _END_PATIENCE_S
        while left := [pid for pid in psutil.pids() if _is_in_session(pid, self._process.pid)]:
            if time.monotonic() >= ends:
                return left
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        return []

    def _close(self) -> None:
        for descriptor in (self._requests, self._answers):
            if descriptor >= 0:
                os.close(descriptor)
        self._printed.close()

    def _next(self, kind: str) -> Any:
        """Return what the next message holds under this key."""
        ends = time.monotonic() + self._patience_s
        while not self._inbox:
            if self._has_ended:
                self._fail(f"{self._how_it_ended()}", may_pass=True)
            self._exchange(max(0.0, ends - time.monotonic()))
            if not self._inbox and not self._has_ended and time.monotonic() >= ends:
                doing = "start" if kind == "ready" else "finish a step"
                self._fail(f"did not {doing} within {self._patience_s:g} s", may_pass=True)
        message = self._inbox.popleft()
        if "failed" in message:
            failed = message["failed"]
            self._fail(f"failed: {failed['what']}", may_pass=failed["out_of_memory"])
        return message[kind]

    def _exchange(self, timeout_s: float) -> None:
        """Write and read what the pipes take and hold, waiting at most this long for either."""
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        if self._unsent:
            poll.register(self._requests, select.POLLOUT)
        poll.poll(1000 * timeout_s)
        self._write()
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._answers, 1 << 16):
                self._received += part
            self._has_ended = True
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            end = _LENGTH.size + length
            if len(self._received) < end:
                break
            self._inbox.append(json.loads(self._received[_LENGTH.size : end]))
            del self._received[:end]

    def _write(self) -> None:
        # A broken pipe is found by reading, behind the last answers.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                del self._unsent[: os.write(self._requests, self._unsent)]

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_END_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        number = -code if code < 0 else code - 128
        if number in [*signal.Signals]:
            return f"was ended by {signal.Signals(number).name}"
        return f"ended with exit code {code}"

    def _fail(self, what: str, may_pass: bool) -> NoReturn:
        lines = self._last_lines()
        self.end(at_once=True)
        printed = f" It printed last:\n{lines}" if lines else " It printed nothing."
        raise EngineFailure(f"the vLLM engine {what}.{printed}", may_pass)

    def _last_lines(self) -> str:
        size = self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, size - _LAST_BYTES))
        lines = self._printed.read().decode(errors="replace").strip().splitlines()
        return "\n".join(f"    {line}" for line in lines[-_NUM_LAST_LINES:])


def _is_in_session(pid: int, session: int) -> bool:
    try:
        return os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        return False


def engine_environment(
    python: str | None, device: torch.device, tensor_parallel_size: int
) -> dict[str, str]:
    """Return the variables of an engine's process: the user's own, but for those of a launcher.

    On a CUDA device, the engine sees that device first; beyond the number that it needs, none.

    Args:
        python: The interpreter. Paths of our own packages aren't for another one.
        device: Where the trainer's model is.
        tensor_parallel_size: Number of devices that the engine uses.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    if python is not None and python != sys.executable:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            kept.pop(name, None)
    if device.type == "cuda":
        own = torch.cuda.current_device() if device.index is None else device.index
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        others = [name for place, name in enumerate(names) if place != own]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join([names[own], *others[: tensor_parallel_size - 1]])
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    if tensor_parallel_size == 1:
        # One process less to import vLLM, to pass tokens to, and to end. It also makes the order in
        # which requests are scheduled a function of the steps alone.
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {**defaults, **kept}
