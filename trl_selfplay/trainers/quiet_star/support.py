"""Check whether a model can think: first its class, then a trial on a few tokens.

In: a causal language model. Out: an error that says why it can't. The trial compares thoughts in one
forward with the same tokens in an ordinary sequence, so that a model whose attention or positions
work differently is refused at construction and not trained wrongly.
"""

import logging
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.trainers.quiet_star.backbone import embed, last_states, project
from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout, ThoughtMemory, new_text_layout
from trl_selfplay.trainers.quiet_star.mixing import unwrap_causal_lm
from trl_selfplay.trainers.quiet_star.replaced_attention import (
    WITHOUT_POSITION_IDS,
    thoughts_attend,
)

logger = logging.getLogger(__name__)

# Attention functions that compute the softmax that our split attention computes.
_KNOWN_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
# Maximum difference in logits, relative to their size, that a trial allows.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_TRIAL_TEXT, _TRIAL_BLOCK = 6, 3


def check_model(model: Any) -> None:
    """Raise ValueError if the model's thoughts can't be computed in one forward.

    Raises:
        ValueError: The model is an encoder-decoder, multimodal, or has recurrent layers, chunked
            attention or an unknown attention function, or its results differ from those of an
            ordinary sequence. The message names the class and the reason.
    """
    causal_lm = unwrap_causal_lm(model)
    name = type(causal_lm).__name__
    config = causal_lm.config.get_text_config()
    remedy = "Use a model of full or sliding-window attention, such as Llama, Qwen or Mistral."
    traits = describe_model(model)
    layers = DynamicCache(config=causal_lm.config).layers
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise ValueError(
            f"{name} has recurrent or convolutional layers, whose state can't branch into one "
            f"thought per token. {remedy}"
        )
    if getattr(config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"{name} looks up vectors for each layer by a token's id (`hidden_size_per_layer_input`), "
            f"which the vectors that begin and end a thought don't have. {remedy}"
        )
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"{name} has layers of the kind {kind!r}, in which a token sees a selection of "
                f"the text that thoughts can't join. {remedy}"
            )
    if causal_lm.base_model is causal_lm:
        raise ValueError(
            f"{name} can't be run without its head, so states can't be mixed. {remedy}"
        )
    attention = causal_lm.config._attn_implementation
    if attention not in _KNOWN_ATTENTION:
        raise ValueError(
            f"{name} was loaded with attn_implementation={attention!r}. Thoughts replace the "
            f"attention function, so it must be a known one: {', '.join(_KNOWN_ATTENTION)}."
        )
    if not traits.takes_position_ids and name not in WITHOUT_POSITION_IDS:
        raise ValueError(
            f"{name} doesn't take position_ids, so thoughts can't be placed after their columns. "
            f"{remedy}"
        )
    if any(p.device.type == "meta" for p in causal_lm.parameters()):
        return  # sharded weights allow no trial
    _try_thoughts(causal_lm, name, remedy)


@torch.no_grad()
def _try_thoughts(model: Any, name: str, remedy: str) -> None:
    """Compare two thoughts, computed in one forward and token by token, with ordinary sequences."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    count = _TRIAL_TEXT + 2 * _TRIAL_BLOCK
    ids = torch.randint(model.config.get_text_config().vocab_size, (count,), generator=generator)
    ids = ids.to(weight.device)
    text, blocks = ids[:_TRIAL_TEXT], ids[_TRIAL_TEXT:].view(2, _TRIAL_BLOCK)
    anchors = torch.tensor([[1, _TRIAL_TEXT - 2]], device=weight.device)
    training = [module.training for module in model.modules()]
    model.eval()
    try:
        try:
            with thoughts_attend(model):
                states = _states_of_thoughts(model, text, blocks, anchors)
            if states.shape[-1] != weight.shape[1]:
                raise ValueError(
                    f"its states have width {states.shape[-1]} and its embeddings "
                    f"{weight.shape[1]}, which the mixing head and the vectors of thoughts share."
                )
        except torch.OutOfMemoryError:
            raise
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"{name} can't compute thoughts: {reason}. {remedy}") from error
        except Exception as error:  # models fail in many ways
            raise ValueError(
                f"{name} can't compute thoughts: its attention reads the mask itself, or works in "
                f"another way of its own ({type(error).__name__}: {str(error).rstrip('.')}). {remedy}"
            ) from error
        _check_head(model, text, name, remedy)
        ours = project(model, states).float()  # (2 ways, 2 blocks, L, V)
        for block, anchor, logits in zip(blocks, anchors[0].tolist(), ours.unbind(1), strict=True):
            sequence = torch.cat([text[: anchor + 1], block])[None]
            naive = model(input_ids=sequence, use_cache=False).logits[0, anchor + 1 :].float()
            difference = (naive - logits).abs().max().item()
            size = naive.abs().max().item()
            if not difference <= _TOLERANCE.get(model.dtype, 1e-1) * max(size, 1.0):
                raise ValueError(
                    f"{name} gives other logits for a thought in one forward than for the same "
                    f"tokens in a sequence (they differ by {difference:.2g}), so its attention or "
                    f"positions work in a way that thoughts don't support. {remedy}"
                )
    finally:
        for module, was_training in zip(model.modules(), training, strict=True):
            module.training = was_training


def _check_head(model: Any, text: torch.Tensor, name: str, remedy: str) -> None:
    """Raise ValueError if the model's logits aren't those of `project`."""
    states = model.base_model(input_ids=text[None], use_cache=False).last_hidden_state
    expected = model(input_ids=text[None], use_cache=False).logits.float()
    difference = (expected - project(model, states).float()).abs().max().item()
    size = expected.abs().max().item()
    if not difference <= _TOLERANCE.get(model.dtype, 1e-1) * max(size, 1.0):
        raise ValueError(
            f"{name} has a head of more than one linear layer, which mixed states don't "
            f"support. {remedy}"
        )


def _states_of_thoughts(
    model: Any, text: torch.Tensor, blocks: torch.Tensor, anchors: torch.Tensor
) -> torch.Tensor:
    """Return the states of two blocks, from one forward and from memory, (2, 2, L, d)."""
    mask = torch.ones((1, len(text)), dtype=torch.bool, device=text.device)
    layout = ThoughtLayout(mask, anchors, len(text), blocks.shape[1])
    tokens = torch.cat([text, blocks.flatten()])[None]
    at_once = last_states(model, embed(model, tokens), layout)[0, len(text) :]
    _check_windows(model, layout)
    memory = ThoughtMemory(capacity=blocks.shape[1])
    last_states(model, embed(model, text[None]), new_text_layout(mask, len(text), memory))
    steps = []
    for step, token in enumerate(blocks.unbind(1)):
        layout = ThoughtLayout(mask, anchors, 0, 1, step, memory)
        steps.append(last_states(model, embed(model, token[None]), layout)[0])
    return torch.stack([at_once.unflatten(0, blocks.shape), torch.stack(steps, 1)])


def _check_windows(model: Any, layout: ThoughtLayout) -> None:
    """Raise ValueError if layers have a sliding window that they don't pass to their attention."""
    layers = DynamicCache(config=model.config).layers
    windowed = sum(bool(getattr(layer, "is_sliding", False)) for layer in layers)
    told = sum(window is not None for window in layout.windows)
    if told < windowed:
        raise ValueError(
            f"{windowed} of its layers have a sliding window, and {told} pass it on to their "
            "attention function, so thoughts would see more than the text does."
        )


def check_lengths(
    model: Any, num_text_tokens: int | None, num_thought_tokens: int, num_ahead_tokens: int
) -> None:
    """Raise ValueError if text, thought and tokens ahead don't fit the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or num_text_tokens is None:
        return
    extra = num_thought_tokens + 2 + num_ahead_tokens - 1
    if extra >= limit:
        raise ValueError(
            f"a thought of {num_thought_tokens} + 2 tokens and {num_ahead_tokens} true tokens after it "
            f"leave no room for a text in the {limit} positions of {type(model).__name__}. Set a "
            "shorter thought_length or fewer num_ahead_tokens."
        )
    if num_text_tokens + extra > limit:
        raise ValueError(
            f"a text of {num_text_tokens} tokens with a thought of {num_thought_tokens} + 2 and "
            f"{num_ahead_tokens - 1} true tokens after it reaches position "
            f"{num_text_tokens + extra}, but {type(model).__name__} has {limit} positions. Set "
            f"max_length to at most {limit - extra}."
        )
