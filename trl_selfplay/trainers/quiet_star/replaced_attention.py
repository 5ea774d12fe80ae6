"""Replace a model's attention by one that understands layouts, for a time.

In: a model. Out: the same model, whose layers compute `attend` while a context is open: through
transformers' interface for attention functions where a family uses it, and else through methods that
replace those of its attention modules and compute the same from the module's own weights.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from trl_selfplay.trainers.quiet_star.attention import attend
from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout

NAME = "trl_selfplay_thoughts"
# Keyword arguments of transformers' attention functions that would change what a token sees.
_UNSUPPORTED = ("position_bias", "cache", "indices", "block_indices", "sinks")


class _LayoutMask(torch.Tensor):
    """An attention mask that carries a layout, also through `detach` (reentrant checkpointing)."""

    thought_layout: ThoughtLayout | None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.detach:
            result.thought_layout = getattr(args[0], "thought_layout", None)
        return result


def mask_with(layout: ThoughtLayout, device: torch.device) -> torch.Tensor:
    """Return an attention mask that carries a layout through a model.

    transformers builds no mask of its own if it gets a 4D one, and passes it on unchanged (its
    documented behaviour: https://github.com/huggingface/transformers/pull/46507). This one is empty:
    attention that reads it fails instead of seeing too much.
    """
    mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=device).as_subclass(_LayoutMask)
    mask.thought_layout = layout
    return mask


def layout_of(mask: torch.Tensor | None, module: nn.Module) -> ThoughtLayout:
    """Return the layout that a mask carries, or raise ValueError if it carries none."""
    layout = getattr(mask, "thought_layout", None)
    if not isinstance(layout, ThoughtLayout):
        raise ValueError(  # noqa: TRY004  # the model is refused for its value
            f"{type(module).__name__} doesn't get the attention mask that was passed to the model, "
            "but one that the model has built from it."
        )
    return layout


def thought_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface; the mask is read for its layout, not its values.

    `dropout` has no effect, and neither have keywords that describe what `attention_mask` says.
    `slopes` isn't part of the interface: see `attend`.

    Raises:
        ValueError: The model doesn't pass the mask on, or its attention has a part that isn't
            implemented here.
    """
    used = [key for key in _UNSUPPORTED if kwargs.get(key) is not None]
    if used:
        raise ValueError(
            f"{type(module).__name__} attends with {', '.join(used)}, which thoughts don't support."
        )
    layout = layout_of(attention_mask, module)
    # A layer is known by the order of the calls: modules may attend twice (DiffLlama).
    call = len(layout.windows)
    layout.windows.append(sliding_window)
    # Under autocast, rotary embeddings return queries and keys in float32, but values stay in
    # bfloat16. The products of the backward pass run outside autocast, so types must match.
    out = attend(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        layout,
        layer=call,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        slopes=slopes,
    )
    return out, None


_Output = tuple[torch.Tensor, None]


def _core(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> _Output:
    """GPT-J, CodeGen, GPT-Neo, GPT-NeoX Japanese: from (B, H, T, d) to (B, H, T, d)."""
    # GPT-Neo doesn't scale its scores.
    divisor: Any = getattr(module, "scale_attn", getattr(module, "norm_factor", 1.0))
    is_local = getattr(module, "attention_type", None) == "local"
    window = module.config.window_size if is_local else None
    out, _ = thought_attention(
        module, query, key, value, attention_mask,
        scaling=1.0 / float(divisor), sliding_window=window,
    )  # fmt: skip
    return out.transpose(1, 2), None


def _xglm(
    module: Any, hidden_states: torch.Tensor, *, attention_mask: torch.Tensor, **kwargs: Any
) -> _Output:
    projections = (module.q_proj, module.k_proj, module.v_proj)
    heads = (p(hidden_states).unflatten(-1, (-1, module.head_dim)) for p in projections)
    query, key, value = (x.transpose(1, 2) for x in heads)
    out, _ = thought_attention(module, query, key, value, attention_mask, module.scaling)
    return module.out_proj(out.flatten(2)), None


def _falcon(
    module: Any,
    hidden_states: torch.Tensor,
    *,
    attention_mask: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **kwargs: Any,
) -> _Output:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb, build_alibi_tensor

    heads = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (x.transpose(1, 2) for x in heads)
    slopes = None
    if module.config.alibi:
        two = torch.ones((1, 2), device=query.device)
        # Falcon adds the bias before it scales the scores.
        slopes = build_alibi_tensor(two, module.num_heads, torch.float32)[:, 0, 1]
        slopes = slopes * module.inv_norm_factor
    else:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    out, _ = thought_attention(
        module, query, key, value, attention_mask, module.inv_norm_factor, slopes=slopes
    )
    return module.dense(out.flatten(2)), None


def _bloom(
    module: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    *,
    alibi: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> _Output:
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    out, _ = thought_attention(
        module, query, key, value, attention_mask, module.inv_norm_factor, slopes=alibi[:, 0, 1]
    )
    return module.dense(out.flatten(2)) + residual, None


def _bloom_alibi(
    backbone: Any, attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the bias of two positions, (H, 1, 2): the layout isn't known to the backbone."""
    two = torch.ones((1, 2), device=attention_mask.device)
    bias: torch.Tensor = type(backbone).build_alibi_tensor(backbone, two, num_heads, torch.float32)
    return bias


def _mpt(
    module: Any,
    hidden_states: torch.Tensor,
    *,
    position_bias: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> _Output:
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(-module.clip_qkv, module.clip_qkv)
    heads = (x.unflatten(-1, (-1, module.head_dim)) for x in fused.chunk(3, dim=2))
    query, key, value = (x.transpose(1, 2) for x in heads)
    slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
    out, _ = thought_attention(
        module, query, key, value, attention_mask, module.softmax_scale, slopes=slopes
    )
    return module.out_proj(out.flatten(2)), None


# What is replaced, by the name of the class: attributes of its instances. Functions get the instance.
REPLACED: dict[str, dict[str, Callable[..., Any] | bool]] = {
    "GPTJAttention": {"_attn": _core},
    "CodeGenAttention": {"_attn": _core},
    "GPTNeoSelfAttention": {"_attn": _core},
    "GPTNeoXJapaneseAttention": {"_attn": _core},
    "XGLMAttention": {"forward": _xglm},
    "FalconAttention": {"forward": _falcon},
    "FalconModel": {"use_alibi": False},  # it would mix the bias into the mask
    "BloomAttention": {"forward": _bloom},
    "BloomModel": {"build_alibi_tensor": _bloom_alibi},
    "MptAttention": {"forward": _mpt},
}
# Position enters these by the bias alone.
WITHOUT_POSITION_IDS = ("BloomForCausalLM", "MptForCausalLM")


@contextmanager
def thoughts_attend(model: nn.Module) -> Iterator[None]:
    """Replace a model's attention by one that understands layouts, and restore it afterwards.

    Keep it active during the backward pass: activation checkpointing runs the attention again.
    """
    config: Any = model.config
    AttentionInterface.register(NAME, thought_attention)
    own_attention = config._attn_implementation
    before: list[tuple[nn.Module, str, Any]] = []
    absent = object()
    config._attn_implementation = NAME
    try:
        for module in model.modules():
            for name, value in REPLACED.get(type(module).__name__, {}).items():
                before.append((module, name, module.__dict__.get(name, absent)))
                new = functools.partial(value, module) if callable(value) else value
                module.__dict__[name] = new
        yield
    finally:
        config._attn_implementation = own_attention
        for module, name, old in reversed(before):
            if old is absent:
                del module.__dict__[name]
            else:
                module.__dict__[name] = old
