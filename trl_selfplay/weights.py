"""Keep, restore and load the trainable weights between rounds.

In: a trainer's model (plain, PEFT, quantized base with PEFT). Out: the same model object with
other numbers in its trainable parameters, copied in place: a parameter is never replaced, so
optimizer, hooks and wrapped forwards stay attached.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

# Initialisations that write into the base weights. A restart from the initial adapter, a resume
# in a new process and an engine that loads base and adapter apart would each see another base.
BASE_CHANGING_INITIALISATIONS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")


def check_peft_config(peft_config: PeftConfig | None) -> None:
    """Refuse LoRA initialisations that change the base weights.

    Raises:
        ValueError: Naming the initialisation and why it can't be used over rounds.
    """
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


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def first_nonfinite(model: nn.Module) -> str | None:
    """Return the name of a trainable parameter that holds NaN or infinity, None if none does."""
    for name, parameter in trainable_parameters(model).items():
        if not bool(parameter.detach().isfinite().all()):
            return name
    return None


def save_trainable(model: nn.Module, path: Path) -> None:
    """Write the trainable parameters to one safetensors file, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(
        {n: p.detach().cpu().contiguous() for n, p in trainable_parameters(model).items()},
        temporary,
    )
    temporary.replace(path)


def load_trainable(model: nn.Module, path: Path) -> None:
    """Copy what `save_trainable` wrote into the model, bit for bit.

    Raises:
        ValueError: The file holds other parameters than the model trains.
    """
    copy_into(model, load_file(path), str(path))


def reload_initial_weights(model: Any, args: Any, saved: Path) -> None:
    """Set the trainable weights back to what they were before round 0.

    Args:
        model: The trainer's model.
        args: Its arguments, which say how the model was loaded.
        saved: Where `save_trainable` wrote them; if it didn't, they are read from their source.
    """
    if saved.exists():
        load_trainable(model, saved)
        return
    source = model.config.name_or_path
    kwargs = {**(args.model_init_kwargs or {}), "dtype": "auto", "device_map": "cpu"}
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    loaded = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    copy_into(model, dict(loaded.named_parameters()), source)


@torch.no_grad()
def copy_into(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy tensors into the model's trainable parameters of the same names.

    Raises:
        ValueError: A trainable parameter is missing from `tensors` or has another shape.
    """
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
        ValueError: The folder holds another model.
    """
    if isinstance(model, PeftModel):
        outcome: Any = set_peft_model_state_dict(
            model, load_peft_weights(str(folder), device="cpu")
        )
        if outcome.unexpected_keys:
            raise ValueError(
                f"{folder} holds adapter weights that the model lacks, such as "
                f"{outcome.unexpected_keys[0]}: it belongs to another PEFT configuration."
            )
        return
    # From disk as it was saved, without a second model on the accelerator.
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
    copy_into(model, dict(loaded.named_parameters()), str(folder))


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name; an older one of that name goes first."""
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
