"""The forward with gradients over a text, all of its thoughts, and the true tokens after them.

In: a text, the columns that think and their thoughts. Out: log-probs of the text with and without
thoughts, and of the thoughts' own tokens. Source: Quiet-STaR, arXiv 2403.09629, sections 4.1 to 4.4.
"""

from dataclasses import dataclass
from typing import Any

import torch

from trl_selfplay.trainers.quiet_star.backbone import (
    describe_predictions,
    embed,
    last_states,
    token_log_probs,
)
from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, mix
from trl_selfplay.trainers.quiet_star.replaced_attention import thoughts_attend


@dataclass(frozen=True, slots=True)
class ThoughtBatch:
    """The thoughts of a batch, for the forward.

    Attributes:
        anchors: The column that each thought follows, int64 (B, G), non-decreasing in G.
        tokens: The thoughts without start and end, int64 (B, G, n).
        is_real: False for blocks that only pad a row, bool (B, G).
        num_ahead_tokens: n_true, the number of true tokens after each thought.
        temperature: The temperature at which thoughts were sampled, and are scored.
        barred: Tokens that thoughts can't contain.
        scores_thoughts: Whether to compute the log-probs of the thoughts themselves.
    """

    anchors: torch.Tensor
    tokens: torch.Tensor
    is_real: torch.Tensor
    num_ahead_tokens: int
    temperature: float = 1.0
    barred: tuple[int, ...] = ()
    scores_thoughts: bool = True


@dataclass(frozen=True, slots=True)
class UnrolledStates:
    """Last hidden states of one forward.

    Attributes:
        text: States of the text, (B, S, d).
        blocks: States of start, thought, end and true tokens, (B, G, n + 2 + n_true − 1, d).
    """

    text: torch.Tensor
    blocks: torch.Tensor


def unroll(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, batch: ThoughtBatch
) -> UnrolledStates:
    """Run the backbone over [text | start thought end X_{j+1} … | …], S + G·(n + n_true + 1) tokens.

    Each text is computed once for all of its thoughts. Call this inside `thoughts_attend(model)`.
    """
    num_rows, num_blocks, _ = batch.tokens.shape
    ends = getattr(model, ATTRIBUTE).start_and_end()  # (2, d)
    text = embed(model, input_ids)  # (B, S, d)
    start, end = (v.to(text.dtype).expand(num_rows, num_blocks, 1, -1) for v in ends.unbind(0))
    # The end token predicts X_{j+1}, so only the first n_true − 1 true tokens are needed as input.
    ahead = torch.arange(1, batch.num_ahead_tokens, device=input_ids.device)
    true_ids = gather_columns(input_ids, batch.anchors[:, :, None] + ahead)  # (B, G, n_true − 1)
    blocks = torch.cat([start, embed(model, batch.tokens), end, embed(model, true_ids)], dim=2)
    layout = ThoughtLayout(
        attention_mask.bool(), batch.anchors, input_ids.shape[1], blocks.shape[2]
    )
    states = last_states(model, torch.cat([text, blocks.flatten(1, 2)], dim=1), layout)
    num_text = input_ids.shape[1]
    return UnrolledStates(
        states[:, :num_text], states[:, num_text:].unflatten(1, (num_blocks, blocks.shape[2]))
    )


def gather_columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Pick columns (B, …) of values (B, S) or (B, S, d); columns past the end pick the last one."""
    flat = columns.clamp(max=values.shape[1] - 1).flatten(1)
    if values.ndim == 3:
        picked = values.gather(1, flat[..., None].expand(-1, -1, values.shape[2]))
    else:
        picked = values.gather(1, flat)
    return picked.unflatten(1, columns.shape[1:])


def think_and_talk(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    batch: ThoughtBatch,
) -> dict[str, torch.Tensor]:
    """Score a text with and without its thoughts.

    Returns:
        A dict with `base_log_probs`, `entropies` and `top1`, (B, S − 1): log-prob of the next token,
        entropy of its distribution, and 1 if it is the most likely one; 0 on padding.
        `talk_log_probs` and `weights`, (B, G, n_true): log p_talk(X_{j+t}) and the mixing weights, 0
        on blocks that aren't real. `thought_log_probs`, (B, G): log π summed over the thought's
        tokens, under the distribution without barred tokens; 0 unless `scores_thoughts`.
    """
    num_thought_tokens, n_true = batch.tokens.shape[2], batch.num_ahead_tokens
    with thoughts_attend(model):
        states = unroll(model, input_ids, attention_mask, batch)
    # The head runs only where a token follows: its logits are the largest tensors.
    real_text = attention_mask.bool()
    scored = real_text[:, :-1] & real_text[:, 1:]  # (B, S − 1)
    predicting, following = states.text[:, :-1][scored], input_ids[:, 1:][scored]
    base = token_log_probs(model, predicting, following)
    entropies, hits = describe_predictions(model, predicting, following)
    steps = torch.arange(n_true, device=input_ids.device)
    columns = batch.anchors[:, :, None] + steps  # (B, G, n_true)
    # X_{j+t} is predicted by column j + t − 1 of the text, and by the block's token t − 1 from its
    # end token on; the head mixes the two states.
    before = gather_columns(states.text, columns)  # (B, G, n_true, d)
    after = states.blocks[:, :, num_thought_tokens + 1 :]  # (B, G, n_true, d)
    mixed, weights = mix(getattr(model, ATTRIBUTE), before, after)
    real = batch.is_real[:, :, None].expand(-1, -1, n_true)
    talk = token_log_probs(model, mixed[real], gather_columns(input_ids, columns + 1)[real])
    outputs = {
        "base_log_probs": _scatter(base, scored),
        "entropies": _scatter(entropies, scored),
        "top1": _scatter(hits.float(), scored),
        "talk_log_probs": _scatter(talk, real),
        "weights": weights * real,
    }
    thought = weights.new_zeros(batch.anchors.shape)
    if batch.scores_thoughts and num_thought_tokens:
        real = batch.is_real[:, :, None].expand(-1, -1, num_thought_tokens)
        # The start token and all thought tokens but the last predict the thought.
        own = token_log_probs(
            model,
            states.blocks[:, :, :num_thought_tokens][real],
            batch.tokens[real],
            temperature=batch.temperature,
            barred=list(batch.barred),
        )
        thought = _scatter(own, real).sum(-1)
    return {**outputs, "thought_log_probs": thought}


def _scatter(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Put values (N,) where `where` is True, and 0 elsewhere."""
    return values.new_zeros(where.shape).masked_scatter(where, values)
