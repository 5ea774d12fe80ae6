"""A server with those parts of vLLM's interface that server mode uses, over a real model.

In: a folder with a base model. Out: completions of the model with whatever adapter was loaded. What it
was asked is kept.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from chat_server import send, start
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler


class LoRAServer:
    """A running server.

    Attributes:
        url: Its address.
        asked: (path, body) of each request, in order.
        adapters: Folder of each loaded adapter, by name.
        fail: Called with (path, body) before a request is served; returns a status other than 200, or
            None.
        ignores_adapters: Whether it goes on with the adapter that it loaded first.
    """

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.url = ""
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.adapters: dict[str, str] = {}
        self.fail: Callable[[str, dict[str, Any]], int | None] = lambda path, body: None
        self.ignores_adapters = False
        self._folder, self._tokenizer = folder, tokenizer
        self._samplers: dict[str, TransformersSampler] = {}
        self._lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            cards = [{"id": "base", "parent": None}]
            return {"data": [{"id": n, "parent": "base"} for n in self.adapters] + cards}
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                raise ValueError(f"The lora adapter '{body['lora_name']}' has already been loaded.")
            self.adapters[body["lora_name"]] = body["lora_path"]
            base = AutoModelForCausalLM.from_pretrained(self._folder)
            model = PeftModel.from_pretrained(base, body["lora_path"])
            sampler = TransformersSampler(model, self._tokenizer)
            if self.ignores_adapters and self._samplers:
                sampler = next(iter(self._samplers.values()))
            self._samplers[body["lora_name"]] = sampler
            return "Success"
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return "Success"
        if path == "/v1/completions":
            return self._complete(body)
        return ""

    def forget(self) -> None:
        """Be as after a restart."""
        self.adapters.clear()
        self._samplers.clear()

    def _complete(self, body: dict[str, Any]) -> Any:
        options = SamplingOptions(
            body["max_tokens"], body["temperature"], body["top_p"], body["top_k"],
            body["min_p"] or None, body["repetition_penalty"], tuple(body["stop_token_ids"]),
            tuple(body["stop"]), return_logprobs=True,
        )  # fmt: skip
        request = SampleRequest(tuple(body["prompt"]), body["seed"])
        with self._lock:
            [(_, sampled)] = self._samplers[body["model"]].sample([request], options, 1)
        logprobs = [sampled.logprob, *[0.0] * (len(sampled.completion_ids) - 1)]
        choice = {
            "token_ids": sampled.completion_ids,
            "finish_reason": "length" if sampled.finish == "length" else "stop",
            "logprobs": {"token_logprobs": logprobs},
        }
        return {"choices": [choice]}


@contextmanager
def serving_adapters(folder: Path, tokenizer: Any) -> Iterator[LoRAServer]:
    """Serve until the block ends."""
    state = LoRAServer(folder, tokenizer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            state.asked.append((self.path, body))
            if (status := state.fail(self.path, body)) is not None:
                send(self, b"it went wrong", status)
                return
            try:
                send(self, json.dumps(state.answer(self.path, body)).encode())
            except (ValueError, OSError, KeyError) as error:
                send(self, str(error).encode(), 400)

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    state.url, stop = start(Handler)
    try:
        yield state
    finally:
        stop()
