"""Put whole weights in place where training divides them over processes: DeepSpeed ZeRO-3 and FSDP2.

In: a trainer, or its model. Out: contexts in which every process has all weights, to be entered by all
processes at once. A phase that samples or scores enters one and gathers once; within it processes
may run the model as often as each needs. Training shards the weights again.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import strtobool
from trl.models import unwrap_model_for_generation

from trl_selfplay.generation.model_traits import has_whole_weights, without_checkpointing


def zero_stage(trainer: Any) -> int | None:
    """Return the ZeRO stage that a trainer trains with, None without DeepSpeed."""
    if not trainer.is_deepspeed_enabled:
        return None
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage)


def shards_weights(trainer: Any) -> bool:
    """Return whether a trainer's training divides the weights over processes."""
    return bool(trainer.is_fsdp_enabled) or zero_stage(trainer) == 3


def check_sharding(trainer: Any, refused: str | None = None) -> None:
    """Refuse ways of sharding that rounds can't work with, or that accelerate left out in silence.

    Args:
        trainer: As the parent has built it.
        refused: Why its method can't train sharded weights; None: it can.

    Raises:
        ValueError: With what to set instead.
    """
    _refuse_left_out(trainer)
    if refused and shards_weights(trainer):
        raise ValueError(
            f"{type(trainer).__name__} can't train weights that are divided over processes (FSDP, "
            f"DeepSpeed ZeRO-3): {refused}. Use DDP or ZeRO-2."
        )
    quantized = getattr(trainer.model.config, "quantization_config", None) is not None
    if quantized and shards_weights(trainer):
        raise ValueError(
            "quantized weights can't be divided over processes and gathered again (FSDP, DeepSpeed "
            "ZeRO-3). Train them with DDP or ZeRO-2: a 4-bit model takes a quarter of the memory on "
            "each GPU."
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer.accelerator.state.fsdp_plugin)
    if zero_stage(trainer) == 3:
        settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        if not settings["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "ZeRO-3 without stage3_gather_16bit_weights_on_model_save keeps no model that could be "
                "loaded. Set it to true in the DeepSpeed configuration (zero3_save_16bit_model in "
                "accelerate's)."
            )


def _refuse_left_out(trainer: Any) -> None:
    """Raise ValueError where sharding was asked for and accelerate trains without it."""
    wanted = {
        "FSDP": (bool(trainer.args.fsdp), "ACCELERATE_USE_FSDP", trainer.is_fsdp_enabled),
        "DeepSpeed": (
            bool(trainer.args.deepspeed),
            "ACCELERATE_USE_DEEPSPEED",
            trainer.is_deepspeed_enabled,
        ),
    }
    for name, (in_config, variable, is_on) in wanted.items():
        if (in_config or strtobool(os.environ.get(variable, "false"))) and not is_on:
            raise ValueError(
                f"{name} was asked for, and accelerate trains without it on this device "
                f"({trainer.accelerator.device}, {trainer.accelerator.num_processes} processes): each "
                "process would hold all weights. Start it on accelerators and with a launcher, or use "
                "DDP (recipes/accelerate/ddp.yaml)."
            )


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version}: its weights can't be gathered for a phase. Set "
            "fsdp_version: 2."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading=true loads the weights in one process only, and all sample "
            "before the first training. Set it to false."
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type={plugin.state_dict_type}: rounds keep models that can be loaded. "
            "Set FULL_STATE_DICT."
        )


@contextmanager
def whole_weights_in_place(trainer: Any) -> Iterator[None]:
    """Let every process have all weights of the trainer's model on its device, to be read.

    The copy is as large as the model in the precision of its forward, and is freed at the end. A
    model that training hasn't divided yet is moved to the device. All processes must enter.
    """
    model = trainer.model
    if has_whole_weights(model):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            model.to(trainer.accelerator.device)  # the parent leaves that to its training
        yield
    elif _is_partitioned(model):
        wrapped, accelerator = trainer.model_wrapped, trainer.accelerator
        with without_checkpointing(model):
            gathering = unwrap_model_for_generation(wrapped, accelerator)
            gathering.__enter__()
            try:
                yield
            finally:
                # Exit as if nothing was raised: TRL's context cleans up without a `finally`. Remove
                # when https://github.com/huggingface/trl/issues/6659 is fixed in the oldest
                # supported TRL.
                gathering.__exit__(None, None, None)
    else:
        with _unsharded(model, trainer.accelerator.state.fsdp_plugin):
            yield


@contextmanager
def _unsharded(model: Any, plugin: Any) -> Iterator[None]:
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.set_reshard_after_forward(False)
    try:
        for unit in units:
            unit.unshard()
        yield
    finally:
        if hasattr(model, "reset_iter_state"):  # torch 2.13; else it waits for the next backward
            model.reset_iter_state()
        for unit in units:
            unit.reshard()
        # As accelerate sets it: the root and the head's group stay whole between both passes.
        model.set_reshard_after_forward(plugin.reshard_after_forward)
        for unit in (model, model.get_output_embeddings()):
            if isinstance(unit, FSDPModule):
                unit.set_reshard_after_forward(False, recurse=False)


@contextmanager
def whole_parameters(model: nn.Module, *, trainable: bool = True) -> Iterator[None]:
    """Let a model's parameters be whole in every process, in the precision in which they train.

    What is written into them is kept, that of the main process with ZeRO-3. All processes must enter.

    Args:
        model: Without wrappers.
        trainable: Only those that train; False: all.
    """
    chosen = [p for p in model.parameters() if p.requires_grad or not trainable]
    if _is_partitioned(model):
        import deepspeed

        with deepspeed.zero.GatheredParameters(chosen, modifier_rank=0):
            yield
    elif any(isinstance(p, DTensor) for p in chosen):
        with _replaced(model, {id(p) for p in chosen}):
            yield
    else:
        with nullcontext():
            yield


@contextmanager
def _replaced(model: nn.Module, chosen: set[int]) -> Iterator[None]:
    """Put whole parameters in the place of FSDP2's shards, and write them back."""
    whole: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, Any]] = [
        (module, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if isinstance(p, DTensor) and id(p) in chosen
    ]
    for module, name, shard in places:
        if id(shard) not in whole:  # else it is tied to an earlier one
            gathered = shard.detach().full_tensor()
            whole[id(shard)] = nn.Parameter(gathered, requires_grad=shard.requires_grad)
        module._parameters[name] = whole[id(shard)]
    try:
        yield
    finally:
        for module, name, shard in places:
            module._parameters[name] = shard
            if (changed := whole.pop(id(shard), None)) is not None and shard.requires_grad:
                with torch.no_grad():
                    shard.copy_(
                        distribute_tensor(
                            changed.detach(),
                            shard.device_mesh,
                            shard.placements,
                            src_data_rank=None,
                        )
                    )


def _is_partitioned(model: nn.Module) -> bool:
    """Return whether ZeRO-3 manages a model's parameters."""
    return any(hasattr(p, "ds_id") for p in model.parameters())
