"""What the sampler must know about a model, and the state a model is in while it samples.

In: a model as the trainer holds it. Out: `ModelTraits`, read off its layers and its forward; a
context in which it is in eval mode without gradient checkpointing, and leaves as it came.
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
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin
from trl.models import unwrap_model_for_generation


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What decides how a model is sampled from.

    Attributes:
        padding: Where masked padding may stand in a row without changing what follows. "inside":
            every layer is full attention, so a common prefix may be computed once and shorter
            rests padded behind it. "left": some layer has a sliding window. "none": some layer is
            recurrent or a convolution, so rows that go together must be equally long.
        window: Most tokens for which the windows of "left" see everything, and so allow padding
            inside as well; None without windows, or where their length isn't known.
        cache_name: The forward's parameter that takes the cache.
        takes_position_ids: The forward has this parameter.
        takes_logits_to_keep: The forward can compute the last position's logits alone.
        context_length: Most tokens of prompt and completion, or None if the config has no limit.
        bytes_per_token: Keys and values of one token in all layers.
        bytes_per_prompt_token: Activations of one prompt token in the widest layer, estimated.
        vocab_size: Width of the logits.
    """

    padding: Literal["inside", "left", "none"]
    window: int | None
    cache_name: str
    takes_position_ids: bool
    takes_logits_to_keep: bool
    context_length: int | None
    bytes_per_token: int
    bytes_per_prompt_token: int
    vocab_size: int


def describe_model(model: nn.Module) -> ModelTraits:
    """Read the traits off an unwrapped model (a PEFT model is looked through).

    Raises:
        ValueError: The model can't be sampled from: encoder-decoder, multimodal, a state that is
            not in transformers' cache, or a prompt-learning adapter. The text names the class.
    """
    base: Any = model
    if hasattr(base, "peft_config"):
        learns_prompt = [c.peft_type for c in base.peft_config.values() if c.is_prompt_learning]
        if learns_prompt:
            raise ValueError(
                f"the adapter of {type(model).__name__} is of a kind that adds virtual tokens "
                f"({', '.join(map(str, learns_prompt))}), which the sampler doesn't support. Use "
                "LoRA."
            )
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
            f"{name} takes images or audio; self-play works on text. Load the language model alone "
            "(AutoModelForCausalLM of its text part)."
        )
    layers = DynamicCache(config=base.config).layers
    cache_name = next((n for n in ("past_key_values", "cache_params") if n in parameters), None)
    if cache_name is None or not layers:
        raise ValueError(
            f"{name} keeps its state in a form of its own instead of transformers' cache, so its "
            "samples could not be told apart in a batch. Use a model whose forward takes "
            "`past_key_values`."
        )
    padding, window = _padding_of(layers, config, "position_ids" in parameters)
    num_heads = _largest(getattr(config, "num_attention_heads", None) or config.num_heads)
    num_kv_heads = _largest(getattr(config, "num_key_value_heads", None)) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    item = base.dtype.itemsize
    # Feed-forward inner states dominate: gate, up and their product; four times the hidden size
    # where the config doesn't say.
    inner = _largest(getattr(config, "intermediate_size", None)) or 4 * config.hidden_size
    return ModelTraits(
        padding=padding,
        window=window,
        cache_name=cache_name,
        takes_position_ids="position_ids" in parameters,
        takes_logits_to_keep="logits_to_keep" in parameters,
        context_length=getattr(config, "max_position_embeddings", None),
        bytes_per_token=2 * len(layers) * num_kv_heads * head_dim * item,
        bytes_per_prompt_token=(3 * inner + 6 * config.hidden_size) * max(item, 4),
        vocab_size=config.vocab_size,
    )


def _padding_of(
    layers: Sequence[Any], config: Any, takes_position_ids: bool
) -> tuple[Literal["inside", "left", "none"], int | None]:
    """Return where padding may stand, and up to which length windows don't matter."""
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return "none", None
    if not takes_position_ids:
        return "left", None
    # GPT-Neo's local layers keep an ordinary cache and cut the window themselves.
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "left", None
    windows = [layer for layer in layers if type(layer) is not DynamicLayer]
    if not windows:
        return "inside", None
    lengths = [getattr(layer, "sliding_window", None) for layer in windows]
    known = [length for length in lengths if length is not None]
    return "left", min(known) if len(known) == len(lengths) else None


def _largest(value: int | list[int] | None) -> int:
    """Return a config value that some models give for each layer; 0 if it is absent."""
    if value is None:
        return 0
    return value if isinstance(value, int) else max(value)


@contextmanager
def sampling_state(model: nn.Module, accelerator: Accelerator | None) -> Iterator[Any]:
    """Unwrap a model, in eval mode and without gradient checkpointing, and restore every module.

    The flags of each module are put back one by one, so that a model in which some modules train
    and others don't leaves as it came, also after an exception.
    """
    modules: list[Any] = list(model.modules())
    were_training = [module.training for module in modules]
    # Flags are switched here rather than by transformers' methods, which would lose the user's
    # checkpointing arguments when they switch it on again.
    checkpointing = [m for m in modules if m.__dict__.get("gradient_checkpointing")]
    unwrapping = None
    try:
        for module in checkpointing:
            module.gradient_checkpointing = False
        unwrapped: Any = model
        if accelerator is not None:
            unwrapping = unwrap_model_for_generation(model, accelerator)
            unwrapped = unwrapping.__enter__()
        model.eval()
        yield unwrapped
    finally:
        if unwrapping is not None:
            # Left as if nothing was raised: TRL's context has no `finally` of its own.
            unwrapping.__exit__(None, None, None)
        for module, was_training in zip(modules, were_training, strict=True):
            module.training = was_training
        for module in checkpointing:
            module.gradient_checkpointing = True


def input_device(model: PreTrainedModel | PeftModel) -> torch.device:
    """Return the device that token ids go to."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.device
