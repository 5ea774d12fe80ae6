"""Sample thoughts at many columns of a text in parallel, without gradients.

In: a text, the columns that think, and the key of each thought's random stream. Out: the tokens of
every thought. The text is computed once. Source: Quiet-STaR, arXiv 2403.09629, section 4.1 (parallel generation).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_selfplay.generation.random_streams import gumbel_noise, stream_key, token_words
from trl_selfplay.generation.sampler import Phase
from trl_selfplay.trainers.quiet_star.backbone import (
    bar,
    chunk_rows,
    embed,
    entropy,
    last_states,
    project,
)
from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout, ThoughtMemory, new_text_layout
from trl_selfplay.trainers.quiet_star.replaced_attention import thoughts_attend


@dataclass(frozen=True, slots=True)
class ThinkingColumns:
    """The columns of a batch that think.

    Attributes:
        columns: Text columns in ascending order, int64 (B, U). Shorter rows repeat their last column.
        is_real: False where `columns` is such a repetition, bool (B, U).
        positions: The position of each column in its text, not counting padding, int64 (B, U).
    """

    columns: torch.Tensor
    is_real: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class SampledThoughts:
    """The thoughts of a batch; block u·K + s is thought s of column u.

    Attributes:
        tokens: Sampled ids without start and end, int64 (B, U·K, n).
        entropies: Mean entropy in nats of the distributions that a thought's tokens were drawn from,
            float32 (B, U·K); 0 if n is 0.
    """

    tokens: torch.Tensor
    entropies: torch.Tensor


def can_think(
    labels: torch.Tensor, attention_mask: torch.Tensor, num_ahead_tokens: int
) -> torch.Tensor:
    """Return the columns j that can think, bool (B, S): j is text, and j+1 … j+n_true have labels."""
    labelled = (labels != -100) & attention_mask.bool()
    allowed = attention_mask.bool().clone()
    # Shift the labels left by 1 … n_true; columns past the end have none.
    for ahead in range(1, num_ahead_tokens + 1):
        allowed &= torch.nn.functional.pad(labelled, (0, ahead))[:, ahead:]
    return allowed


def predicted_tokens(labels: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return which of the tokens 1 … S − 1 have a label and follow text, bool (B, S − 1)."""
    return (labels[:, 1:] != -100) & attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()


def num_thinking(allowed: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the number of thinking columns per row: the fraction, rounded up, int64 (B,)."""
    # The small number keeps a product such as 100 · 0.07 = 7.000000000000001 from rounding up to 8.
    return (allowed.sum(1).double() * fraction - 1e-9).ceil().long()


def choose_columns(
    allowed: torch.Tensor,
    attention_mask: torch.Tensor,
    fraction: float,
    seed: int,
    step: int,
    phase: Phase,
    rows: Sequence[int],
) -> ThinkingColumns:
    """Choose the thinking columns of each row: all allowed ones, or a uniformly random subset.

    The subset is a function of (seed, step, phase, row, positions), so it doesn't depend on how
    rows are batched or padded.

    Args:
        allowed: Columns that can think (see `can_think`), bool (B, S).
        attention_mask: 1 on text, 0 on padding, (B, S).
        fraction: Share of the allowed columns to choose.
        seed: Seed of the run.
        step: Optimizer step.
        phase: "train" or "eval".
        rows: Index of each row among all rows of the step, over all processes.
    """
    text_positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    counts = num_thinking(allowed, fraction).tolist()
    width = max(1, *counts)
    columns = torch.zeros((len(allowed), width), dtype=torch.long)
    is_real = torch.zeros((len(allowed), width), dtype=torch.bool)
    for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
        candidates = allowed[b].nonzero().flatten().tolist()
        if count < len(candidates):
            # Sorting by a random key and taking the first ones draws a uniform subset.
            places = text_positions[b].tolist()
            candidates.sort(key=lambda j: stream_key(seed, step, phase, f"{row}/{places[j]}", -1))
            candidates = sorted(candidates[:count])
        if candidates:
            # Repeating the last column keeps anchors in ascending order, as layouts need.
            padded = candidates + candidates[-1:] * (width - count)
            columns[b] = torch.tensor(padded)
            is_real[b, :count] = True
    columns, is_real = columns.to(allowed.device), is_real.to(allowed.device)
    return ThinkingColumns(columns, is_real, text_positions.gather(1, columns))


def thought_keys(
    thinking: ThinkingColumns,
    num_thoughts: int,
    seed: int,
    step: int,
    phase: Phase,
    rows: Sequence[int],
) -> list[int]:
    """Return the stream key of each block, B·U·K keys of (seed, step, row, position, sample)."""
    return [
        stream_key(seed, step, phase, f"{row}/{position}", s)
        for row, positions in zip(rows, thinking.positions.tolist(), strict=True)
        for position in positions
        for s in range(num_thoughts)
    ]


@torch.no_grad()
def sample_thoughts(
    model: Any,
    start: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    anchors: torch.Tensor,
    length: int,
    keys: Sequence[int],
    *,
    temperature: float = 1.0,
    barred: Sequence[int] = (),
) -> SampledThoughts:
    """Sample one thought per anchor, all in parallel.

    The text is computed once; each step then computes one token of every thought. Together these
    are S + G·n tokens per row.

    Args:
        model: A causal language model in eval mode, without wrappers.
        start: The vector that begins a thought, (d,).
        input_ids: The text's tokens, (B, S).
        attention_mask: 1 on text, 0 on padding, (B, S).
        anchors: The column that each thought follows, int64 (B, G), non-decreasing in G.
        length: n, the number of tokens per thought.
        keys: The stream keys of the thoughts, row by row, B·G.
        temperature: Divides the logits before the noise is added. 0.0 is greedy.
        barred: Tokens that are never sampled.
    """
    batch, num_blocks = anchors.shape
    if length == 0:
        empty = anchors.new_empty((batch, num_blocks, 0))
        return SampledThoughts(empty, torch.zeros(anchors.shape, device=anchors.device))
    memory = ThoughtMemory(capacity=length)
    text_mask = attention_mask.bool()
    with thoughts_attend(model):
        layout = new_text_layout(text_mask, text_mask.shape[1], memory)
        last_states(model, embed(model, input_ids), layout)
        return continue_thoughts(
            model, start, text_mask, anchors, memory, length, keys,
            temperature=temperature, barred=barred,
        )  # fmt: skip


@torch.no_grad()
def continue_thoughts(
    model: Any,
    start: torch.Tensor,
    text_mask: torch.Tensor,
    anchors: torch.Tensor,
    memory: ThoughtMemory,
    length: int,
    keys: Sequence[int],
    *,
    temperature: float,
    barred: Sequence[int],
) -> SampledThoughts:
    """Sample thoughts for a text that is already in `memory`; see `sample_thoughts`."""
    batch, num_blocks = anchors.shape
    tokens: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    words = token_words(model.config.get_text_config().vocab_size, anchors.device)
    # `repeat` copies, because some models (CTRL) scale their input in place. (B, G, d)
    embeddings = start.to(model.get_input_embeddings().weight.dtype).repeat(batch, num_blocks, 1)
    for step in range(length):
        # One token per thought; its earlier tokens and the text are in memory.
        layout = ThoughtLayout(text_mask, anchors, 0, 1, step, memory)
        states = last_states(model, embeddings, layout)  # (B, G, d)
        drawn, spread = _draw(
            model, states.flatten(0, 1), words, keys, step, temperature, list(barred)
        )
        tokens.append(drawn.unflatten(0, (batch, num_blocks)))
        entropies.append(spread.unflatten(0, (batch, num_blocks)))
        embeddings = embed(model, tokens[-1])
    return SampledThoughts(torch.stack(tokens, -1), torch.stack(entropies, -1).mean(-1))


def _draw(
    model: Any,
    states: torch.Tensor,
    words: torch.Tensor,
    keys: Sequence[int],
    step: int,
    temperature: float,
    barred: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token per state (N, d); return the ids and the entropies of the distributions, (N,)."""
    # Logits of all thoughts at once, (B·G, V), would be the largest tensor of all.
    rows = chunk_rows(len(words), states.device)
    drawn, spread = [], []
    for first in range(0, len(states), rows):
        logits = bar(project(model, states[first : first + rows]).float(), barred)
        if temperature > 0.0:
            logits = logits / temperature
        spread.append(entropy(logits.log_softmax(-1)))
        if temperature > 0.0:
            # The argmax of logits plus Gumbel noise is a draw from their softmax.
            logits = logits + gumbel_noise(words, keys[first : first + rows], step)
        drawn.append(logits.argmax(-1))
    return torch.cat(drawn), torch.cat(spread)
