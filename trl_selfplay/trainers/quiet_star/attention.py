"""Attention of a text and its thoughts in one forward, without a mask over all pairs of tokens.

In: queries, keys and values of a layer and the layout of their tokens. Out: the result of dense
attention under the mask "text is causal; a thought sees the text up to its anchor, and itself
causally". A thought's keys are of two kinds, so its scores are two small products that share one
softmax.

Shapes: B rows, H query heads, Hkv key heads (R = H / Hkv queries per key head), T text columns, G
thought blocks of L tokens, S text columns including those in memory, d channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout

# Maximum number of scores computed at once. Chunks bound the memory (16 MiB in float32 on a CPU,
# close to the size of its caches), and each chunk skips text columns that none of its blocks sees.
CPU_CHUNK_SCORES = 1 << 22
DEVICE_CHUNK_SCORES = 1 << 26


@dataclass(frozen=True, slots=True)
class _Rule:
    """What changes the scores of a layer, beside queries, keys and sinks.

    Attributes:
        text_mask, own_mask: See `ThoughtLayout.thought_visible` and `own_visible`.
        reach: See `ThoughtLayout.reach`.
        scaling: Factor applied to the scores.
        softcap: Scores s become softcap·tanh(s / softcap); None disables it.
        slopes: ALiBi: score s of a key at position p becomes s + slope·p, (Hkv, R); None disables it.
        key_positions: Positions of text keys and own keys for `slopes`, (B, S) and (B, G, Lk).
    """

    text_mask: torch.Tensor
    own_mask: torch.Tensor
    reach: list[int]
    scaling: float
    softcap: float | None
    slopes: torch.Tensor | None
    key_positions: tuple[torch.Tensor, torch.Tensor] | None


class _SplitAttention(torch.autograd.Function):
    """One softmax over text keys and own keys; the backward pass recomputes the scores.

    Only the output and the log-sum-exp of each query are kept, as in FlashAttention.

    Shapes: query (B, Hkv, G, R, L, d); text keys and values (B, Hkv, S, d); own keys and values
    (B, Hkv, G, Lk, d), where Lk counts the block's tokens in memory as well. Values, and so the
    output, may have another width than keys. Attention sinks (Hkv, R), or None, are the score of a
    key without a value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        text_key: torch.Tensor,
        text_value: torch.Tensor,
        own_key: torch.Tensor,
        own_value: torch.Tensor,
        sinks: torch.Tensor | None,
        rule: _Rule,
    ) -> torch.Tensor:
        out = query.new_empty((*query.shape[:-1], own_value.shape[-1]))
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        for g, s in _chunks(query, rule.reach):
            text, own = _scores(query[:, :, g], text_key[:, :, s], own_key[:, :, g], rule, g, s)
            # The softmax spans both kinds of keys, so they share the maximum and the total. Each
            # token sees itself, so no row is empty.
            top = torch.maximum(text.amax(-1), own.amax(-1))  # (B, Hkv, g, R, L)
            if sinks is not None:
                top = torch.maximum(top, sinks[:, None, :, None])
            text.sub_(top[..., None]).exp_()
            own.sub_(top[..., None]).exp_()
            total = text.sum(-1) + own.sum(-1)
            if sinks is not None:
                total += (sinks[:, None, :, None] - top).exp_()
            # Divide after the products: the output is smaller than the scores.
            merged = _times_text(text.to(query.dtype), text_value[:, :, s])
            merged += _times_own(own.to(query.dtype), own_value[:, :, g])
            out[:, :, g] = merged / total[..., None].to(query.dtype)
            lse[:, :, g] = top + total.log()  # all that the backward pass needs of the softmax
        ctx.save_for_backward(query, text_key, text_value, own_key, own_value, sinks, out, lse)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, text_key, text_value, own_key, own_value, sinks, out, lse = ctx.saved_tensors
        rule: _Rule = ctx.rule
        (grad,) = grads
        d_query = torch.empty_like(query)
        d_text_key, d_text_value = torch.zeros_like(text_key), torch.zeros_like(text_value)
        d_own_key, d_own_value = torch.empty_like(own_key), torch.empty_like(own_value)
        d_sinks = None if sinks is None else torch.zeros_like(sinks)
        for g, s in _chunks(query, rule.reach):
            q, d_out, own_k = query[:, :, g], grad[:, :, g], own_key[:, :, g]
            keys = text_key[:, :, s]
            scores = _scores(q, keys, own_k, rule, g, s)
            # With p = softmax(score): d_score = p · (d_p − Σ p·d_p), and Σ p·d_p = out · d_out.
            dot = (d_out.float() * out[:, :, g].float()).sum(-1, keepdim=True)
            if d_sinks is not None:  # a sink's value is 0, and so is its d_p
                share = (sinks[:, None, :, None] - lse[:, :, g]).exp_()
                d_sinks -= (share * dot[..., 0]).sum((0, 2, 4))
            shares = [(x - lse[:, :, g, :, :, None]).exp_() for x in scores]  # p, text and own
            # Blocks of several chunks see the same text columns, so their gradients add up; own
            # keys belong to one block and are written once.
            d_text_value[:, :, s] += _transposed_text(shares[0].to(grad.dtype), d_out)
            d_own_value[:, :, g] = _transposed_own(shares[1].to(grad.dtype), d_out)
            d_shares = [
                _times_text(d_out, text_value[:, :, s].transpose(-1, -2)),
                _times_own(d_out, own_value[:, :, g].transpose(-1, -2)),
            ]
            d_scores = []
            for share, d_share, score in zip(shares, d_shares, scores, strict=True):
                d_score = share * (d_share.float() - dot)
                # d tanh(x) = 1 − tanh²(x). Masked scores are −inf, with a share of 0: any finite
                # value does for them.
                if rule.softcap is not None:
                    capped = score.masked_fill(share == 0, 0.0)
                    d_score *= 1.0 - (capped / rule.softcap) ** 2
                d_scores.append((d_score * rule.scaling).to(grad.dtype))
            d_query[:, :, g] = _times_text(d_scores[0], keys) + _times_own(d_scores[1], own_k)
            d_text_key[:, :, s] += _transposed_text(d_scores[0], q)
            d_own_key[:, :, g] = _transposed_own(d_scores[1], q)
        return d_query, d_text_key, d_text_value, d_own_key, d_own_value, d_sinks, None


def _chunks(query: torch.Tensor, reach: list[int]) -> Iterator[tuple[slice, slice]]:
    """Split the blocks into chunks; yield each chunk with the text columns that it can see."""
    batch, heads, num_blocks, repeats, length, _ = query.shape
    budget = CPU_CHUNK_SCORES if query.device.type == "cpu" else DEVICE_CHUNK_SCORES
    size = max(1, budget // (batch * heads * repeats * length * max(reach)))
    for first in range(0, num_blocks, size):
        last = min(first + size, num_blocks)
        # `reach` doesn't decrease, so the chunk's last block sees furthest.
        yield slice(first, last), slice(0, reach[last - 1])


def _scores(
    query: torch.Tensor,
    text_key: torch.Tensor,
    own_key: torch.Tensor,
    rule: _Rule,
    g: slice,
    s: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 scores of the text (…, L, S) and of the own block (…, L, Lk), -inf if masked."""
    text = _times_text(query, text_key.transpose(-1, -2)).float().mul_(rule.scaling)
    own = _times_own(query, own_key.transpose(-1, -2)).float().mul_(rule.scaling)
    if rule.softcap is not None:
        text, own = ((x / rule.softcap).tanh_().mul_(rule.softcap) for x in (text, own))
    if rule.slopes is not None and rule.key_positions is not None:
        slopes = rule.slopes[:, None, :, None, None]  # (Hkv, 1, R, 1, 1)
        text_positions, own_positions = rule.key_positions
        text += slopes * text_positions[:, None, None, None, None, s]
        own += slopes * own_positions[:, None, g, None, None]
    text.masked_fill_(~rule.text_mask[:, None, g, None, :, s], float("-inf"))
    own.masked_fill_(~rule.own_mask, float("-inf"))
    return text, own


def _times_text(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply (B, Hkv, G, R, L, a) by a matrix per head, (B, Hkv, a, b)."""
    return (rows.flatten(2, 4) @ matrix).unflatten(2, rows.shape[2:5])


def _times_own(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply (B, Hkv, G, R, L, a) by a matrix per head and block, (B, Hkv, G, a, b)."""
    return (rows.flatten(3, 4) @ matrix).unflatten(3, rows.shape[3:5])


def _transposed_text(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return leftᵀ right, summed over all rows of a head, (B, Hkv, a, b)."""
    return left.flatten(2, 4).transpose(-1, -2) @ right.flatten(2, 4)


def _transposed_own(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return leftᵀ right, summed over the rows of a block, (B, Hkv, G, a, b)."""
    return left.flatten(3, 4).transpose(-1, -2) @ right.flatten(3, 4)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: ThoughtLayout,
    *,
    layer: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute one layer's attention over a text and its thoughts.

    Args:
        query: (B, H, T + G·L, d), in the order of `layout`.
        key: (B, Hkv, T + G·L, d); H is a multiple of Hkv.
        value: (B, Hkv, T + G·L, d_v) with any d_v.
        layout: Order and visibility of the tokens. Its memory, if any, is read and extended.
        layer: Index of the layer in the memory.
        scaling: Factor applied to the scores.
        window: A token sees tokens less than this many positions before it; None sees all.
        softcap: Scores s become softcap·tanh(s / softcap); None disables it.
        sinks: One score per head, (H,), that takes part in each softmax without a value.
        slopes: ALiBi's slope of each head, (H,): it times the key's position is added to the score.

    Returns:
        (B, T + G·L, H, d_v).
    """
    if softcap is not None and slopes is not None:
        raise ValueError("a soft cap and ALiBi in one layer are not supported.")
    num_text, memory = layout.num_new_text, layout.memory
    text_key, text_value = key[:, :, :num_text], value[:, :, :num_text]
    if memory is not None:
        text_key, text_value = memory.add_text(layer, text_key, text_value)
    parts = []
    # Text is ordinary causal attention: it sees no thought.
    if num_text:
        visible = layout.text_visible(window)
        bias = None
        if slopes is not None:
            bias = slopes[:, None, None] * layout.text_positions()[:, None, None]  # (B, H, 1, S)
        text = (query[:, :, :num_text], text_key, text_value)
        parts.append(_attend_text(*text, visible, scaling, softcap, sinks, bias))
    if layout.num_blocks and layout.block_length:
        blocks = (layout.num_blocks, layout.block_length)
        own_key = key[:, :, num_text:].unflatten(2, blocks)  # (B, Hkv, G, L, d)
        own_value = value[:, :, num_text:].unflatten(2, blocks)
        if memory is not None:
            start = layout.block_start
            own_key, own_value = memory.add_own(layer, start, own_key, own_value)
        # Group the query heads by their key head, so that keys needn't be repeated.
        heads = (key.shape[1], query.shape[1] // key.shape[1])  # (Hkv, R)
        queries = query[:, :, num_text:].unflatten(2, blocks).unflatten(1, heads)  # Hkv, R, G, L
        rule = _Rule(
            layout.thought_visible(window),
            layout.own_visible(window),
            layout.reach,
            scaling,
            softcap,
            None if slopes is None else slopes.float().view(heads),
            None if slopes is None else (layout.text_positions(), layout.own_positions()),
        )
        out = _SplitAttention.apply(
            queries.transpose(2, 3).contiguous(),  # (B, Hkv, G, R, L, d)
            text_key,
            text_value,
            own_key,
            own_value,
            None if sinks is None else sinks.float().view(heads),
            rule,
        )
        parts.append(out.transpose(2, 3).flatten(1, 2).flatten(2, 3))  # (B, H, G·L, d)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _attend_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return causal attention of the text, (B, H, T, d_v).

    Args:
        query: (B, H, T, d).
        key: (B, Hkv, S, d).
        value: (B, Hkv, S, d_v).
        visible: Which keys each query sees, bool (B, 1, T, S); None means plain causal.
        scaling: Factor applied to the scores.
        softcap: See `attend`.
        sinks: See `attend`.
        bias: Added to the scores, (B, H, 1, S), or None.
    """
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if softcap is None and sinks is None and bias is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=visible is None, scale=scaling
        )
    if visible is None:
        length = query.shape[2]
        visible = torch.ones((length, length), dtype=torch.bool, device=query.device).tril()
    # PyTorch's fused kernel has no soft cap and no sinks.
    scores = (query @ key.transpose(-1, -2)).float() * scaling  # (B, H, T, S)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return scores.softmax(-1)[..., : key.shape[2]].to(query.dtype) @ value
