"""Rows that are decoded together: one cache, one token per row and step; finished rows leave.

In: requests and a model. Out: `(request index, SampledCompletion)` as rows finish.
transformers_sampler.py chooses which rows go together.

Shapes: B rows, S cached columns, V logits.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from trl_selfplay.generation.buffered_cache import drop_leading, join_caches, keep_columns
from trl_selfplay.generation.causal_forward import CausalForward
from trl_selfplay.generation.random_streams import gumbel_noise, token_words
from trl_selfplay.generation.sampler import (
    SampledCompletion,
    SampleRequest,
    SamplingOptions,
)
from trl_selfplay.generation.stop_strings import CompletionEnd
from trl_selfplay.generation.token_filters import excluded_ids, filter_logits

# Dropping rows copies the cache once, which costs about as much as growing it twice. At this share
# of finished rows, the following steps soon make up for it.
_DROP_SHARE = 1 / 8


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The common prefix of all prompts, and a cache of one row that holds it."""

    token_ids: tuple[int, ...]
    cache: DynamicCache

    def begins(self, prompt_ids: tuple[int, ...]) -> bool:
        """Return whether a prompt begins so, and goes on."""
        length = len(self.token_ids)
        return len(prompt_ids) > length and prompt_ids[:length] == self.token_ids


@dataclass(slots=True)
class _Row:
    request_index: int
    stream_key: int
    prompt_ids: tuple[int, ...]
    end: CompletionEnd
    completion_ids: list[int] = field(default_factory=list)
    is_finished: bool = False


class TokenChooser:
    """Chooses the next token of each row: greedily, or by Gumbel noise over the filtered logits.

    Args:
        options: Sampling options of all rows.
        token_ids: Ids in the tokenizer's vocabulary. Other ids (padding of the embedding) are never
            chosen, unless they end a completion.
    """

    def __init__(self, options: SamplingOptions, token_ids: Collection[int]) -> None:
        self._options = options
        self._token_ids = token_ids
        self._excluded: torch.Tensor | None = None
        self._words: torch.Tensor | None = None

    def choose(
        self,
        logits: torch.Tensor,
        keys: Sequence[int],
        steps: Sequence[int],
        seen: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return token ids (B,), -1 if the logits are NaN, and their log-probs (B,) if requested.

        Args:
            logits: Float32 (B, V); may be changed in place.
            keys: Stream key of each row.
            steps: Number of tokens that each row's completion already has.
            seen: Tokens of each row's prompt and completion, bool (B, V), for the penalty.
        """
        options = self._options
        if self._words is None or self._excluded is None:
            vocab_size = logits.shape[1]
            self._words = token_words(vocab_size, logits.device)
            excluded = excluded_ids(vocab_size, self._token_ids, options)
            self._excluded = torch.tensor(excluded, dtype=torch.long).to(logits.device)
        if self._excluded.numel() > 0:
            logits.index_fill_(1, self._excluded, -torch.inf)
        logits = filter_logits(logits, options, seen)
        if options.temperature == 0.0:
            scores = logits
        else:
            # The argmax of logits plus Gumbel noise is a draw from their softmax.
            scores = gumbel_noise(self._words, keys, steps).add_(logits)
        best, tokens = scores.max(dim=-1)
        logprobs = None
        if options.return_logprobs:
            logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
        # `max` propagates NaN. The caller reports it once the tokens are on the CPU.
        return tokens.masked_fill(best.isnan(), -1), logprobs


class DecodeBatch:
    """The state of one batch of rows that are decoded together.

    Args:
        requests: `(index, request)` per row; rows with equal prompts are adjacent.
        forward: The model.
        chooser: Chooses tokens by `options`.
        options: Sampling options of all rows.
        tokenizer: Decodes the text that is searched for stop strings.
        pad_token_id: Pads shorter prompts on the left, masked.
        prefix: The common prefix of all prompts, or None.
        on_tokens: Called after every step with the number of tokens that it added to completions.
    """

    def __init__(
        self,
        requests: Sequence[tuple[int, SampleRequest]],
        forward: CausalForward,
        chooser: TokenChooser,
        options: SamplingOptions,
        tokenizer: PreTrainedTokenizerBase,
        pad_token_id: int,
        prefix: SharedPrefix | None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self._on_tokens = on_tokens
        self._forward = forward
        self._chooser = chooser
        self._options = options
        self._rows = [self._build_row(index, request, tokenizer) for index, request in requests]
        self._last_position = self._find_last_position(max(r.longest(options) for _, r in requests))
        self._seen: torch.Tensor | None = None
        self._logprobs: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None  # (B,), chosen but not yet fed to the model
        self._runs_ahead = _can_run_ahead(forward)
        self._prefill([request.prompt_ids for _, request in requests], pad_token_id, prefix)

    def _build_row(
        self, index: int, request: SampleRequest, tokenizer: PreTrainedTokenizerBase
    ) -> _Row:
        context_length = self._forward.traits.context_length
        end = CompletionEnd(tokenizer, self._options, request, context_length)
        return _Row(index, request.stream_key, request.prompt_ids, end)

    def _find_last_position(self, longest: int) -> int | None:
        """Return the last valid position of any row, including finished ones, or None."""
        traits = self._forward.traits
        limits = [traits.context_length]
        # A finished row that runs on must not switch the frequencies of the rows beside it.
        if traits.rope_switch is not None and longest <= traits.rope_switch:
            limits.append(traits.rope_switch)
        return min((limit - 1 for limit in limits if limit is not None), default=None)

    def _prefill(
        self,
        prompts: Sequence[tuple[int, ...]],
        pad_token_id: int,
        prefix: SharedPrefix | None,
    ) -> None:
        """Compute each distinct prompt once, and repeat its state for its samples."""
        device = self._forward.device
        distinct = list(dict.fromkeys(prompts))
        prefix_length = len(prefix.token_ids) if prefix is not None else 0
        rests = [prompt[prefix_length:] for prompt in distinct]
        width = max(map(len, rests))
        pads = [width - len(rest) for rest in rests]
        input_ids = torch.tensor(
            [[pad_token_id] * pad + list(rest) for pad, rest in zip(pads, rests, strict=True)]
        ).to(device)  # (U, width)
        # The mask covers the completion too, so that a step takes a slice and concatenates nothing.
        total = prefix_length + width + self._options.max_completion_length
        mask = torch.ones((len(rests), total), dtype=torch.long)
        for row, pad in enumerate(pads):
            mask[row, prefix_length : prefix_length + pad] = 0
        self._length = prefix_length + width  # S
        # Positions count unmasked tokens: padding may lie between the prefix and the rest.
        positions = (mask[:, : self._length].cumsum(dim=1) - 1).clamp_(min=0)[:, prefix_length:]
        self._mask = mask.to(device) if any(pads) else None
        self._cache: Any  # its stubs want a LongTensor, which no torch function returns
        if prefix is None:
            self._cache = self._forward.new_cache()
        else:
            # One row per distinct prompt; the prefix itself stays for later batches.
            self._cache = copy.deepcopy(prefix.cache)
            self._cache.reorder_cache(torch.zeros(len(rests), dtype=torch.long, device=device))
        self._logits = self._forward.next_logits(
            input_ids, self._cache, positions.to(device), self._current_mask()
        )
        self._positions = torch.tensor([len(prompt) for prompt in distinct]).to(device)  # (B,)
        if len(distinct) < len(prompts):
            # From distinct prompts to samples: repeat cache, logits and positions.
            place = {prompt: row for row, prompt in enumerate(distinct)}
            self._select(torch.tensor([place[prompt] for prompt in prompts]).to(device))
        if self._options.repetition_penalty != 1.0:
            self._seen = _token_mask(prompts, self._logits)

    def advance(self, one_step: bool = False) -> list[tuple[int, SampledCompletion]]:
        """Decode until at least one row finishes; return the finished rows, or nothing at the end.

        Args:
            one_step: Return after a step, whether a row has finished or not.

        Raises:
            RuntimeError: The model's logits are NaN.
        """
        finished: list[tuple[int, SampledCompletion]] = []
        while not finished and self._rows:
            finished = self._decode_one()
            if one_step:
                break
        return finished

    @property
    def num_unfinished(self) -> int:
        """The number of unfinished rows."""
        return sum(not row.is_finished for row in self._rows)

    def refill(self, other: "DecodeBatch") -> None:
        """Move the rows of a batch that has only been prefilled into this one.

        No row of either may pass the model's `rope_switch`.

        The shorter of the two caches is padded on the left, masked, to the length of the other. That
        is exact for full attention, and for sliding windows over rows without inner padding.
        """
        # Bring this batch to the state of a prefilled one: only unfinished rows, and their last tokens
        # in the cache.
        self._drop_finished()
        if self._tokens is not None:
            self._feed(self._tokens)
            self._tokens = None
        # Make room: drop columns that no remaining row sees.
        masks = [self._full_mask(), other._full_mask()]
        if self._forward.traits.padding == "inside":
            seen = masks[0].any(dim=0)
            if not seen.all():
                keep_columns(self._cache, seen)
                masks[0] = masks[0][:, seen]
        else:  # windows count columns, so only the leading ones can go
            leading = int(masks[0].any(dim=0).int().argmax())
            if leading > 0:
                drop_leading(self._cache, leading)
                masks[0] = masks[0][:, leading:]
        self._length = max(mask.shape[1] for mask in masks)
        room = self._options.max_completion_length
        # Pad the shorter mask on the left, and add room for completions on the right. One column
        # more, since finished rows stay for some steps and are still fed.
        self._mask = torch.cat(
            [
                torch.nn.functional.pad(
                    torch.nn.functional.pad(mask, (self._length - mask.shape[1], 0)),
                    (0, room + 1),
                    value=1,
                )
                for mask in masks
            ]
        )
        join_caches(self._cache, other._cache)
        self._rows += other._rows
        self._positions = torch.cat([self._positions, other._positions])
        self._logits = torch.cat([self._logits, other._logits])
        if self._seen is not None and other._seen is not None:
            self._seen = torch.cat([self._seen, other._seen])
        if self._logprobs is not None:
            fresh = self._logprobs.new_zeros(len(other._rows))
            self._logprobs = torch.cat([self._logprobs, fresh])

    def _full_mask(self) -> torch.Tensor:
        """Return the mask of the cached columns, (B, S), even if nothing is masked."""
        if self._mask is not None:
            return self._mask[:, : self._length]
        shape = (len(self._rows), self._length)
        return torch.ones(shape, dtype=torch.long, device=self._positions.device)

    def _decode_one(self) -> list[tuple[int, SampledCompletion]]:
        # Tokens are fed here and not when they are chosen, so that finished rows are returned before
        # the next forward. A device that computes by itself is given that forward at once.
        if self._tokens is not None:
            self._feed(self._tokens)
        tokens, logprobs = self._chooser.choose(
            self._logits,
            [row.stream_key for row in self._rows],
            [len(row.completion_ids) for row in self._rows],
            self._seen,
        )
        if logprobs is not None:
            self._logprobs = logprobs if self._logprobs is None else self._logprobs + logprobs
        read = _start_reading(tokens)
        if self._runs_ahead:
            self._feed(tokens)
        else:
            self._tokens = tokens
        # The only synchronization with the device per step.
        token_list = read()
        if self._on_tokens is not None:
            self._on_tokens(self.num_unfinished)
        finished: list[tuple[int, SampledCompletion]] = []
        for place, (row, token) in enumerate(zip(self._rows, token_list, strict=True)):
            if row.is_finished:
                continue
            if token < 0:
                raise RuntimeError(
                    f"the model's logits are NaN at token {len(row.completion_ids)} of the completion "
                    f"of request {row.request_index}. Its weights may have diverged, or float16 "
                    "overflows: lower the learning rate or use bfloat16."
                )
            row.completion_ids.append(token)
            finish = row.end.find(row.completion_ids)
            if finish is not None:
                row.is_finished = True
                logprob = None if self._logprobs is None else float(self._logprobs[place])
                finished.append(
                    (
                        row.request_index,
                        SampledCompletion(tuple(row.completion_ids), finish, logprob),
                    )
                )
        num_finished = sum(row.is_finished for row in self._rows)
        if num_finished == len(self._rows):
            self._rows = []
            return finished
        if finished and num_finished >= _DROP_SHARE * len(self._rows):
            self._drop_finished()
        return finished

    def _feed(self, tokens: torch.Tensor) -> None:
        """Run the model on the chosen tokens, (B,)."""
        # Results of finished rows that are still in the batch are ignored, but their indices must be
        # valid, even after NaN logits or at the end of the context.
        tokens = tokens.clamp(min=0)
        positions = self._positions
        if self._last_position is not None:
            positions = positions.clamp(max=self._last_position)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        self._length += 1
        if self._restarts_here():
            self._compute_keys_again()
            return
        self._logits = self._forward.step(
            tokens.to(self._forward.device), self._cache, positions, self._current_mask()
        )
        self._positions = self._positions + 1

    def _restarts_here(self) -> bool:
        """Return whether the model switches its rotary frequencies at the tokens just chosen.

        Cached keys then have the old frequencies and must be computed again, as transformers does
        for Phi-3 (https://github.com/huggingface/transformers/pull/33129).
        """
        traits = self._forward.traits
        return traits.rope_restarts and any(
            len(row.prompt_ids) + len(row.completion_ids) - 1 == traits.rope_switch
            for row in self._rows
            if not row.is_finished
        )

    def _compute_keys_again(self) -> None:
        """Compute all tokens of equally long rows in one forward, into a new cache."""
        rows = [[*row.prompt_ids, *row.completion_ids] for row in self._rows]
        # Finished rows are shorter; their results are ignored.
        length = max(map(len, rows))
        input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        positions = torch.arange(length).expand(len(rows), length)
        device = self._forward.device
        self._cache = self._forward.new_cache()
        self._logits = self._forward.next_logits(
            input_ids.to(device), self._cache, positions.to(device), None
        )
        self._positions = self._positions + 1

    def _drop_finished(self) -> None:
        """Remove the finished rows from every tensor."""
        kept = [place for place, row in enumerate(self._rows) if not row.is_finished]
        if len(kept) < len(self._rows):
            self._rows = [self._rows[place] for place in kept]
            self._select(torch.tensor(kept).to(self._forward.device))

    def _select(self, index: torch.Tensor) -> None:
        """Repeat or select rows of the cache and of all other tensors, by index (B',)."""
        self._cache.reorder_cache(index)
        self._positions = self._positions[index]
        if self._mask is not None:
            self._mask = self._mask[index]
        # With layers on several devices, logits may be on another one than the input.
        beside = index.to(self._logits.device)
        self._logits = self._logits[beside]
        if self._tokens is not None:
            self._tokens = self._tokens[beside]
        if self._seen is not None:
            self._seen = self._seen[beside]
        if self._logprobs is not None:
            self._logprobs = self._logprobs[beside]

    def _current_mask(self) -> torch.Tensor | None:
        return None if self._mask is None else self._mask[:, : self._length]


def _can_run_ahead(forward: CausalForward) -> bool:
    """Return whether the forward on tokens can begin before it is known which rows they finish."""
    return forward.device.type == "cuda" and not forward.traits.rope_restarts


def _start_reading(tokens: torch.Tensor) -> Callable[[], list[int]]:
    """Copy tokens from the device before what is queued after this; return what waits for them."""
    if tokens.device.type != "cuda":
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    is_copied = torch.cuda.Event()
    is_copied.record(torch.cuda.current_stream(tokens.device))

    def read() -> list[int]:
        is_copied.synchronize()
        return host.tolist()

    return read


def _token_mask(prompts: Sequence[tuple[int, ...]], logits: torch.Tensor) -> torch.Tensor:
    """Return bool (B, V), True if a token occurs in the row's prompt."""
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor(prompt)
        seen[row, ids[ids < logits.shape[1]]] = True
    return seen.to(logits.device)
