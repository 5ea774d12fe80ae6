"""The part of vLLM that vllm_worker.py uses, over a random text instead of a model.

A completion is a function of prompt, seed and adapter: `tokens_of`. The variable STAND_IN holds what
goes wrong, as JSON: see `_Plan`. It needs the standard library alone, so it starts at once.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

__version__ = os.environ.get("STAND_IN_VERSION", "0.32.0")
__all__ = ["EngineArgs", "LLMEngine", "SamplingParams"]

if os.environ.get("STAND_IN_VERSION") == "none":
    raise ImportError("No module named 'vllm'")

VOCAB_SIZE = 259


class _Plan:
    """What goes wrong.

    log: file that gets a line of JSON per engine, request and abort.
    start: "hang", "raise", "exit"; or "memory": raise if `max_num_seqs` is above `fits`.
    at: number of tokens after which `then` happens: "die", "hang", "memory", "raise", "nan", "stop".
    times: how often, over all engines (counted in `log`).
    orphan: whether the engine starts a process that leaves the session and ignores signals.
    """

    def __init__(self) -> None:
        plan = json.loads(os.environ.get("STAND_IN", "{}"))
        self._log = plan.get("log")
        self.start, self.fits = plan.get("start"), plan.get("fits", 0)
        self.at, self.then = plan.get("at"), plan.get("then")
        self.times, self.orphan = plan.get("times", 1), plan.get("orphan", False)

    def note(self, **what: Any) -> None:
        if self._log:
            with Path(self._log).open("a") as file:
                file.write(json.dumps(what) + "\n")

    def goes_wrong(self, num_tokens: int) -> bool:
        if self.at is None or num_tokens < self.at:
            return False
        if Path(self._log).read_text().count('"wrong"') >= self.times:
            return False
        self.note(wrong=self.then)
        return True


def tokens_of(
    prompt: list[int], seed: int, adapter: str, excluded: set[int] = frozenset()
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, without end."""
    draw = random.Random(repr((list(prompt), seed, adapter)))
    allowed = [token for token in range(VOCAB_SIZE) if token not in excluded]
    while True:
        yield draw.choice(allowed)


class EngineArgs:
    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


class LLMEngine:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self._plan = _Plan()
        self._plan.note(engine=arguments, pid=os.getpid(), environment=dict(os.environ))
        print("loading the weights of", arguments["model"], flush=True)
        self._most = arguments["max_num_seqs"]
        length = arguments["max_model_len"]
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                dtype="torch.float32",
                quantization=arguments["quantization"],
                max_model_len=256 if length == -1 else length,
            )
        )
        if self._plan.orphan:
            script = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
            orphan = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
            self._plan.note(orphan=orphan.pid)
        if self._plan.start == "hang":
            time.sleep(600)
        elif self._plan.start == "exit":
            print("the driver is too old", flush=True)
            os._exit(3)
        elif self._plan.start == "raise":
            raise ValueError("architecture NoSuchModel is not supported")
        elif self._plan.start == "memory" and self._most > self._plan.fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self._rows: dict[str, SimpleNamespace] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        return cls(engine_args.arguments)

    def has_unfinished_requests(self) -> bool:
        return bool(self._rows)

    def add_request(
        self, request_id: str, prompt: dict, params: SamplingParams, lora_request: Any = None
    ) -> None:
        assert request_id not in self._rows
        ids = prompt["prompt_token_ids"]
        adapter = "" if lora_request is None else Path(lora_request.lora_path, "name").read_text()
        number = None if lora_request is None else lora_request.lora_int_id
        self._plan.note(
            request=request_id, prompt=ids, seed=params.seed, adapter=adapter, number=number
        )
        excluded = {token for token, bias in (params.logit_bias or {}).items() if bias < -1e9}
        self._rows[request_id] = SimpleNamespace(
            params=params, tokens=[], source=tokens_of(ids, params.seed, adapter, excluded)
        )

    def abort_request(self, request_ids: list[str]) -> None:
        self._plan.note(abort=request_ids)
        for name in request_ids:
            self._rows.pop(name, None)

    def step(self) -> list[SimpleNamespace]:
        outputs = []
        for name, row in [*self._rows.items()][: self._most]:
            row.tokens.append(next(row.source))
            params, token = row.params, row.tokens[-1]
            finished = token in params.stop_token_ids or len(row.tokens) >= params.max_tokens
            if self._plan.goes_wrong(len(row.tokens)):
                if self._plan.then == "stop":
                    finished = True
                else:
                    self._go_wrong()
            if finished:
                del self._rows[name]
            if finished or params.output_kind is RequestOutputKind.DELTA:
                new = [token] if params.output_kind is RequestOutputKind.DELTA else row.tokens
                logprobs = None
                if params.logprobs is not None:
                    value = math.nan if self._plan.then == "nan" else -math.log(VOCAB_SIZE)
                    logprobs = [{t: SimpleNamespace(logprob=value)} for t in new]
                completion = SimpleNamespace(token_ids=new, logprobs=logprobs)
                outputs.append(
                    SimpleNamespace(request_id=name, outputs=[completion], finished=finished)
                )
        return outputs

    def _go_wrong(self) -> None:
        if self._plan.then == "die":
            print("Segmentation fault in a kernel", flush=True)
            os.kill(os.getpid(), 9)
        if self._plan.then == "hang":
            print("waiting for a collective", flush=True)
            time.sleep(600)
        if self._plan.then == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if self._plan.then == "raise":
            raise ValueError("an index is out of range")
