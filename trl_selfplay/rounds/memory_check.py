"""Tell how much memory a run takes before it begins, and warn if that is more than is free.

In: a trainer that has not begun to train. Out: a line of output, or a warning with settings that would
make it fit.
"""

import logging
from typing import Any

import psutil
import torch
from torch import nn

from trl_selfplay.estimation.forecast import estimate
from trl_selfplay.estimation.plan import CannotEstimateError
from trl_selfplay.estimation.record import GB, Estimate
from trl_selfplay.evaluation.progress import say

logger = logging.getLogger(__name__)

# Below this many weights a run takes little, and estimating would take longer than its first steps.
_LEAST_WEIGHTS = 10**7


def tell_memory(trainer: Any, row_length: int | None = None) -> None:
    """Print the memory of each phase, or warn if it doesn't fit; change nothing.

    Nothing is said of models below 10 M weights, and of sharded ones.

    Args:
        trainer: Of this package.
        row_length: Tokens of the longest row of training, if it is known.
    """
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    if sum(p.numel() for p in model.parameters()) < _LEAST_WEIGHTS:
        return
    try:
        found, free = estimate_run(trainer, row_length)
    except CannotEstimateError as error:
        logger.info("The memory of this run isn't estimated: %s", error)
        return
    if not trainer.is_world_process_zero():
        return
    if found.fits(free):
        say(f"memory: {describe_memory(found, free)}")
        return
    logger.warning(
        "This run may need more memory than it can have on %s: %s. To fit: %s.",
        trainer.accelerator.device,
        describe_memory(found, free),
        "; ".join(found.advice),
    )


def estimate_run(trainer: Any, row_length: int | None = None) -> tuple[Estimate, int]:
    """Return the memory of a run, and the bytes that it can have on its device.

    Args:
        trainer: Of this package.
        row_length: Tokens of the longest row of training, if it is known.

    Raises:
        CannotEstimateError: The weights are or may be sharded, or can't be estimated.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise CannotEstimateError("its weights may be sharded.")
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    device = trainer.accelerator.device
    free = _free_for_all(model, device)
    found = estimate(
        model,
        trainer.args,
        row_length=row_length,
        memory=free,
        device="cpu" if device.type == "cpu" else "cuda",
        reward_models=_graders(trainer, device),
    )
    return found, free


def describe_memory(found: Estimate, free: int) -> str:
    """Return an estimate and what is free as text."""
    return f"{found.summary()}, of {free / GB:.1f} GB"


def _graders(trainer: Any, device: torch.device) -> list[Any]:
    """Return the models that grade on the trainer's GPU.

    None on a CPU: what is free there doesn't include the graders, which stay.
    """
    play = getattr(trainer, "self_play", None)
    if play is None or device.type == "cpu":
        return []
    graders: list[Any] = play.collector.models_on(device)
    return graders


def _free_for_all(model: nn.Module, device: torch.device) -> int:
    """Return the bytes that the run can have on its device, those that the model has already included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    held = sum(p.nbytes for p in model.parameters() if p.device.type == "cpu")
    return int(psutil.virtual_memory().available) + held
