"""Run a vLLM engine for another process. A program of its own, in an environment of its own.

In: requests as token ids, from a pipe. Out: tokens and their log-probs, to another pipe, after every
step. `vllm_process.py` starts it with an interpreter whose environment has vLLM, and perhaps none of
our packages: only the standard library and vLLM are imported here.

A message is a JSON value behind its length in 4 bytes, the highest first. The first one to come holds
`arguments` of `EngineArgs` and `least_version`; the answer is `ready` or `failed`. Then come

    {"add": [[id, prompt ids, seed, most tokens], ...], "sampling": arguments of SamplingParams,
     "excluded": [token id, ...], "streams": whether tokens are wanted before the end,
     "adapter": [id, folder] or null}
    {"abort": [id, ...]}

and after every step goes, if there is news or a second has passed,

    {"out": [[id, new token ids, their log-probs or null, whether finished], ...]}

The process first divides in two. The child runs the engine. The parent waits: once our own parent
wants it (a byte on the standard input) or is gone, or the engine has ended, it ends all descendants,
those too that have left the session, and then itself.
"""

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

_LENGTH = struct.Struct("!I")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_WATCH_S = 0.1
# Within this, an engine that is no longer wanted may end by itself and remove its shared memory.
_GRACE_S = 2.0
AT_ONCE = b"!"  # on the standard input: without that grace
_BEAT_S = 1.0  # a busy engine says at least as often that it is alive
_SIGNS_OF_MEMORY = (
    "out of memory",
    "memoryerror",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "is less than desired",  # of what is free, in vLLM
    "is less than requested memory",
)


class Channel:
    """Messages over two pipes."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._received = bytearray()

    def receive(self, wait: bool) -> list[Any]:
        """Return the messages that have come; None as the last at the end.

        Args:
            wait: Whether to wait for one.
        """
        messages: list[Any] = []
        while select.select([self._reading], [], [], None if wait and not messages else 0)[0]:
            part = os.read(self._reading, 1 << 16)
            if not part:
                return [*messages, None]
            self._received += part
            while len(self._received) >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._received)
                end = _LENGTH.size + length
                if len(self._received) < end:
                    break
                messages.append(json.loads(self._received[_LENGTH.size : end]))
                del self._received[:end]
        return messages

    def send(self, message: object) -> None:
        """Write a message, waiting until the pipe takes it."""
        body = json.dumps(message, separators=(",", ":")).encode()
        unsent = memoryview(_LENGTH.pack(len(body)) + body)
        while unsent:
            unsent = unsent[os.write(self._writing, unsent) :]


def run_engine(channel: Channel) -> None:
    """Start an engine, and serve requests until the channel ends."""
    *_, settings = channel.receive(wait=True)
    if settings is None:
        return
    try:
        engine, ready = start_engine(**settings)
    except Exception as error:
        channel.send({"failed": describe(error)})
        raise
    channel.send({"ready": ready})
    try:
        serve(engine, channel)
    except BrokenPipeError:  # nobody reads any more
        return
    except Exception as error:
        channel.send({"failed": describe(error)})
        raise


def start_engine(arguments: dict[str, Any], least_version: list[int]) -> tuple[Any, dict[str, Any]]:
    """Return an engine, and what it says about itself."""
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            f"{sys.executable} can't import vLLM ({error}). Install it there (pip install "
            '"trl-selfplay[vllm]"), or let `vllm_python` name the interpreter of another environment '
            "with vLLM."
        ) from error
    found = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    if found and [int(part) for part in found.groups()] < least_version:
        raise ImportError(
            f"{sys.executable} has vLLM {vllm.__version__}; {'.'.join(map(str, least_version))} or "
            "later is needed."
        )
    engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments))
    config = engine.vllm_config
    return engine, {
        "version": vllm.__version__,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "quantization": config.model_config.quantization,
        "max_model_length": config.model_config.max_model_len,
    }


def serve(engine: Any, channel: Channel) -> None:
    """Add and abort requests as they are told, step while any is unfinished, and send what is new."""
    last_sent = time.monotonic()
    while True:
        is_busy = engine.has_unfinished_requests()
        for message in channel.receive(wait=not is_busy):
            if message is None:
                return
            if "add" in message:
                add(engine, message)
            else:
                engine.abort_request(message["abort"])
        if engine.has_unfinished_requests():
            out = [read(output) for output in engine.step()]
            if out or time.monotonic() - last_sent >= _BEAT_S:
                channel.send({"out": out})
                last_sent = time.monotonic()


def add(engine: Any, message: dict[str, Any]) -> None:
    """Give the engine a message's requests."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    bias = dict.fromkeys(message["excluded"], float("-inf"))
    kind = RequestOutputKind.DELTA if message["streams"] else RequestOutputKind.FINAL_ONLY
    adapter = message["adapter"]
    if adapter is not None:
        number, folder = adapter
        # Keys and values in the cache go by the name, loaded weights by the number: both are new.
        adapter = LoRARequest(f"adapter-{number}", number, folder)
    for name, prompt_ids, seed, most_tokens in message["add"]:
        parameters = SamplingParams(
            **message["sampling"],
            seed=seed,
            max_tokens=most_tokens,
            logit_bias=bias or None,
            output_kind=kind,
            ignore_eos=True,  # the model's own; those to stop at are in stop_token_ids
            detokenize=False,
        )
        engine.add_request(
            str(name), {"prompt_token_ids": prompt_ids}, parameters, lora_request=adapter
        )


def read(output: Any) -> list[Any]:
    """Return a request's new tokens as they are sent."""
    (completion,) = output.outputs
    tokens = list(completion.token_ids)
    logprobs = completion.logprobs
    if logprobs is not None:
        logprobs = [
            step[token].logprob
            for step, token in zip(logprobs[-len(tokens) :] if tokens else [], tokens, strict=True)
        ]
    return [int(output.request_id), tokens, logprobs, output.finished]


def describe(error: Exception) -> dict[str, Any]:
    """Return what an error says, and what follows from it."""
    text = f"{type(error).__name__}: {error}"
    return {"what": text, "out_of_memory": tells_of_memory(text)}


def tells_of_memory(text: str) -> bool:
    """Return whether a text says that memory did not suffice."""
    return any(sign in text.lower() for sign in _SIGNS_OF_MEMORY)


def watch(worker: int, parent: int) -> int:
    """Wait until the worker has ended or isn't wanted, end all descendants, return its exit code.

    Args:
        worker: The process that runs the engine.
        parent: Our parent as we started: the trainer, or a script of the user between it and us.
    """
    ends = code = None
    while code is None and (ends is None or time.monotonic() < ends):
        if ends is not None:
            time.sleep(_WATCH_S)
        elif select.select([0], [], [], _WATCH_S)[0]:
            ends = time.monotonic() + (0.0 if os.read(0, 1) == AT_ONCE else _GRACE_S)
        elif os.getppid() != parent:  # a process forked from it may hold the standard input open
            ends = time.monotonic() + _GRACE_S
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
    while children := descendants_left():
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.001)
    return 0 if code is None else code if code >= 0 else 128 - code


def descendants_left() -> list[int]:
    """Return this process's children, which include orphans of its descendants."""
    own = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()]


def set_for_process(option: int, value: int) -> None:
    """Call Linux's `prctl`."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def main(reading: int, writing: int) -> int:
    """Divide into watcher and worker; return the exit code."""
    parent = os.getppid()
    set_for_process(_PR_SET_CHILD_SUBREAPER, 1)
    worker = os.fork()
    if worker != 0:
        os.close(reading)
        os.close(writing)
        return watch(worker, parent)
    set_for_process(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Modules beside this file must not hide those of a library.
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    run_engine(Channel(reading, writing))
    return 0


if __name__ == "__main__":  # vLLM's own processes import this file
    sys.exit(main(*map(int, sys.argv[1:])))
