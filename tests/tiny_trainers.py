"""The trainers by method, built with small settings.

In: a method's name, a model, a folder. Out: a trainer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patience import ENDS_S

from trl_selfplay import (
    IRPOConfig,
    IRPOTrainer,
    QuietSTaRConfig,
    QuietSTaRTrainer,
    ReSTEMConfig,
    ReSTEMTrainer,
    SPINConfig,
    SPINTrainer,
    STaRConfig,
    STaRTrainer,
    VSTaRConfig,
    VSTaRTrainer,
)

METHODS: dict[str, tuple[Any, Any]] = {
    "STaR": (STaRTrainer, STaRConfig),
    "ReST^EM": (ReSTEMTrainer, ReSTEMConfig),
    "SPIN": (SPINTrainer, SPINConfig),
    "IRPO": (IRPOTrainer, IRPOConfig),
    "V-STaR": (VSTaRTrainer, VSTaRConfig),
    "Quiet-STaR": (QuietSTaRTrainer, QuietSTaRConfig),
}
GRADED = ("STaR", "ReST^EM", "IRPO")
QUIET: dict[str, Any] = {
    "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False, "use_cpu": True,
}  # fmt: skip
SMALL: dict[str, Any] = {
    **QUIET, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
}  # fmt: skip


def build_trainer(
    method: str, model: Any, folder: Path | str, settings: Mapping[str, Any], **given: Any
) -> Any:
    """Return a trainer.

    Args:
        method: A key of `METHODS`.
        model: The model, or its path.
        folder: The run's output directory.
        settings: Fields of the config; those that the method's config lacks are left out.
        **given: Fields of the config in the place of those, and arguments of the constructor.
    """
    trainer_class, config_class = METHODS[method]
    known = config_class.__dataclass_fields__
    patience = {"tool_deadline": ENDS_S} if given.get("tools") else {}
    fields = {**patience, **settings, **given}
    fields = {name: value for name, value in fields.items() if name in known}
    arguments = {name: value for name, value in given.items() if name not in known}
    return trainer_class(model, args=config_class(str(folder), **fields), **arguments)
