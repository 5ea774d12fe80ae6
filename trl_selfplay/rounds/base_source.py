"""Find the folder from which an engine can load the base weights as the trainer has them.

In: the trainer's model and its name. Out: a folder, or None if no folder has these weights. Rows of all
unquantized weights are compared with the files, so that a base changed in memory isn't taken for the
one it was loaded from.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from trl_selfplay.generation.model_traits import without_adapters
from trl_selfplay.rounds.whole_copy import without_quantization

logger = logging.getLogger(__name__)

# Compared of each weight, at equal distances.
_NUM_ROWS = 8
# Precisions in which a model may have been loaded before it was cast to the one it has.
_PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
# Parts of a name that PEFT has put into it.
_OF_PEFT = frozenset(("base_layer", "original_module", "token_adapter"))


def find_source(
    model: Any,
    given: Any,
    revision: str | None,
    quantization: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> str | None:
    """Return the folder with the base weights as the trainer has them; None if there is none.

    A loaded model doesn't tell its revision: the one in the cache whose weights are its own is taken.
    Weights that bitsandbytes has quantized on disk are none that every engine reads. Quantized layers
    aren't compared. Without safetensors nothing is: then a name is believed, a loaded model isn't.

    Args:
        model: The trainer's model.
        given: The model as the trainer's constructor got it, a name or a loaded model.
        revision: Commit, branch or tag on the hub.
        quantization: The engine's.
        trust_remote_code: Whether code from the model's repository may run.
    """
    base = without_adapters(model)
    is_name = isinstance(given, str)
    name = given if is_name else base.config.name_or_path
    if not name:
        return None
    others = []
    for folder in dict.fromkeys(_folders(name, revision, every=not is_name)):
        if not _has_config_of(base, folder, quantization, trust_remote_code):
            continue
        same = _has_weights_of(base, folder)
        if same or (same is None and is_name):
            return str(folder)
        others.append(f"{folder} ({'can not be compared' if same is None else 'differ'})")
    if others:
        logger.warning(
            "the base weights in memory aren't known to be those in %s; an engine gets a copy of them.",
            ", ".join(others),
        )
    return None


def _folders(name: str, revision: str | None, *, every: bool) -> Iterator[Path]:
    """Yield where the model may be, in the order of preference."""
    try:
        # In the cache, where loading the model has put it: other files may be on the hub by now.
        path = cached_file(name, "config.json", revision=revision, local_files_only=True)
        yield Path(str(path)).parent
    except (OSError, ValueError):
        pass
    if every and not Path(name).exists():
        from huggingface_hub import constants  # comes with transformers

        repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        yield from sorted(path.parent for path in repository.glob("snapshots/*/config.json"))


def _has_config_of(
    base: Any, folder: Path, quantization: str | None, trust_remote_code: bool
) -> bool:
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return False
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method == "bitsandbytes" and quantization != method:
        return False
    # Tokens were added, or it is another model under this name.
    size = getattr(config.get_text_config(), "vocab_size", None)
    is_size = size == base.get_input_embeddings().weight.shape[0]
    return is_size and config.model_type == base.config.model_type


@torch.no_grad()
def _has_weights_of(base: nn.Module, folder: Path) -> bool | None:
    """Return whether rows of all weights are those of the files; None if none could be compared."""
    file_of = _files(folder)
    weights = {name: tensor for name, tensor in _dense_weights(base) if tensor.dim() in (1, 2)}
    compared = False
    for name, tensor in revert_weight_conversion(without_quantization(base), weights).items():
        if name not in file_of:
            continue
        with safe_open(file_of[name], "pt") as file:
            rows = file.get_slice(name)
            if list(tensor.shape) != rows.get_shape():
                continue
            chosen = _rows(tensor)
            stored = torch.cat([rows[part] for part in chosen])
        if stored.dtype not in _PRECISIONS:
            continue
        held = torch.cat([tensor[part] for part in chosen]).cpu()
        if not any(torch.equal(stored.to(dtype).to(held.dtype), held) for dtype in _PRECISIONS):
            return False
        compared = True
    return compared or None


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each weight."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        names = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in names.items() if (folder / file).exists()}
    if not single.exists():
        return {}
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _dense_weights(base: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that aren't quantized, by their names without PEFT."""
    for name, parameter in base.named_parameters():
        if type(parameter) is nn.Parameter and parameter.dtype in _PRECISIONS:
            parts = name.split(".")
            yield ".".join(part for part in parts if part not in _OF_PEFT), parameter


def _rows(tensor: torch.Tensor) -> list[slice]:
    """Return what to compare: all of a vector, some rows of a matrix, the last one among them."""
    if tensor.dim() == 1:
        return [slice(None)]
    step, last = max(1, len(tensor) // _NUM_ROWS), len(tensor) - 1
    return [slice(row, row + 1) for row in sorted({*range(0, last, step), last})]
