"""Sample in the training process, with a custom decoding loop over a transformers model.

In: requests in any order, all at once or as places become free. Out: completions as they finish.
Requests are sorted by length and decoded in batches; each prompt is computed once for all of its
samples. A common prefix of all prompts is computed once per call if padding may follow it: with
full attention, or as long as no row is longer than the sliding windows (of an iterator's requests:
with full attention alone). With recurrent layers, only
rows of equal length are batched. So are rows that may grow past a length at which the model's
rotary frequencies change, since all rows of a batch share these.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_selfplay.generation.batch_size import bytes_per_sequence, largest_batch
from trl_selfplay.generation.causal_forward import CausalForward
from trl_selfplay.generation.decode_batch import DecodeBatch, SharedPrefix, TokenChooser
from trl_selfplay.generation.generation_options import (
    check_generation_config,
    collect_eos_token_ids,
)
from trl_selfplay.generation.model_traits import (
    ModelTraits,
    describe_model,
    input_device,
    sampling_state,
)
from trl_selfplay.generation.quantized_layers import prepare_quantized_layers
from trl_selfplay.generation.request_queue import RequestQueue, queue_checked
from trl_selfplay.generation.sampler import (
    Requests,
    SampledCompletion,
    SampleRequest,
    SamplingOptions,
)
from trl_selfplay.generation.static_decoding import StaticDecoder
from trl_selfplay.memory import is_out_of_memory, return_freed_memory

__all__ = [
    "TransformersSampler",
    "check_generation_config",
    "collect_eos_token_ids",
    "prepare_quantized_layers",
]

logger = logging.getLogger(__name__)

_PATHS = {
    "inside": "full attention; a shared prefix and each prompt are computed once",
    "left": "sliding windows; each prompt is computed once, a shared prefix only within the window",
    "none": "recurrent layers; only prompts of equal length are batched, each computed once",
}
# A shorter common prefix (the first tokens of a chat template) costs more in copies than it saves.
_SHORTEST_SHARED_PREFIX = 16
# Joining caches copies both; from this share of free places on, fuller steps make up for it. So they do
# where one more row comes per this many that are decoded: of requests that come one by one, more may follow.
_REFILL_SHARE = 1 / 4
_ROWS_PER_LATE_ONE = 8


class TransformersSampler:
    """The in-process `Sampler`.

    At temperature 0, `logprob` is that of the softmax of the logits after the repetition penalty.

    A completion also ends with "length" if prompt and completion fill the model's context.

    Args:
        model: The model, or a function that returns it (a trainer wraps its model anew in every
            round); wrapped by `accelerator` or not, with or without a PEFT adapter.
        tokenizer: Decodes text for stop strings; ids outside its vocabulary are never sampled.
        accelerator: The trainer's accelerator, for unwrapping and mixed precision.
        pad_token_id: Pads shorter prompts, masked; by default the tokenizer's, or else 0.
        traits: The model's traits from `try_model`; by default they are read without a trial.
        cuda_graphs: Decode through CUDA graphs on a CUDA device, if the model allows it.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator | None = None,
        pad_token_id: int | None = None,
        traits: ModelTraits | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self._model = model
        self._tried = traits
        self._tokenizer = tokenizer
        self._accelerator = accelerator
        if pad_token_id is None:
            pad_token_id = tokenizer.pad_token_id
        self._pad_token_id = 0 if pad_token_id is None else pad_token_id
        self._token_ids = frozenset(tokenizer.get_vocab().values())
        self._described: tuple[nn.Module, ModelTraits] | None = None
        self._fitting: tuple[int, int] | None = None  # batch size and length after running out
        # Weights that are sharded between processes are gathered anew for each call.
        whole = accelerator is None or accelerator.distributed_type in (
            DistributedType.NO,
            DistributedType.MULTI_GPU,
        )
        self._static = StaticDecoder() if cuda_graphs and whole else None

    def suggest_batch_size(self, longest_prompt: int, max_completion_length: int) -> int:
        """Return how many sequences of this length in tokens fit in memory at once, at least 1.

        Compares keys and values, activations of the prompt and logits with half of the free memory.
        On a CPU, keys and values take at most as much as the weights, or 256 MiB. For CUDA graphs,
        those of the prompt count twice: in the graphs' buffers, and as new rows on their way there.
        """
        model, traits = self._unwrapped(), self._traits()
        device = input_device(model)
        graphs = self._static is not None and self._static.takes(model, traits)
        each = bytes_per_sequence(traits, longest_prompt, max_completion_length, graphs)
        return largest_batch(
            traits,
            longest_prompt + max_completion_length,
            sum(p.nbytes for p in model.parameters()),
            each,
            _free_bytes(device),
            on_cpu=device.type == "cpu",
        )

    def sample(
        self,
        requests: Requests,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield `(request index, completion)` as completions finish, each request once.

        An iterator of requests is pulled as places become free: see `Sampler.sample`. Tokens are
        those that the same requests get in a sequence. What the first prompts of an iterator have in
        common is computed once for all prompts that begin so.

        Between two completions, too, the model is in eval mode: train only after the iterator has
        ended or was closed.

        Raises:
            ValueError: An option is out of range, a prompt is empty or fills the model's context,
                or the model can't be sampled from; before anything is sampled, but for prompts of
                an iterator.
            RuntimeError: The model's logits are NaN, its forward ignores the cache, one sequence
                alone doesn't fit in memory (more than one are tried in halves), or an iterator gave
                None when nothing was in progress.
        """
        traits = self._traits()
        queue = queue_checked(requests, options, batch_size, traits.context_length)
        return self._sample_checked(queue, options, batch_size, traits, on_tokens)

    def _sample_checked(
        self,
        queue: RequestQueue,
        options: SamplingOptions,
        batch_size: int,
        traits: ModelTraits,
        on_tokens: Callable[[int], None] | None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        if not queue.has_more(batch_size, is_decoding=False):
            return
        with sampling_state(self._wrapped(), self._accelerator) as model:
            autocast = None if self._accelerator is None else self._accelerator.autocast
            longest = queue.first.longest(options)
            if self._static is not None and self._static.takes(model, traits):
                rows = min(batch_size, len(queue.requests))
                forward = self._static.build_forward(model, traits, autocast, rows, longest + 1)
            else:
                forward = CausalForward(model, traits, autocast)
            chooser = TokenChooser(options, self._token_ids)
            prefix = None
            if traits.padding == "inside" or (
                queue.is_complete and (traits.window or 0) >= longest
            ):
                prompts = [
                    r.prompt_ids for r in queue.requests if not _passes_switch(r, traits, options)
                ]
                with torch.no_grad():
                    prefix = _build_prefix(forward, prompts)
            while queue:
                longest = queue.first.longest(options)
                if self._fitting is not None and longest >= self._fitting[1]:
                    batch_size = min(batch_size, self._fitting[0])
                started: dict[int, SampleRequest] = {}
                decoding = self._decode(
                    queue, started, forward, chooser, options, prefix, batch_size, on_tokens
                )
                try:
                    for index, sampled in decoding:
                        del started[index]
                        yield index, sampled
                except RuntimeError as error:
                    self.release()  # for memory, and for what NaN may have left in buffers
                    if not is_out_of_memory(error) or len(started) == 1:
                        raise
                    batch_size = len(started) // 2
                    self._fitting = (batch_size, longest)
                    logger.warning(
                        "out of memory with %d sequences at once; continuing with %d. The error: %s",
                        len(started),
                        batch_size,
                        str(error).strip().split("\n")[0],
                    )
                # The unfinished ones are sampled again: their streams give the same tokens.
                queue.put_back(started)
                if started:
                    return_freed_memory()
                queue.has_more(batch_size, is_decoding=False)

    def _decode(
        self,
        queue: RequestQueue,
        started: dict[int, SampleRequest],
        forward: CausalForward,
        chooser: TokenChooser,
        options: SamplingOptions,
        prefix: SharedPrefix | None,
        batch_size: int,
        on_tokens: Callable[[int], None] | None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Decode from the queue until no row is left, moving requests to `started` as they begin.

        The cache is freed when this ends, before the next batch begins.
        """
        traits = forward.traits
        # Inner padding behind a shared prefix and windows: a refilled row's window would be shifted.
        refills = traits.takes_position_ids and (
            traits.padding == "inside" or (traits.padding == "left" and prefix is None)
        )
        first = queue.first
        passes_switch = _passes_switch(first, traits, options)
        if passes_switch:
            prefix, refills = None, False
        elif prefix is not None and not prefix.begins(first.prompt_ids):
            prefix = None  # a request that came later
        equal_lengths = passes_switch or traits.padding == "none"

        def goes_along(request: SampleRequest) -> bool:
            if equal_lengths:
                return len(request.prompt_ids) == len(first.prompt_ids)
            begins_alike = prefix is None or prefix.begins(request.prompt_ids)
            return begins_alike and not _passes_switch(request, traits, options)

        def build_batch(count: int) -> DecodeBatch | None:
            taken = queue.take(count, goes_along)
            if not taken:
                return None
            chosen = [(index, queue.requests[index]) for index in taken]
            started.update(chosen)
            return DecodeBatch(
                chosen, forward, chooser, options, self._tokenizer, self._pad_token_id, prefix,
                on_tokens,
            )  # fmt: skip

        # Gradients are off only while the model runs: the caller's code between two completions,
        # and that which makes requests, keeps its own mode.
        with torch.no_grad():
            if passes_switch and not traits.rope_restarts:
                forward.forget_lengths()
            batch = build_batch(batch_size)
            assert batch is not None  # of `first` at least
        while num_decoding := batch.num_unfinished:
            free = batch_size - num_decoding
            has_room = refills and _REFILL_SHARE * batch_size <= free < batch_size
            refill_now = has_room and queue.has_more(free, is_decoding=True)
            if queue.is_open and num_decoding > _ROWS_PER_LATE_ONE * len(queue):
                refill_now = False
            with torch.no_grad():
                if refill_now and (fresh := build_batch(free)) is not None:
                    batch.refill(fresh)
                finished = batch.advance(one_step=has_room and queue.is_open)
            yield from finished

    def release(self) -> None:
        """Free the buffers and captured steps of CUDA graphs."""
        if self._static is not None:
            self._static.release()

    def _wrapped(self) -> nn.Module:
        return self._model if isinstance(self._model, nn.Module) else self._model()

    def _unwrapped(self) -> Any:
        model = self._wrapped()
        return model if self._accelerator is None else self._accelerator.unwrap_model(model)

    def _traits(self) -> ModelTraits:
        """Return the model's traits, read once per model."""
        if self._tried is not None:
            return self._tried
        model = self._unwrapped()
        if self._described is None or self._described[0] is not model:
            self._described = (model, describe_model(model))
            logger.info("%s: %s.", type(model).__name__, _PATHS[self._described[1].padding])
        return self._described[1]


def _passes_switch(request: SampleRequest, traits: ModelTraits, options: SamplingOptions) -> bool:
    """Return whether a row may grow past the length at which rotary frequencies change."""
    return traits.rope_switch is not None and request.longest(options) > traits.rope_switch


def _build_prefix(
    forward: CausalForward, prompts: Sequence[tuple[int, ...]]
) -> SharedPrefix | None:
    """Compute the common prefix of all prompts, or return None if that doesn't pay off."""
    distinct = set(prompts)
    if len(distinct) < 2:
        return None
    # The common prefix of all is that of the first and last in lexical order.
    first, last = min(distinct), max(distinct)
    common = 0
    while common < min(len(first), len(last)) and first[common] == last[common]:
        common += 1
    # Every prompt keeps at least one token, whose logits start the completion.
    length = min(common, min(map(len, distinct)) - 1)
    if length < _SHORTEST_SHARED_PREFIX:
        return None
    cache = forward.new_cache()
    input_ids = torch.tensor([first[:length]]).to(forward.device)
    positions = torch.arange(length)[None].to(forward.device)
    forward.next_logits(input_ids, cache, positions, None)
    return SharedPrefix(first[:length], cache)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        share = torch.cuda.get_per_process_memory_fraction(device)  # of a card that others use, too
        free = max(0, min(free, int(share * total) - reserved))
        # Memory that torch has reserved but doesn't use is available as well.
        return free + reserved - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available
