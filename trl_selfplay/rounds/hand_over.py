"""Hand the current weights to an engine that loads them from disk, each version once.

In: the trainer's model. Out: `EngineWeights`: the base model's source with the adapter's folder, or the
folder of a copy of the whole policy where the engine can't load the adapter. They lie in a folder of
their own, with the adapter of the version before for comparison.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from trl_selfplay.disk import naming_damage, replace_folder, save_text, saying_what_is_kept
from trl_selfplay.generation.engine import EngineWeights
from trl_selfplay.generation.model_traits import without_adapters
from trl_selfplay.rounds.weights import (
    load_saved_model,
    other_weights_in_place,
    trainable_parameters,
)
from trl_selfplay.rounds.whole_copy import save_whole_copy, whole_weights

logger = logging.getLogger(__name__)

# Of an adapter's layers, in vLLM 0.32.
LARGEST_RANK = 512
# Fields of a LoRA configuration that vLLM doesn't serve, and the values at which they do nothing.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "modules_to_save": (None, []),
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_bdlora": (None,),
    "use_qalora": (False,),
    "megatron_config": (None,),
}


@dataclass(slots=True)
class _Version:
    """What was handed over last, and the state of the weights then."""

    weights: EngineWeights
    counters: tuple[tuple[int, int], ...]


class HandOver:
    """Writes the current weights where an engine reads them.

    A call writes them if they have changed since the last one, and returns where they are. A version
    is a digest of all trainable weights. It is computed again only where a counter of PyTorch's says
    that one was written to, or after `forget`: optimizers write past these counters.

    Args:
        model: Returns the unwrapped model.
        folder: Where the weights go; nothing else may be in it.
        source: Folder of the base weights, or None to write a copy of them, once.
        dtype: Precision of copies.
    """

    def __init__(
        self, model: Callable[[], Any], folder: Path, source: str | None, dtype: torch.dtype
    ) -> None:
        self._model = model
        self._folder = folder
        self._source = source
        self._dtype = dtype
        self._current: _Version | None = None
        self._previous: str | None = None
        self._base: str | None = None

    def __call__(self) -> EngineWeights:
        """Return the current weights, written to disk.

        Raises:
            OSError: The disk is full.
        """
        model = self._model()
        counters = _counters(model)
        if self._current is not None and self._current.counters == counters:
            return self._current.weights
        version = digest_trainable(model)
        weights = self._write(model, version)
        self._previous = self._append(version)
        self._current = _Version(weights, counters)
        self._delete_all_but({version, self._previous, self._base})
        return weights

    def forget(self) -> None:
        """Delete whole copies, which no engine reads any more; read the weights anew next time."""
        for copied in self._folder.glob("*/model"):
            shutil.rmtree(copied, ignore_errors=True)
        if self._current is not None:
            self._current.counters = ()

    def previous(self) -> AbstractContextManager[None] | None:
        """Return a context with the weights of the version before; None if they aren't on disk."""
        model = self._model()
        if self._previous is None or not isinstance(model, PeftModel):
            return None
        folder = self._folder / self._previous / "adapter"
        if not folder.exists():
            return None
        return other_weights_in_place(model, lambda: load_saved_model(model, folder))

    def _append(self, version: str) -> str | None:
        """Write the order of versions, in which this one is the last; return the one before."""
        path, before = self._folder / "versions.json", []
        if path.exists():
            with naming_damage(path, "Delete it; the next check is without the weights before."):
                before = [other for other in json.loads(path.read_text()) if other != version]
        order = [*before, version][-2:]
        save_text(path, json.dumps(order))
        return order[0] if len(order) == 2 else None

    def _write(self, model: Any, version: str) -> EngineWeights:
        folder = self._folder / version
        adapters = folder / "adapter"
        if isinstance(model, PeftModel):
            if not adapters.exists():
                with _whole(adapters) as temporary:
                    model.save_pretrained(str(temporary), save_embedding_layers=False)
            if why_copied(model) is None:
                [name] = model.active_adapters
                return EngineWeights(
                    model=self._source or self._copy_of_base(model),
                    adapter=adapters if name == "default" else adapters / name,
                    adapter_rank=_largest_rank(model, name),
                    version=version,
                )
        if not (folder / "model").exists():
            save_whole_copy(model, folder / "model", self._dtype)
        return EngineWeights(str(folder / "model"), None, 0, version)

    def _copy_of_base(self, model: Any) -> str:
        """Return the folder of a copy of the base, whose name tells its weights and precision."""
        if self._base is None:
            base = without_adapters(model)
            state = f"{self._dtype} {base.config.to_json_string()}"
            self._base = f"base-{_digest(whole_weights(base, merged=False), state)}"
        folder = self._folder / self._base
        if not folder.exists():
            for other in self._folder.glob("base*"):  # of another model or precision
                shutil.rmtree(other, ignore_errors=True)
            save_whole_copy(model, folder, self._dtype, merged=False)
        return str(folder)

    def _delete_all_but(self, names: set[str | None]) -> None:
        for folder in self._folder.iterdir():
            if folder.is_dir() and folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)


def why_copied(model: Any) -> str | None:
    """Return why an engine can't load what is trained as a LoRA adapter; None if it can."""
    if not isinstance(model, PeftModel):
        return "all weights are trained"
    if len(model.active_adapters) != 1:
        return "several adapters are active"
    [name] = model.active_adapters
    config: Any = model.peft_config[name]
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"the adapter is of type {kind}"
    for field, values in _NOT_SERVED.items():
        if (value := getattr(config, field, values[0])) not in values:
            return f"the adapter has {field}={value!r}"
    if (rank := _largest_rank(model, name)) > LARGEST_RANK:
        return f"the adapter's rank is {rank}, and vLLM serves at most {LARGEST_RANK}"
    outside = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    if any(id(module) in outside and hasattr(module, "base_layer") for module in model.modules()):
        return "embeddings or the head have an adapter"
    return None


def digest_trainable(model: nn.Module) -> str:
    """Return a digest of all bytes of the trainable weights, and of their names."""
    return _digest(sorted(trainable_parameters(model).items()))


@torch.no_grad()
def _digest(weights: Iterable[tuple[str, torch.Tensor]], state: str = "") -> str:
    digest = hashlib.blake2b(state.encode(), digest_size=8)
    for name, weight in weights:
        digest.update(name.encode())
        values = weight.detach().contiguous().view(-1).view(torch.uint8).cpu()
        digest.update(values.numpy().data)
    return digest.hexdigest()


def _counters(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return, for each trainable parameter, where it is and how often it was written to."""
    weights = trainable_parameters(model).values()
    return tuple((weight.data_ptr(), weight._version) for weight in weights)


def _largest_rank(model: Any, name: str) -> int:
    ranks = [
        layer.r[name] for layer in model.modules() if name in (getattr(layer, "r", None) or {})
    ]
    return max(ranks, default=0)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the name of `folder` once it is whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with saying_what_is_kept(folder.parent):
        yield temporary
        replace_folder(temporary, folder)
