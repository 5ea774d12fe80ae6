"""Sample with a running vLLM server, over its OpenAI-compatible interface with adapters from disk.

In: requests as token ids, and the current adapter as a folder that the server can read. Out:
completions as they finish. Each version of the weights is loaded under a name of its own, and the
one before is unloaded. Only the standard library is used.
"""

import http.client
import json
import logging
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from trl_selfplay.disk import RESUME
from trl_selfplay.generation.engine import EngineWeights
from trl_selfplay.generation.model_traits import ModelTraits
from trl_selfplay.generation.request_queue import SECONDS_BETWEEN_LOOKS, RequestQueue, queue_checked
from trl_selfplay.generation.sampler import (
    Requests,
    SampledCompletion,
    SampleRequest,
    SamplingOptions,
)
from trl_selfplay.generation.stop_strings import CompletionEnd
from trl_selfplay.generation.token_filters import excluded_ids

logger = logging.getLogger(__name__)

_START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank RANK "
    "--logprobs-mode processed_logprobs"
)
_AT_ONCE = 256
_MOST_TRIES = 4
_WAIT_S = 0.5
_REPLY_PATIENCE_S = 600.0
# A server that is starting, or a proxy before it, answers so.
_RETRIED = (429, 502, 503, 504)
_FORBIDDEN_BIAS = -100.0  # the interface's least


class ServerError(RuntimeError):
    """The server refuses a request; its answer is in the message."""


class VLLMServerSampler:
    """The `Sampler` that asks a vLLM server.

    Args:
        url: Address of the server, such as "http://localhost:8000".
        export: Returns the current weights; called at the start of every `sample`. Their adapter lies
            on a disk that the server can read under the same path.
        tokenizer: Decodes text for stop strings; ids outside its vocabulary are never sampled.
        traits: The model's traits.
        timeout_s: Seconds to wait for the server to be up.

    Attributes:
        engine_record: What the server says of itself: its version and the base model's name. It tells
            neither precision nor quantization.
        on_restart: Never called, as this sampler starts no server.

    Raises:
        ConnectionError: It isn't up in time.
    """

    def __init__(
        self,
        url: str,
        export: Callable[[], EngineWeights],
        tokenizer: PreTrainedTokenizerBase,
        traits: ModelTraits,
        timeout_s: float = 240.0,
    ) -> None:
        parts = urlsplit(url)
        self._url = url.rstrip("/")
        self._host, self._port = str(parts.hostname), parts.port
        self._path = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._export = export
        self._tokenizer = tokenizer
        self._traits = traits
        self._token_ids = frozenset(tokenizer.get_vocab().values())
        self.on_restart: Callable[[], None] | None = None
        self._loaded: str | None = None
        self._open: set[http.client.HTTPConnection] = set()
        self._wait_until_up(timeout_s)
        models = self._ask("GET", "/v1/models")["data"]
        self._base = str(next(m["id"] for m in models if m.get("parent") is None))
        self.engine_record: dict[str, Any] | None = {
            "engine": "vllm server",
            "version": str(self._ask("GET", "/version")["version"]),
            "model": self._base,
            "dtype": None,
            "quantization": None,
        }

    def suggest_batch_size(self, longest_prompt: int, max_completion_length: int) -> int:
        """Return how many requests are in progress at once; the server lets others wait."""
        return _AT_ONCE

    def sample(
        self,
        requests: Requests,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield `(request index, completion)` as completions finish: see `Sampler.sample`.

        Raises:
            ConnectionError: The server can't be reached, after some tries.
            ServerError: It refuses a request, for example to load the adapter.
            ValueError: An option is out of range, or a prompt is empty or fills the context.
        """
        pending = queue_checked(requests, options, batch_size, self._traits.context_length)
        return self._sample_checked(pending, options, batch_size, on_tokens)

    def _sample_checked(
        self,
        pending: RequestQueue,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        if not pending.has_more(batch_size, is_decoding=False):
            return
        self._load(self._export())
        body = self._body(options)
        finished: queue.SimpleQueue[tuple[int, SampledCompletion | Exception]] = queue.SimpleQueue()
        stop, num_running = threading.Event(), 0

        def ask(number: int) -> None:
            result: SampledCompletion | Exception
            try:
                result = self._complete(pending.requests[number], options, body, stop)
            except Exception as error:  # raised by whoever iterates
                result = error
            finished.put((number, result))

        with ThreadPoolExecutor(batch_size, thread_name_prefix="vllm-server") as pool:
            try:
                while True:
                    free = batch_size - num_running
                    pending.has_more(free, is_decoding=num_running > 0)
                    for number in pending.take(free, lambda _: True):
                        pool.submit(ask, number)
                        num_running += 1
                    if not num_running:
                        return
                    has_room = pending.is_open and num_running < batch_size
                    try:
                        number, result = finished.get(
                            timeout=SECONDS_BETWEEN_LOOKS if has_room else None
                        )
                    except queue.Empty:
                        continue
                    num_running -= 1
                    if isinstance(result, Exception):
                        raise result
                    if on_tokens is not None:
                        on_tokens(len(result.completion_ids))
                    yield number, result
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                self._hang_up()  # what is still in progress isn't wanted

    def release(self) -> None:
        """Unload the adapter from the server."""
        if self._loaded is None:
            return
        name, self._loaded = self._loaded, None
        try:
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except (OSError, ServerError) as error:
            logger.warning("%s still holds the adapter %s: %s", self._url, name, error)

    def _load(self, weights: EngineWeights) -> None:
        """Let the server have the current adapter, under a name that no other version had."""
        assert weights.adapter is not None  # the trainer refuses what isn't an adapter
        name = f"trl-selfplay-{weights.version}"
        if name == self._loaded:
            return
        self.release()
        body = {"lora_name": name, "lora_path": str(weights.adapter.resolve())}
        try:
            self._ask("POST", "/v1/load_lora_adapter", body)
        except ServerError as error:
            # A run that was killed may have left it; its content is the same.
            if "already" not in str(error):
                raise ServerError(
                    f"the server can't load the adapter (rank {weights.adapter_rank}) from "
                    f"{body['lora_path']}: {error} Start it with {_START}, on a machine that sees "
                    "this folder."
                ) from error
        self._loaded = name

    def _body(self, options: SamplingOptions) -> dict[str, Any]:
        excluded = excluded_ids(self._traits.vocab_size, self._token_ids, options)
        return {
            "model": self._loaded,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "min_p": options.min_p or 0.0,
            "repetition_penalty": options.repetition_penalty,
            "stop_token_ids": list(options.eos_token_ids),
            "stop": list(options.stop_strings),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "logit_bias": {str(token): _FORBIDDEN_BIAS for token in excluded},
            "logprobs": 0,
            "return_token_ids": True,
        }

    def _complete(
        self,
        request: SampleRequest,
        options: SamplingOptions,
        body: Mapping[str, Any],
        stop: threading.Event,
    ) -> SampledCompletion:
        end = CompletionEnd(self._tokenizer, options, request, self._traits.context_length)
        asked = {
            **body,
            "prompt": list(request.prompt_ids),
            "max_tokens": end.limit,
            # Signed 64-bit integers, as in phase mode.
            "seed": request.stream_key & (2**63 - 1),
        }
        choice = self._ask("POST", "/v1/completions", asked, stop)["choices"][0]
        token_ids = choice.get("token_ids")
        if token_ids is None:
            raise ServerError("the server returns no token ids; it needs vLLM 0.32 or later.")
        logprobs = choice["logprobs"]["token_logprobs"]
        ids: list[int] = []
        for token in token_ids:
            ids.append(token)
            if (finish := end.find(ids)) is not None:
                logprob = sum(logprobs[: len(ids)]) if options.return_logprobs else None
                return SampledCompletion(tuple(ids), finish, logprob)
        raise ServerError(
            f"the server ended a completion after {len(ids)} of {end.limit} tokens without EOS or "
            f"stop string ({choice.get('finish_reason')}): {ids[-8:]}."
        )

    def _wait_until_up(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._send("GET", "/health", None, threading.Event())
                return
            except (OSError, http.client.HTTPException, ServerError) as error:
                if time.monotonic() >= deadline:
                    raise ConnectionError(
                        f"no vLLM server answers at {self._url} within vllm_server_timeout="
                        f"{timeout_s:g} s ({error}). Start one with {_START}, or set "
                        "vllm_server_base_url."
                    ) from error
            time.sleep(min(_WAIT_S, max(0.0, deadline - time.monotonic())))

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Any:
        """Return the server's answer, after some tries where it can't be reached.

        Once `stop` is set, the answer isn't wanted: nothing more is sent.
        """
        stop = stop or threading.Event()
        for tries in range(1, _MOST_TRIES + 1):
            try:
                return self._send(method, path, body, stop)
            except (OSError, http.client.HTTPException) as error:
                if tries == _MOST_TRIES or stop.is_set():
                    raise ConnectionError(
                        f"the vLLM server at {self._url} can't be reached ({error!r}). Finished shards "
                        f"are kept: start it again, and {RESUME}."
                    ) from error
            stop.wait(_WAIT_S * 2**tries)
        raise AssertionError("unreachable")

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, stop: threading.Event
    ) -> Any:
        if self._tls is None:
            connection = http.client.HTTPConnection(
                self._host, self._port, timeout=_REPLY_PATIENCE_S
            )
        else:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=_REPLY_PATIENCE_S, context=self._tls
            )
        content = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        self._open.add(connection)
        try:
            connection.connect()
            # One that is set later finds this connection, and `_hang_up` closes it.
            if stop.is_set():
                raise ConnectionAbortedError("the answer isn't wanted any more")
            connection.request(method, self._path + path, content, headers)
            # Closed by itself: a response whose server ends the connection is no longer part of it.
            with connection.getresponse() as response:
                answer = response.read()
        finally:
            self._open.discard(connection)
            connection.close()
        if response.status in _RETRIED:
            raise ConnectionError(f"status {response.status}")
        if response.status != 200:
            raise ServerError(
                f"{path} answers {response.status}: {answer[:500].decode(errors='replace')}"
            )
        with suppress(ValueError):
            return json.loads(answer)
        return answer.decode()  # of /health, and of adapters that were loaded

    def _hang_up(self) -> None:
        for connection in list(self._open):
            with suppress(OSError, AttributeError):  # it has ended, or has not begun
                connection.sock.shutdown(socket.SHUT_RDWR)
