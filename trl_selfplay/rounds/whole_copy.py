"""Write the whole policy, adapters merged and quantized weights dequantized, as a model to load.

In: the trainer's model, which isn't changed. Out: a folder in the format of `save_pretrained`. One
tensor at a time is merged and cast, and one file at a time is in memory, except for families whose
checkpoints are laid out differently from the model.
"""

import copy
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from trl_selfplay.disk import replace_folder, saying_what_is_kept
from trl_selfplay.generation.model_traits import without_adapters

_BYTES_PER_FILE = 2**30
_DEQUANTIZED = ("Params4bit", "Int8Params")


def save_whole_copy(model: Any, folder: Path, dtype: torch.dtype, *, merged: bool = True) -> None:
    """Write the policy as a model without adapters and without quantization.

    Args:
        model: The unwrapped model, with or without PEFT; its weights are all in this process.
        folder: Where the copy goes; it is there whole or not at all.
        dtype: Precision of the copy's floating-point weights.
        merged: Whether adapters are merged into the copy, or left out of it.

    Raises:
        OSError: The disk is too full for it. Nothing is left of the copy.
        ValueError: The weights are quantized in a way that can't be undone here.
    """
    base = without_adapters(model)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with saying_what_is_kept(folder):
            _refuse_full_disk(base, temporary, dtype)
            names = _write_weights(base, temporary, dtype, merged)
            _write_config(base, temporary, dtype, names)
            replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def whole_weights(base: nn.Module, *, merged: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight and persistent buffer once, as the policy's forward uses it.

    Args:
        base: The model in which PEFT has put its layers, or one without.
        merged: With what PEFT adds to them, or without.
    """
    yield from _whole_weights("", base, merged, set())


def _whole_weights(
    prefix: str, module: nn.Module, merged: bool, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper | TrainableTokensWrapper):
        for name, whole in _plain(module, merged).items():
            yield prefix + name, whole
        return
    fleeting = module._non_persistent_buffers_set
    held = [*module._parameters.items(), *module._buffers.items()]
    for name, tensor in held:
        if tensor is None or id(tensor) in seen or name in fleeting:
            continue  # tied to another weight, or not saved
        seen.add(id(tensor))
        is_weight = name == "weight" and type(tensor).__name__ in _DEQUANTIZED
        yield prefix + name, dequantize_module_weight(module) if is_weight else tensor
    for name, child in module.named_children():
        yield from _whole_weights(f"{prefix}{name}.", child, merged, seen)


@torch.no_grad()
def _plain(module: Any, merged: bool) -> dict[str, torch.Tensor]:
    """Return the weights of a layer that PEFT has wrapped, with or without what PEFT adds to them."""
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters if merged else ()
        inner = module.modules_to_save[active[0]] if active else module.original_module
        return dict(whole_weights(inner))
    if isinstance(module, TrainableTokensWrapper):
        return _plain(module.token_adapter, merged)
    base = module.get_base_layer()
    if not merged:
        return dict(whole_weights(base))
    if type(getattr(base, "weight", None)).__name__ in _DEQUANTIZED:
        return {**dict(whole_weights(base)), "weight": _merged_into_dequantized(module, base)}
    _refuse_packed(base)
    copied = copy.deepcopy(module)  # one layer; the trainer's own stays as it is
    for layer in copied.modules():
        if isinstance(layer, BaseTunerLayer) and not layer.merged:
            layer.merge()
    return dict(whole_weights(copied.get_base_layer()))


def _merged_into_dequantized(layer: Any, base: nn.Module) -> torch.Tensor:
    """Return the weight that PEFT's layer over a quantized one stands for, not quantized again."""
    weight = dequantize_module_weight(base)
    for adapter in layer.active_adapters:
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if variant is not None:
            weight = variant.merge_safe(layer, adapter, weight)
        elif hasattr(layer, "get_delta_weight") and adapter in layer.lora_A:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def _refuse_packed(base: nn.Module) -> None:
    """Raise ValueError for a layer whose weight isn't a plain matrix (GPTQ, AWQ and others)."""
    weights = [*base.parameters(), *base.buffers()]
    if not any(weight.is_floating_point() and weight.dim() > 1 for weight in weights):
        raise ValueError(
            f"an engine needs a whole copy of this policy, and {type(base).__name__} can't be "
            "dequantized. Use LoRA without DoRA, bias and modules_to_save, which an engine loads "
            "beside the base model, or set use_vllm=False."
        )


def _write_weights(base: Any, folder: Path, dtype: torch.dtype, merged: bool) -> set[str]:
    """Write the weights in files of bounded size; return their names in the model."""
    names: set[str] = set()

    def cast() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in whole_weights(base, merged=merged):
            names.add(name)
            tensor = tensor.detach().cpu()
            yield name, (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()

    files: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(part, name))
        part.clear()

    for name, tensor in _as_in_checkpoints(base, cast()):
        if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > _BYTES_PER_FILE:
            flush()
        part[name] = tensor
    flush()
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return names


def _as_in_checkpoints(
    base: Any, weights: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights by the names, and in the form, that the family's checkpoints have."""
    dense = without_quantization(base)
    conversions = get_model_conversion_mapping(dense, add_legacy=False)
    if any(isinstance(conversion, WeightConverter) for conversion in conversions):
        yield from revert_weight_conversion(dense, dict(weights)).items()  # experts are stacked
        return
    for name, tensor in weights:
        yield from revert_weight_conversion(dense, {name: tensor}).items()


def without_quantization(base: Any) -> Any:
    """Return the model, or one like it whose layers aren't quantized, without weights."""
    if not hasattr(base.config, "quantization_config"):
        return base
    with torch.device("meta"):  # what a quantized model was loaded with can't be reverted
        return type(base)(_dense_config(base))


def _dense_config(base: Any) -> Any:
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _write_config(base: Any, folder: Path, dtype: torch.dtype, names: set[str]) -> None:
    config = _dense_config(base)
    config.dtype = dtype
    config.architectures = [type(base).__name__]
    # An embedding or a head that was trained apart from the other is no longer tied to it.
    tied = getattr(base, "_tied_weights_keys", None) or {}
    if any(name in names for name in tied):
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if base.generation_config is not None:
        (folder / "generation_config.json").write_text(base.generation_config.to_json_string())


def _refuse_full_disk(base: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Raise OSError if the copy won't fit on the disk, before anything is written."""
    count = sum(num_weights(parameter) for parameter in base.parameters())
    needed, free = count * dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"No space left: a copy of the policy takes {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free",
        )


def num_weights(parameter: torch.Tensor) -> int:
    """Return the number of weights in a parameter, also where 4-bit ones are packed in bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
