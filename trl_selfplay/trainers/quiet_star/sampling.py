"""Thoughts at many columns of a text at once, sampled without gradients and without recomputing it.

In: a text, the columns that think, and the name of each thought's random stream. Out: the tokens
of every thought. Source: Quiet-STaR, arXiv 2403.09629, section 4.1 (parallel generation).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_selfplay.generation.random_streams import Phase, gumbel_noise, stream_key, token_words
from trl_selfplay.trainers.quiet_star.attention import thoughts_attend
from trl_selfplay.trainers.quiet_star.backbone import (
    bar,
    chunk_rows,
    embed,
    entropy,
    last_states,
    project,
)
from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout, ThoughtMemory, new_text_layout


@dataclass(frozen=True, slots=True)
class ThinkingColumns:
    """The columns of a batch that think.

    Attributes:
        columns: Text columns, int64 (B, U), rising in each row; padded with the last one.
        is_real: False where `columns` is padding, bool (B, U).
        positions: The columns' positions in their text, padding not counted, int64 (B, U).
    """

    columns: torch.Tensor
    is_real: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class SampledThoughts:
    """Thoughts of a batch; block u·K + s is thought s of the column u.

    Attributes:
        tokens: Sampled ids without start and end, int64 (B, U·K, n).
        entropies: Mean entropy in nats of the distributions they were drawn from, float32
            (B, U·K); 0 where n is 0.
    """

    tokens: torch.Tensor
    entropies: torch.Tensor


def can_think(
    labels: torch.Tensor, attention_mask: torch.Tensor, num_ahead_tokens: int
) -> torch.Tensor:
    """Return which columns j think: j is text and j+1 … j+n_true all have a label; bool (B, S)."""
    labelled = (labels != -100) & attention_mask.bool()
    allowed = attention_mask.bool().clone()
    for ahead in range(1, num_ahead_tokens + 1):
        allowed &= torch.nn.functional.pad(labelled, (0, ahead))[:, ahead:]
    return allowed


def predicted_tokens(labels: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return which tokens 1 … S − 1 have a label and text before them, bool (B, S − 1)."""
    return (labels[:, 1:] != -100) & attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()


def num_thinking(allowed: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return how many columns of each row think: the fraction, rounded up, int64 (B,)."""
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
    """Choose each row's thinking columns: all that are allowed, or a uniformly random subset.

    The subset is a function of (seed, step, phase, row, positions), so it doesn't depend on how
    rows are batched or padded.

    Args:
        allowed: From `can_think`, bool (B, S).
        attention_mask: 1 on text, (B, S).
        fraction: Share of the allowed columns.
        seed: The run's.
        step: Optimizer step.
        phase: "train" or "eval".
        rows: Each row's index among the step's rows, over all processes.
    """
    text_positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    counts = num_thinking(allowed, fraction).tolist()
    width = max(1, *counts)
    columns = torch.zeros((len(allowed), width), dtype=torch.long)
    is_real = torch.zeros((len(allowed), width), dtype=torch.bool)
    for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
        candidates = allowed[b].nonzero().flatten().tolist()
        if count < len(candidates):
            places = text_positions[b].tolist()
            candidates.sort(key=lambda j: stream_key(seed, step, phase, f"{row}/{places[j]}", -1))
            candidates = sorted(candidates[:count])
        if candidates:
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
    """Return the random stream of each block, B·U·K keys of (seed, step, row, position, sample)."""
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
    """Sample one thought for each anchor, all in parallel.

    The text is computed once, then each step one token of every thought: S + G·n tokens a row.

    Args:
        model: A causal language model in eval mode, without wrappers.
        start: The vector that begins a thought, (d,).
        input_ids: (B, S).
        attention_mask: 1 on text, (B, S).
        anchors: Column after which each thought stands, int64 (B, G), not decreasing in G.
        length: n.
        keys: The thoughts' random streams, row by row, B·G.
        temperature: Of sampling; it divides the logits before the noise. 0.0 takes the likeliest.
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
    """Sample thoughts of a text that is in `memory` already; see `sample_thoughts`."""
    batch, num_blocks = anchors.shape
    tokens: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    words = token_words(model.config.get_text_config().vocab_size, anchors.device)
    # A copy, because some models (CTRL) scale their input in place.
    embeddings = start.to(model.get_input_embeddings().weight.dtype).repeat(batch, num_blocks, 1)
    for step in range(length):
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
    """Draw a token for each state (N, d); return ids and the distributions' entropies, (N,)."""
    rows = chunk_rows(len(words), states.device)
    drawn, spread = [], []
    for first in range(0, len(states), rows):
        logits = bar(project(model, states[first : first + rows]).float(), barred)
        if temperature > 0.0:
            logits = logits / temperature
        spread.append(entropy(logits.log_softmax(-1)))
        if temperature > 0.0:
            logits = logits + gumbel_noise(words, keys[first : first + rows], step)
        drawn.append(logits.argmax(-1))
    return torch.cat(drawn), torch.cat(spread)
