"""Keep, restore and load the trainable weights between rounds.

In: a trainer's model (plain, PEFT, quantized base with PEFT). Out: the same model object with new values
in its trainable parameters. They are copied in place: a parameter is never replaced, so optimizer, hooks
and wrapped forwards stay attached.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import TrainableTokensWrapper, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from trl_selfplay.disk import BRING_BACK, checksum, naming_damage, refuse_changed, save_file_with
from trl_selfplay.rounds.gathered import whole_parameters

# In the metadata of the initial weights.
_CHECKSUM = "crc32"
# Initialisations that write into the base weights. A restart from the initial adapter, a resume
# in a new process and an engine that loads base and adapter apart would each see another base.
BASE_CHANGING_INITIALISATIONS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")
# Kinds of adapters that rounds would sample, train or restore wrongly, and why.
_REFUSED_KINDS = {
    "ADAPTION_PROMPT": "puts a prompt into attention, past the head whose log-probs TRL reads",
    "LILY": "weighs its experts by the mean over all tokens of a batch, those of later places and of "
    "other rows too",
    "POLY": "needs the ids of tasks in each forward, which neither the sampler nor TRL gives",
    "SHADOW": "carries a state of its own from layer to layer beside the cache that is sampled from",
    "XLORA": "runs each forward twice and without the cache that is sampled from",
}
_REFUSED_LORA_FIELDS = {
    "kasa_config": "takes singular values out of the base weights when the adapter is made",
    "arrow_config": "routes between adapters that have been trained, and trains none",
    "monteclora_config": "keeps a state beside its weights that training changes and no restart "
    "from the initial adapter restores",
    "velora_config": "keeps a state beside its weights that training changes and no restart from "
    "the initial adapter restores",
}


def check_peft_config(peft_config: Any) -> None:
    """Refuse PEFT methods that can't work over rounds.

    Raises:
        TypeError: The argument is no PeftConfig.
        ValueError: The method can't be used; the error says why and what to use.
    """
    if peft_config is None:
        return
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; pass a PeftConfig such as "
            "peft.LoraConfig()."
        )
    kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"peft_config of type {kind} adds virtual tokens, which the sampler doesn't support. "
            "Use LoRA."
        )
    if kind in _REFUSED_KINDS:
        raise ValueError(f"peft_config of type {kind} {_REFUSED_KINDS[kind]}. Use LoRA.")
    for name, reason in _REFUSED_LORA_FIELDS.items():
        if getattr(peft_config, name, None) is not None:
            raise ValueError(f"peft_config has {name}, which {reason}. Leave it out.")
    initialisation = getattr(peft_config, "init_lora_weights", True)
    if isinstance(initialisation, str) and initialisation.lower().startswith(
        BASE_CHANGING_INITIALISATIONS
    ):
        raise ValueError(
            f"init_lora_weights={initialisation!r} changes the base model's weights when the "
            "adapter is made. Each round starts again from the initial adapter on the unchanged "
            "base, and a resumed run loads that base from its source, so the two would not fit. "
            'Use init_lora_weights=True, "gaussian" or "orthogonal".'
        )


def check_head(model: Any) -> None:
    """Refuse adapters on the head that TRL's log-probs would leave out.

    Raises:
        ValueError: With what to change.
    """
    head = model.get_output_embeddings() if isinstance(model, PeftModel) else None
    trains_tokens_of_head = isinstance(head, TrainableTokensWrapper)
    if trains_tokens_of_head:
        raise ValueError(
            "`trainable_token_indices` reaches the head (lm_head by name, or embeddings that it is "
            "tied to), and TRL computes log-probs from the head's own weight, without the tokens "
            "that train. Give the indices of untied embeddings alone, or use "
            'modules_to_save=["embed_tokens", "lm_head"].'
        )


# A weight that starts near 0 or at random, such as LoRA's, loses little in bfloat16.
_FACTORS = re.compile(r"\.lora_(embedding_)?[ABE]\.")  # E: AdaLoRA's
_OF_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")


def unrounded_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of the weights that `undo_rounding` gives back to a model with adapters."""
    if not isinstance(model, PeftModel) or not _is_rounded(model):
        return {}
    weights = trainable_parameters(model).items()
    return {n: p.detach().clone() for n, p in weights if not _FACTORS.search(n)}


def undo_rounding(model: Any, unrounded: Mapping[str, torch.Tensor]) -> None:
    """Give back their precision to trainable weights of a quantized model but for LoRA's factors.

    TRL rounds all of them to bfloat16, where the small updates of weights around 1 (IA3, norms), of
    embeddings and of heads are lost, and a head no longer fits the states that it gets. TRL spares
    DoRA's magnitudes alone: https://github.com/huggingface/trl/pull/7272. Remove when it spares
    everything but LoRA's factors.

    Args:
        model: As the parent has built it.
        unrounded: From `unrounded_weights`, before that.
    """
    if not _is_rounded(model):
        return
    weights = dict(model.named_parameters())
    for name, parameter in trainable_parameters(model).items():
        original = weights[_OF_SAVED_MODULE.sub(".original_module.", name)]
        if name in unrounded:
            parameter.data = unrounded[name].to(parameter.device)
        elif original is not parameter:
            parameter.data = original.detach().clone()
        elif not _FACTORS.search(name):
            parameter.data = parameter.data.float()  # as PEFT makes them


def _is_rounded(model: Any) -> bool:
    return any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def nonfinite_weights(model: nn.Module) -> list[str]:
    """Return the names of trainable parameters that hold NaN or infinity."""
    with whole_parameters(model):
        weights = trainable_parameters(model).items()
        return [name for name, weight in weights if not bool(weight.detach().isfinite().all())]


def save_trainable(model: nn.Module, path: Path, is_main: bool = True) -> None:
    """Write the trainable parameters to one safetensors file atomically.

    Args:
        model: In all processes, each of which may hold a part of the weights.
        path: The file.
        is_main: Whether this process writes.
    """
    with whole_parameters(model):
        if is_main:
            parameters = trainable_parameters(model).items()
            weights = {n: p.detach().cpu().contiguous() for n, p in parameters}
            told = {_CHECKSUM: _checksum(weights)}
            save_file_with(path, lambda temporary: save_file(weights, temporary, told))


def load_trainable(model: nn.Module, path: Path) -> None:
    """Load the parameters saved by `save_trainable` into the model, bit for bit.

    Raises:
        DamagedFileError: The file can't be read.
        ValueError: The file holds other parameters than the model trains.
    """
    with naming_damage(path, BRING_BACK):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}  # none of earlier versions
        if told.get(_CHECKSUM) not in (None, _checksum(tensors)):
            raise ValueError("its weights have changed since they were written")
    copy_into(model, tensors, str(path))


def _checksum(weights: Mapping[str, torch.Tensor]) -> str:
    ordered = (weights[name] for name in sorted(weights))
    return checksum(tensor.flatten().view(torch.uint8).numpy().data for tensor in ordered)


def reload_initial_weights(model: Any, args: Any, saved: Path) -> None:
    """Reset the trainable weights to those before round 0.

    Args:
        model: The trainer's model.
        args: The trainer's arguments, which say how the model was loaded.
        saved: File of `save_trainable`; if it doesn't exist, weights are read from their source.
    """
    if saved.exists():
        load_trainable(model, saved)
        return
    source = model.config.name_or_path
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    _copy_from_pretrained(model, source, **kwargs)


@contextmanager
def initial_weights_in_place(model: Any, args: Any, saved: Path) -> Iterator[None]:
    """Let the model have the weights from before round 0 within this context.

    Args:
        model: The trainer's model.
        args: See `reload_initial_weights`, as for `saved`.
        saved: File of `save_trainable`, if there is one.
    """
    with other_weights_in_place(model, lambda: reload_initial_weights(model, args, saved)):
        yield


@contextmanager
def other_weights_in_place(model: nn.Module, load: Callable[[], object]) -> Iterator[None]:
    """Let the model have the trainable weights that `load` gives it within this context.

    Its present ones wait in the CPU's memory, and return bit for bit.
    """
    held = {n: p.detach().to("cpu", copy=True) for n, p in trainable_parameters(model).items()}
    try:
        load()
        yield
    finally:
        copy_into(model, held, "the copy of the present weights")


@torch.no_grad()
def copy_into(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy tensors into the model's trainable parameters of the same names.

    Raises:
        ValueError: A trainable parameter is missing from `tensors` or has another shape.
    """
    with whole_parameters(model):
        for name, parameter in trainable_parameters(model).items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise ValueError(
                    f"{source} has {found} for the parameter {name}, the model has "
                    f"{tuple(parameter.shape)}: it belongs to another model or PEFT configuration."
                )
            parameter.copy_(tensors[name].to(parameter.device, parameter.dtype))


def load_saved_model(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a model or adapter saved by `Trainer.save_model` into `model`.

    Raises:
        DamagedFileError: The weights can't be read.
        ValueError: The folder holds another model.
    """
    with naming_damage(folder, BRING_BACK):
        refuse_changed(folder)
    if isinstance(model, PeftModel):
        for adapter in model.peft_config:
            # As PEFT saves them: an adapter of another name has a folder of that name.
            place = folder if adapter == "default" else folder / adapter
            with naming_damage(place, BRING_BACK):
                weights = load_peft_weights(str(place), device="cpu")
            with whole_parameters(model):
                outcome: Any = set_peft_model_state_dict(model, weights, adapter_name=adapter)
            if outcome.unexpected_keys:
                raise ValueError(
                    f"{place} holds adapter weights that the model lacks, such as "
                    f"{outcome.unexpected_keys[0]}: it belongs to another PEFT configuration."
                )
        return
    with naming_damage(folder, BRING_BACK):
        # Without it transformers builds the model that its class has by default: 27 GB for a Llama.
        (folder / "config.json").stat()
        _copy_from_pretrained(model, folder)


def _copy_from_pretrained(model: nn.Module, source: str | Path, **kwargs: Any) -> None:
    """Copy weights as they were saved, without a second model on the accelerator.

    The model's own class needs no registry and no leave to run code from the folder.
    """
    model_class: Any = type(model)
    if not is_deepspeed_zero3_enabled():  # which divides what is loaded
        kwargs["device_map"] = "cpu"
    loaded = model_class.from_pretrained(source, **{**kwargs, "dtype": "auto"})
    with whole_parameters(loaded, trainable=False):
        copy_into(model, dict(loaded.named_parameters()), str(source))


@contextmanager
def adapters_keep_dtypes(model: Any) -> Iterator[None]:
    """Keep the precision of adapters that the parent loads within this context.

    `PeftModel.load_adapter`, which loads a checkpoint on resume and the best one at the end, casts
    adapters to float32 by default (https://github.com/huggingface/peft/pull/1706), but TRL trains
    those of a quantized model in bfloat16. Remove when transformers' Trainer keeps their precision.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    load = model.load_adapter

    def load_and_cast(*args: Any, **kwargs: Any) -> Any:
        outcome = load(*args, **kwargs)
        for name, parameter in model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])
        return outcome

    model.load_adapter = load_and_cast  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.load_adapter
