"""Sample with a vLLM engine in a process of its own, which lives for one sampling phase.

In: requests as token ids, and the current weights as folders. Out: completions as they finish. The
engine is started by the first `sample` after a `release`, and `release` returns once it is gone and
the device's memory is free again. vLLM has its own scheduler: it joins requests with decoding ones,
and keeps the keys and values of prompts for their other samples.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from trl_selfplay.generation.engine import (
    SHARE_OF_FREE_MEMORY,
    EngineSettings,
    EngineWeights,
)
from trl_selfplay.generation.model_traits import ModelTraits
from trl_selfplay.generation.request_queue import RequestQueue, queue_checked
from trl_selfplay.generation.sampler import (
    Requests,
    SampledCompletion,
    SampleRequest,
    SamplingOptions,
)
from trl_selfplay.generation.stop_strings import CompletionEnd
from trl_selfplay.generation.vllm_process import EngineFailure, EngineProcess, engine_environment
from trl_selfplay.memory import return_freed_memory

__all__ = ["EngineFailure", "VLLMSampler"]

logger = logging.getLogger(__name__)

_MOST_SEQUENCES_ON_CPU = 64
_MOST_SEQUENCES_ON_DEVICE = 256
# What waits in the engine begins as soon as there is room, without a way to us and back.
_WAITING_IN_ENGINE = 2
# The sizes that vLLM takes as `max_lora_rank`, but for 1.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Below this, vLLM warms a temperature up to it.
_LEAST_TEMPERATURE = 0.01
# Ids with a bias that vLLM takes on a GPU.
_MOST_EXCLUDED = 1024
# After a failure, the next engine gets these shares of memory and sequences.
_MEMORY_AFTER_FAILURE, _SEQUENCES_AFTER_FAILURE = 0.8, 0.5
_USUAL_LENGTH = 1024  # tokens a sequence, for the size of the cache on a CPU
_MEMORY_PATIENCE_S = 60.0
_MEMORY_SLACK_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class _Room:
    """What an engine may use.

    Attributes:
        memory_share: Of the memory that the settings give it.
        num_sequences: Most sequences decoded together.
    """

    memory_share: float
    num_sequences: int


@dataclass(slots=True)
class _Row:
    """A request in the engine."""

    number: int
    request: SampleRequest
    end: CompletionEnd
    completion_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0


class VLLMSampler:
    """The `Sampler` that lets a vLLM engine decode, in an environment of its own.

    Samples have vLLM's random numbers, seeded by the stream key: they are other ones than those of
    `TransformersSampler`, from the same distribution. vLLM applies `min_p` before `top_k` and
    `top_p`, and transformers after, so with `min_p` and one of these the distribution may differ.

    If the engine ends, runs out of memory or hangs, it is started once more in the same phase, with
    less memory; what was unfinished is sampled again with the same seeds. The next phase has all
    of the memory again, unless the engine had run out of it. The replacement is another engine, which
    `on_restart` may check.

    Args:
        settings: How the engine is started.
        export: Returns the current weights; called at the start of every `sample`. With another
            `version` of an adapter, a running engine loads it; with another `model`, it is
            replaced.
        tokenizer: Decodes text for stop strings; ids outside its vocabulary are never sampled.
        traits: The model's traits.
        device: Where the trainer's model is, which the engine shares.
        announce: Gets a line before an engine starts, which may take minutes, and one after.

    Attributes:
        engine_record: `engine`, `version`, `dtype` and `quantization` of the last engine; None
            before the first.
        on_restart: Called amid a `sample` once another engine has replaced one that failed, before
            the new engine gets any of the requests. It may call `sample`; what it raises ends the
            `sample` that it interrupts.

    Raises:
        ValueError: On a GPU, the model has over 1,024 more ids than the tokenizer.
    """

    def __init__(
        self,
        settings: EngineSettings,
        export: Callable[[], EngineWeights],
        tokenizer: PreTrainedTokenizerBase,
        traits: ModelTraits,
        device: torch.device | str = "cpu",
        announce: Callable[[str], None] = logger.info,
    ) -> None:
        self._settings = settings
        self._export = export
        self._tokenizer = tokenizer
        self._traits = traits
        self._device = torch.device(device)
        self._announce = announce
        self._excluded = {*range(traits.vocab_size)} - {*tokenizer.get_vocab().values()}
        if self._device.type == "cuda" and len(self._excluded) > _MOST_EXCLUDED:
            raise ValueError(
                f"{len(self._excluded)} of the model's {traits.vocab_size} ids aren't in the "
                f"tokenizer's vocabulary; on a GPU, vLLM can exclude {_MOST_EXCLUDED} from sampling. "
                "Resize the embeddings (model.resize_token_embeddings(len(tokenizer))), or use "
                "use_vllm=False."
            )
        self._process: EngineProcess | None = None
        self._weights: EngineWeights | None = None
        self._adapter_number = 0  # of the last adapter; never one twice
        self._next_id = 0
        self._has_failed = False  # since the last release
        # Of the next phase, and of the next engine: less after a failure.
        self._usual_room = self._room = _Room(1.0, self._most_sequences())
        self._is_sampling = False
        self._memory_before = 0
        self.engine_record: dict[str, Any] | None = None
        self.on_restart: Callable[[], None] | None = None

    def suggest_batch_size(self, longest_prompt: int, max_completion_length: int) -> int:
        """Return how many requests the engine is given at once: twice what it decodes together.

        Whatever their length: an engine that has no memory left lets some of them wait.
        """
        return _WAITING_IN_ENGINE * self._room.num_sequences

    def sample(
        self,
        requests: Requests,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield `(request index, completion)` as completions finish, each request once.

        Args:
            requests: See `Sampler.sample`.
            options: See `Sampler.sample`.
            batch_size: Most requests in the engine at once, decoded or waiting there.
            on_tokens: See `Sampler.sample`. Without stop strings, an engine gives the completions of a
                sequence of requests as a whole.

        Raises:
            ValueError: An option is out of range, a prompt is empty or fills the model's context,
                or prompt and completion may be longer than the engine takes.
            EngineFailure: The engine can't be started, or has failed twice in this phase; the error
                has its last lines.
            RuntimeError: The model's logits are NaN, an iterator gave None when nothing was in
                progress, or another `sample` of this sampler hasn't ended.
        """
        queue = queue_checked(requests, options, batch_size, self._traits.context_length)
        if 0.0 < options.temperature < _LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature is {options.temperature}, and vLLM samples at {_LEAST_TEMPERATURE} at "
                "least. Use 0.0 (greedy) or a higher one."
            )
        return self._sample_checked(queue, options, batch_size, on_tokens)

    def _sample_checked(
        self,
        queue: RequestQueue,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        if not queue.has_more(batch_size, is_decoding=False):
            return
        if self._is_sampling:
            raise RuntimeError(
                "an engine serves one `sample` at a time; close the other one first."
            )
        self._is_sampling = True
        rows: dict[int, _Row] = {}
        try:
            self._check_length(queue.first, options, self._settings.max_model_length)
            weights = self._export()
            self._prepare_engine(weights)
            while True:
                free = batch_size - len(rows)
                queue.has_more(free, is_decoding=bool(rows))
                self._submit(queue.take(free, lambda _: True), queue, options, rows)
                if not rows:
                    return
                try:
                    news = self._running().receive()
                except EngineFailure as failure:
                    self._forget_engine()
                    self._allow_another_try(failure)
                    queue.put_back(row.number for row in rows.values())
                    rows.clear()
                    self._prepare_engine(weights)
                    if self.on_restart is not None:
                        self._is_sampling = False  # the new engine has nothing of this one yet
                        self.on_restart()
                        self._is_sampling = True
                    continue
                if on_tokens is not None:
                    on_tokens(sum(len(tokens) for name, tokens, *_ in news if name in rows))
                yield from self._read(news, rows, options)
        finally:
            self._is_sampling = False
            if rows and self._process is not None:
                self._process.send({"abort": [str(name) for name in rows]})

    def _submit(
        self,
        numbers: list[int],
        queue: RequestQueue,
        options: SamplingOptions,
        rows: dict[int, _Row],
    ) -> None:
        """Give requests to the engine, together."""
        added = []
        for number in numbers:
            request = queue.requests[number]
            self._check_length(request, options, self._running().ready["max_model_length"])
            end = self._end_of(request, options)
            self._next_id += 1
            rows[self._next_id] = _Row(number, request, end)
            # vLLM's seeds are signed 64-bit integers, of which -1 means none.
            seed = request.stream_key & (2**63 - 1)
            added.append([self._next_id, request.prompt_ids, seed, end.limit])
        if added:
            assert self._weights is not None
            adapter = self._weights.adapter
            self._running().send(
                {
                    "add": added,
                    "sampling": {
                        "temperature": options.temperature,
                        "top_p": options.top_p,
                        "top_k": options.top_k,
                        "min_p": options.min_p or 0.0,
                        "repetition_penalty": options.repetition_penalty,
                        "stop_token_ids": options.eos_token_ids,
                        # 0: of the sampled token alone
                        "logprobs": 0 if options.return_logprobs else None,
                    },
                    "excluded": sorted(self._excluded - {*options.eos_token_ids}),
                    # A stop string is looked for after every token, and so are more requests; else the
                    # end is soon enough.
                    "streams": bool(options.stop_strings) or queue.is_open,
                    "adapter": None if adapter is None else [self._adapter_number, str(adapter)],
                }
            )

    def _read(
        self, news: list[list[Any]], rows: dict[int, _Row], options: SamplingOptions
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield the completions that end with these tokens; end them in the engine too."""
        ended = []
        aborted = []
        for name, tokens, logprobs, is_finished in news:
            row = rows.get(name)
            if row is None:  # tokens behind the end of one that was aborted
                continue
            finish = None
            for place, token in enumerate(tokens):
                row.completion_ids.append(token)
                if logprobs is not None:
                    row.logprob += logprobs[place]
                finish = row.end.find(row.completion_ids)
                if finish is not None:
                    break
            if row.logprob != row.logprob:
                raise RuntimeError(
                    f"the log-prob of the completion of request {row.number} is NaN in the vLLM "
                    "engine. The model's weights may have diverged, or float16 overflows: lower the "
                    "learning rate or use bfloat16."
                )
            if finish is None and is_finished:
                raise RuntimeError(
                    f"the vLLM engine ended the completion of request {row.number} after "
                    f"{len(row.completion_ids)} of {row.end.limit} tokens, without EOS."
                )
            if finish is not None:
                del rows[name]
                logprob = row.logprob if options.return_logprobs else None
                completion = SampledCompletion(tuple(row.completion_ids), finish, logprob)
                ended.append((row.number, completion))
                if not is_finished:
                    aborted.append(str(name))
        if aborted:
            self._running().send({"abort": aborted})
        yield from ended

    def release(self) -> None:
        """End the engine; return once its processes are gone and the device's memory is free.

        Raises:
            RuntimeError: A process can't be ended, or the memory isn't free within a minute.
        """
        self._has_failed = False
        self._room = self._usual_room
        if self._process is not None:
            self._end_engine()

    def _running(self) -> EngineProcess:
        assert self._process is not None
        return self._process

    def _end_engine(self) -> None:
        process = self._running()
        self._forget_engine()
        # One process leaves nothing to tidy; several share memory by name.
        process.end(at_once=self._settings.tensor_parallel_size == 1)
        self._check_memory()

    def _forget_engine(self) -> None:
        self._process = self._weights = None

    def _most_sequences(self) -> int:
        """Return how many sequences an engine without failures decodes together."""
        if self._settings.max_num_seqs is not None:
            return self._settings.max_num_seqs
        on_cpu = self._device.type == "cpu"
        return _MOST_SEQUENCES_ON_CPU if on_cpu else _MOST_SEQUENCES_ON_DEVICE

    def _end_of(self, request: SampleRequest, options: SamplingOptions) -> CompletionEnd:
        return CompletionEnd(self._tokenizer, options, request, self._traits.context_length)

    def _check_length(
        self, request: SampleRequest, options: SamplingOptions, most: int | None
    ) -> None:
        """Raise ValueError if a request may grow past what the engine takes."""
        length = len(request.prompt_ids) + self._end_of(request, options).limit
        if most is not None and length > most:
            raise ValueError(
                f"a prompt of {len(request.prompt_ids)} tokens and its completion may have {length} "
                f"tokens, and the vLLM engine takes {most}. Raise `vllm_max_model_length`, or "
                "`vllm_gpu_memory_utilization` if that is what fits in its memory; or lower "
                "`max_completion_length`."
            )
        switch = self._traits.rope_switch
        if switch is not None and length > switch:
            raise ValueError(
                f"a prompt of {len(request.prompt_ids)} tokens and its completion may pass {switch} "
                "tokens, at which the model's rotary frequencies change; vLLM takes those of the "
                "longer sequences for all. Lower `max_completion_length`, or use `use_vllm=False`."
            )

    def _prepare_engine(self, weights: EngineWeights) -> None:
        """Have an engine with these weights, trying twice to start one."""
        current = self._weights
        if current is not None and _base_of(current) != _base_of(weights):
            self._end_engine()
        while self._process is None:
            try:
                self._start(weights)
            except EngineFailure as failure:
                self._allow_another_try(failure)
        if current is None or current.version != weights.version:
            self._adapter_number += 1
        self._weights = weights

    def _allow_another_try(self, failure: EngineFailure) -> None:
        """Lower the memory for another engine.

        Raises:
            EngineFailure: This one, if it is the second, or a sign of what won't pass.
        """
        if self._has_failed or not failure.may_pass:
            raise failure
        self._has_failed = True
        self._check_memory()
        self._room = _Room(
            self._room.memory_share * _MEMORY_AFTER_FAILURE,
            max(1, int(self._room.num_sequences * _SEQUENCES_AFTER_FAILURE)),
        )
        if failure.out_of_memory:  # so would the next phase's first engine
            self._usual_room = self._room
        logger.warning(
            "%s\nStarting another engine with %.0f %% of the memory and max_num_seqs=%d; what was "
            "unfinished is sampled again.",
            failure,
            100 * self._room.memory_share,
            self._room.num_sequences,
        )

    def _start(self, weights: EngineWeights) -> None:
        settings = self._settings
        self._announce(f"starting a vLLM engine with {weights.model}: takes up to minutes")
        return_freed_memory()
        began = time.monotonic()
        self._memory_before = self._free_memory()
        self._process = EngineProcess(
            settings.python,
            self._engine_arguments(weights),
            engine_environment(settings.python, self._device, settings.tensor_parallel_size),
            settings.start_patience_s,
            settings.step_patience_s,
        )
        ready = self._process.ready
        self.engine_record = {
            "engine": "vllm",
            "version": ready["version"],
            "dtype": ready["dtype"],
            "quantization": ready["quantization"],
        }
        self._announce(f"vLLM {ready['version']} started in {time.monotonic() - began:.0f} s")

    def _engine_arguments(self, weights: EngineWeights) -> dict[str, Any]:
        """Return the arguments of `EngineArgs`."""
        settings, traits = self._settings, self._traits
        on_cpu = self._device.type == "cpu"
        length = settings.max_model_length
        if traits.rope_switch is not None:
            length = min(length or traits.rope_switch, traits.rope_switch)
        arguments: dict[str, Any] = {
            "model": weights.model,
            "revision": weights.revision,
            "trust_remote_code": settings.trust_remote_code,
            "dtype": settings.dtype,
            "quantization": settings.quantization,
            "gpu_memory_utilization": self._room.memory_share * self._utilization(),
            "max_model_len": length or -1,  # -1: as much of the model's context as fits
            "tensor_parallel_size": settings.tensor_parallel_size,
            "max_num_seqs": self._room.num_sequences,
            "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            # Tokens go in and out, and nothing of the model's generation config counts.
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "disable_log_stats": True,
            "seed": 0,
        }
        if on_cpu:
            arguments["kv_cache_memory_bytes"] = self._cache_bytes()
            # After a part of a prompt, vLLM 0.32 sets a seed's generator back, which those on a CPU
            # can't. Remove when gpu_model_runner.py no longer calls `set_offset` there.
            arguments["enable_chunked_prefill"] = False
        if weights.adapter is not None:
            fitting = [rank for rank in _LORA_RANKS if rank >= weights.adapter_rank]
            arguments |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": min(fitting, default=weights.adapter_rank),
            }
        return {**arguments, **settings.engine_arguments}

    def _utilization(self) -> float:
        """Return the share of the device's whole memory that the engine may use."""
        most = 1.0
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            most = SHARE_OF_FREE_MEMORY * free / total
        return min(self._settings.gpu_memory_utilization, most)

    def _cache_bytes(self) -> int:
        """Return the size of the cache on a CPU: what the sequences are likely to need.

        vLLM would take a share of the whole memory, which other processes use as well.
        """
        longest = self._settings.max_model_length or self._traits.context_length or _USUAL_LENGTH
        # The engine's numbers may be twice as wide as the trainer's: one sequence fits in any case.
        tokens = max(2 * longest, self._room.num_sequences * min(longest, _USUAL_LENGTH))
        available = psutil.virtual_memory().available
        most = self._settings.gpu_memory_utilization * available
        return int(self._room.memory_share * min(self._traits.bytes_per_token * tokens, most))

    def _free_memory(self) -> int:
        """Return the device's free bytes, as if this process had reserved nothing; 0 on a CPU."""
        if self._device.type != "cuda":
            return 0
        return torch.cuda.mem_get_info(self._device)[0] + torch.cuda.memory_reserved(self._device)

    def _check_memory(self) -> None:
        """Wait until the device's memory is as free as before the engine."""
        ends = time.monotonic() + _MEMORY_PATIENCE_S
        while (lacking := self._memory_before - self._free_memory()) > _MEMORY_SLACK_BYTES:
            if time.monotonic() >= ends:
                raise RuntimeError(
                    f"the vLLM engine's processes have ended, but {lacking / 2**30:.1f} GiB more of "
                    f"{self._device} are in use than before. If another program has taken them, end "
                    "it; then resume the run."
                )
            time.sleep(0.1)


def _base_of(weights: EngineWeights) -> tuple[str, str | None, bool, int]:
    """Return what an engine can't change while it runs."""
    return weights.model, weights.revision, weights.adapter is not None, weights.adapter_rank
