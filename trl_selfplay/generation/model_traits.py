"""What the sampler needs to know about a model, and the state of a model while it samples.

In: a model as the trainer holds it. Out: `ModelTraits`, read from its layers and its forward; a
context in which it is in eval mode without gradient checkpointing, and which restores its state.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trl_selfplay.generation.cpu_linear import fast_linear_layers

# Layers that share another layer's keys; transformers before 5.23 leaves them out of the cache.
_SHARING: Any = getattr(cache_utils, "DummyLayer", ())

# Loading a multimodal checkpoint with AutoModelForCausalLM returns the multimodal class again.
TEXT_MODEL_ADVICE = """\
Save the language model by itself, once, and train that folder:

    full = AutoModelForImageTextToText.from_pretrained(name)
    config = full.config.text_config
    config.tie_word_embeddings = full.config.tie_word_embeddings
    text = AutoModelForCausalLM.from_config(config)
    text.model, text.lm_head = full.model.language_model, full.lm_head
    text.save_pretrained(folder)
    AutoTokenizer.from_pretrained(name).save_pretrained(folder)

`from_config` raises for a family without a text class of its own (Qwen2-VL, Qwen3-VL)."""


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """The properties of a model that decide how it is sampled from.

    Attributes:
        padding: Where a row may have masked padding without affecting the tokens after it. "inside":
            every layer is full attention, so a common prefix can be computed once, with the shorter
            rests padded after it. "left": some layer has a sliding window. "none": some layer is
            recurrent, a convolution or of an unknown kind, so all rows of a batch must have the same
            length.
        window: Maximum length at which the sliding windows still see everything, so that padding
            inside is possible as well; None without windows, or if their length is unknown.
        cache_name: Name of the forward's cache parameter.
        takes_position_ids: Whether the forward has this parameter.
        takes_logits_to_keep: Whether the forward can compute only the last position's logits.
        context_length: Maximum number of tokens of prompt and completion; None without a limit.
        rope_switch: Longer sequences have other rotary frequencies (longrope, dynamic scaling),
            which all rows of a batch share; None if the frequencies never change.
        rope_restarts: Whether keys are computed again when a sequence passes `rope_switch`
            (longrope).
        bytes_per_token: Size of one token's keys and values in all layers.
        bytes_per_prompt_token: Estimated size of one prompt token's activations in the widest layer.
        vocab_size: Width of the logits.
    """

    padding: Literal["inside", "left", "none"]
    window: int | None
    cache_name: str
    takes_position_ids: bool
    takes_logits_to_keep: bool
    context_length: int | None
    rope_switch: int | None
    rope_restarts: bool
    bytes_per_token: int
    bytes_per_prompt_token: int
    vocab_size: int


def describe_model(model: nn.Module) -> ModelTraits:
    """Return the traits of an unwrapped model or PEFT model.

    Raises:
        ValueError: The model can't be sampled from: it is an encoder-decoder or multimodal, keeps
            state outside transformers' cache, or has an adapter that reads the prompt. The error
            names the class.
    """
    base: Any = model
    if hasattr(base, "peft_config"):
        _check_adapters(base)
        base = base.get_base_model()
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder model; self-play needs a decoder-only causal language "
            "model (AutoModelForCausalLM)."
        )
    parameters = inspect.signature(type(base).forward).parameters
    config = base.config.get_text_config(decoder=True)
    if {"pixel_values", "input_features"} & set(parameters):
        raise ValueError(
            f"{name} takes images or audio, but rounds work on text. {TEXT_MODEL_ADVICE}"
        )
    cache_name = next((n for n in ("past_key_values", "cache_params") if n in parameters), None)
    layers = None if cache_name is None else _cache_layers(base.config)
    if cache_name is None or not layers:
        raise ValueError(
            f"{name} keeps its state in a form of its own instead of transformers' cache, so samples "
            "in a batch could not be kept apart. Use a model whose forward takes "
            "`past_key_values`."
        )
    padding, window = _padding_of(layers, config, "position_ids" in parameters)
    hidden_size = base.get_input_embeddings().weight.shape[1]
    num_heads = _largest(config, "num_attention_heads", "num_heads") or 1
    num_kv_heads = _largest(config, "num_key_value_heads") or num_heads
    head_dim = _largest(config, "head_dim") or max(hidden_size // num_heads, 1)
    item = base.dtype.itemsize
    # The inner states of the feed-forward layer dominate: gate, up and their product. Their width
    # defaults to four times the hidden size.
    inner = _largest(config, "intermediate_size") or 4 * hidden_size
    context_length, rope_switch, rope_restarts = _lengths_of(config)
    return ModelTraits(
        padding=padding,
        window=window,
        cache_name=cache_name,
        takes_position_ids="position_ids" in parameters,
        takes_logits_to_keep="logits_to_keep" in parameters,
        context_length=context_length,
        rope_switch=rope_switch,
        rope_restarts=rope_restarts,
        bytes_per_token=2 * len(layers) * num_kv_heads * head_dim * item,
        bytes_per_prompt_token=(3 * inner + 6 * hidden_size) * max(item, 4),
        vocab_size=config.vocab_size,
    )


def _check_adapters(model: Any) -> None:
    """Raise ValueError for adapters whose effect on a token depends on how the prompt is fed."""
    configs = model.peft_config.values()
    learns_prompt = [c.peft_type for c in configs if c.is_prompt_learning]
    if learns_prompt:
        raise ValueError(
            f"the adapter of {type(model).__name__} is of a kind that adds virtual tokens "
            f"({', '.join(map(str, learns_prompt))}), which the sampler doesn't support. Use "
            "LoRA."
        )
    if any(getattr(c, "alora_invocation_tokens", None) for c in configs):
        raise ValueError(
            f"the adapter of {type(model).__name__} is an activated LoRA "
            "(`alora_invocation_tokens`), which searches for these tokens at every step and would "
            "switch off after the prompt. Use LoRA."
        )


def _cache_layers(config: Any) -> list[Any] | None:
    """Return the cache layers of a model with this config, or None if there are none."""
    try:
        return DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError):  # no number of layers, or unknown types
        return None


def _lengths_of(config: Any) -> tuple[int | None, int | None, bool]:
    """Return `context_length`, `rope_switch` and `rope_restarts` of `ModelTraits`."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters for all layers, or one per type of layer.
    for parameters in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        kind = parameters.get("rope_type")
        if kind == "longrope":
            switch = parameters.get("original_max_position_embeddings")
            return limit, switch or config.original_max_position_embeddings, True
        if kind == "dynamic":  # stretched to any length
            return None, limit, False
    return limit, None, False


def _padding_of(
    layers: Sequence[Any], config: Any, takes_position_ids: bool
) -> tuple[Literal["inside", "left", "none"], int | None]:
    """Return `padding` and `window` of `ModelTraits`."""
    # Layers that share another layer's keys hold nothing.
    layers = [layer for layer in layers if not isinstance(layer, _SHARING)]
    # A recurrent state can't be padded, and the effect of padding on other kinds is unknown.
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return "none", None
    if not takes_position_ids:
        return "left", None
    # GPT-Neo's local layers keep an ordinary cache and apply the window themselves.
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "left", None
    lengths = [layer.sliding_window for layer in layers if type(layer) is not DynamicLayer]
    return ("left", min(lengths)) if lengths else ("inside", None)


def _largest(config: Any, *names: str) -> int:
    """Return the largest value over all layers of the first field that is set, or 0."""
    for name in names:
        found: list[int] = []
        for layer in config.per_layer_config:
            value = getattr(layer, name, None)
            found += [] if value is None else [value] if isinstance(value, int) else value
        if found:
            return max(found)
    return 0


@contextmanager
def sampling_state(model: nn.Module, accelerator: Accelerator | None) -> Iterator[Any]:
    """Unwrap a model and prepare it for sampling; restore every module afterwards.

    The model is in eval mode without activation checkpointing, and its experts compute no balancing
    loss (meaningless for one token). Flags are restored per module, even after an exception, so a
    model in which only some modules train is unchanged.
    """
    modules: list[Any] = list(model.modules())
    were_training = [module.training for module in modules]
    configs = {id(c): c for m in modules if (c := m.__dict__.get("config")) is not None}.values()
    balancing = [c for c in configs if getattr(c, "output_router_logits", False)]
    with without_checkpointing(model), fast_linear_layers(model):
        try:
            for config in balancing:
                config.output_router_logits = False
            model.eval()
            yield model if accelerator is None else accelerator.unwrap_model(model)
        finally:
            for module, was_training in zip(modules, were_training, strict=True):
                module.training = was_training
            for config in balancing:
                config.output_router_logits = True


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Let a model keep its activations within this context.

    The flags of its modules are set directly: the methods of transformers lose which layers the user
    chose, and TRL's context calls them with arguments that they don't take, such as `every_n_layers`.
    """
    modules = [m for m in model.modules() if m.__dict__.get("gradient_checkpointing")]
    for module in modules:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def input_device(model: PreTrainedModel | PeftModel) -> torch.device:
    """Return the device that token ids go to."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.device


def without_adapters(model: Any) -> Any:
    """Return the model that PEFT has wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_whole_weights(model: nn.Module) -> bool:
    """Return whether all weights are in this process, and neither sharded nor on the meta device."""
    return all(
        p.numel() > 0 and p.device.type != "meta" and not isinstance(p, DTensor)
        for p in model.parameters()
    )
