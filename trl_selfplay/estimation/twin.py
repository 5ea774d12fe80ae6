"""Build a model without data: the shapes, precisions and adapters of the one that will train.

In: a model, its name or its configuration, and how it is loaded. Out: a `Twin` on the meta device,
whose forward creates tensors of the sizes that the model's would.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from trl_selfplay.disk import refuse_missing_path
from trl_selfplay.estimation.plan import CannotEstimateError, OwnStep

# Initializations of LoRA that compute on the weights, which a twin doesn't have.
_PLAIN_START = True
_QUANTIZED = ("Linear4bit", "Linear8bitLt")  # layers of bitsandbytes


@dataclass(frozen=True, slots=True)
class Twin:
    """A model on the meta device, and what its quantized weights need besides.

    Attributes:
        model: With its adapters.
        scales: Bytes of the scales of quantized weights.
        quantization: "nf4", "fp4" or "int8", or None.
    """

    model: Any
    scales: int
    quantization: str | None

    @property
    def causal_lm(self) -> Any:
        """The causal language model inside the adapters."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The weights that an optimizer gets."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def weight_bytes(self) -> int:
        """Size of all weights without those of adapters."""
        held = [*self.model.parameters(), *self.model.buffers()]
        return sum(t.nbytes for t in held) + self.scales - self.adapter_bytes

    @property
    def adapter_bytes(self) -> int:
        """Size of the trainable weights beside a base model."""
        if not isinstance(self.model, PeftModel):
            return 0
        return sum(p.nbytes for p in self.trainable)


def build_twin(
    model: Any, loading: Mapping[str, Any], peft_config: Any, own_step: OwnStep | None = None
) -> Twin:
    """Return the twin of a model that will be loaded, or is.

    Args:
        model: A name or folder, a configuration, or a model.
        loading: Arguments of `from_pretrained`: `dtype` (float32 if absent, as in TRL),
            `quantization_config`, `attn_implementation`, `revision`, `trust_remote_code`.
        peft_config: For new adapters, or None.
        own_step: Of a trainer that adds to the model, or None.

    Raises:
        CannotEstimateError: The weights are sharded, quantized in a way of which no size is known,
            or of a class that can't be built without data.
    """
    if isinstance(model, nn.Module):
        return _copy_live(model, peft_config, own_step)
    config = _read_config(model, loading)
    quantization = loading.get("quantization_config") or getattr(
        config, "quantization_config", None
    )
    causal_lm = _build(AutoModelForCausalLM.from_config, config, _dtype_of(loading, config))
    skipped = _kept_whole(causal_lm, quantization)
    scales, kind = 0, None
    if quantization is not None:
        quantization = _read_quantization(quantization)
        names = [
            name
            for name, module in causal_lm.named_modules()
            if type(module) is nn.Linear and not any(_is_in(name, skip) for skip in skipped)
        ]
        scales, kind = _quantize(causal_lm, names, quantization)
    kept: tuple[str, ...] = ("lora_magnitude_vector",)
    if own_step is not None:
        own_step.prepare_model(causal_lm)
        peft_config = None if peft_config is None else own_step.prepare_adapters(peft_config)
        kept += own_step.float32_names
    twin = _add_adapters(causal_lm, {} if peft_config is None else {"default": peft_config})
    if kind is not None:
        for name, parameter in twin.named_parameters():  # as TRL does
            if parameter.requires_grad and not any(part in name for part in kept):
                parameter.data = parameter.data.to(torch.bfloat16)
    return Twin(twin, scales, kind)


def _read_config(model: Any, loading: Mapping[str, Any]) -> Any:
    if isinstance(model, PretrainedConfig):
        config: Any = copy.deepcopy(model)
    elif isinstance(model, str):
        refuse_missing_path(model, "model")
        known = {k: loading[k] for k in ("revision", "trust_remote_code") if loading.get(k)}
        config = AutoConfig.from_pretrained(model, **known)
    else:
        raise TypeError(
            f"model is {model!r:.100}; it must be a model's id or folder as text, a configuration, "
            "or a loaded model."
        )
    if loading.get("attn_implementation"):
        config._attn_implementation = loading["attn_implementation"]
    return config


def _dtype_of(loading: Mapping[str, Any], config: Any) -> torch.dtype:
    dtype = loading.get("dtype", "float32")
    if dtype in ("auto", None):
        dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _build(build: Any, config: Any, dtype: torch.dtype) -> Any:
    try:
        with torch.device("meta"):
            model = build(config, dtype=dtype)
    except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        raise CannotEstimateError(
            f"{type(config).__name__} has no causal language model that can be built without its "
            f"weights: {error}"
        ) from error
    return model.train()


def _copy_live(model: Any, peft_config: Any, own_step: OwnStep | None) -> Twin:
    """Return the twin of a loaded model, with the precision of each of its weights."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise CannotEstimateError(f"{type(base).__name__} is no model of transformers.")
    if any(p.numel() == 0 or type(p.data).__name__ == "DTensor" for p in base.parameters()):
        raise CannotEstimateError("the weights are sharded over several devices.")
    adapters = dict(model.peft_config) if isinstance(model, PeftModel) else {}
    if peft_config is not None:
        adapters["default"] = peft_config
    config = copy.deepcopy(base.config)
    quantization = getattr(config, "quantization_config", None)
    causal_lm = _build(type(base)._from_config, config, base.dtype)
    scales, kind = 0, None
    if quantization is not None:
        quantized = [n for n, m in base.named_modules() if type(m).__name__ in _QUANTIZED]
        names = [name.removesuffix(".base_layer") for name in quantized]
        scales, kind = _quantize(causal_lm, names, _read_quantization(quantization))
    if own_step is not None:
        own_step.prepare_model(causal_lm)
        adapters = {name: own_step.prepare_adapters(each) for name, each in adapters.items()}
    twin = _add_adapters(causal_lm, adapters)
    if peft_config is None:
        precisions = dict(model.named_parameters())
        for name, parameter in twin.named_parameters():
            if (real := precisions.get(name)) is not None:
                parameter.data = torch.empty_like(real, device="meta")
                parameter.requires_grad_(real.requires_grad)
    return Twin(twin, scales, kind)


def _kept_whole(causal_lm: Any, quantization: Any) -> list[str]:
    """Return the modules that quantization leaves alone: the head, or those that are listed."""
    listed = getattr(quantization, "llm_int8_skip_modules", None)
    if listed:
        return list(listed)
    head = causal_lm.get_output_embeddings()
    return [name for name, module in causal_lm.named_modules() if module is head]


def _is_in(name: str, skipped: str) -> bool:
    return name == skipped or name.endswith(f".{skipped}") or name.startswith(f"{skipped}.")


def _read_quantization(quantization: Any) -> BitsAndBytesConfig:
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == "bitsandbytes":
        quantization = BitsAndBytesConfig.from_dict(dict(quantization))
    if not isinstance(quantization, BitsAndBytesConfig):
        raise CannotEstimateError(
            f"weights quantized by {type(quantization).__name__} have a size that isn't known here; "
            "those of bitsandbytes have."
        )
    return quantization


def _quantize(causal_lm: Any, names: list[str], how: BitsAndBytesConfig) -> tuple[int, str | None]:
    """Replace linear layers by quantized ones; return the bytes of their scales, and the kind."""
    from trl_selfplay.estimation.quantized import quantize  # loads bitsandbytes

    scales = quantize(causal_lm, names, how)
    causal_lm.is_loaded_in_4bit = how.load_in_4bit  # PEFT looks for these
    causal_lm.is_loaded_in_8bit = how.load_in_8bit
    return scales, how.bnb_4bit_quant_type if how.load_in_4bit else "int8"


def _add_adapters(causal_lm: Any, adapters: Mapping[str, Any]) -> Any:
    model = causal_lm
    for name, config in adapters.items():
        config = copy.deepcopy(config)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = _PLAIN_START
        config.inference_mode = False
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    return model.train()
