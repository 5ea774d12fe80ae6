"""Fields and checks of the configs whose reference is the policy as it enters a round.

`ReferenceConfig` stands before the other bases of such a config, with DPOConfig as the last.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_selfplay.confidential import shown
from trl_selfplay.trainers.config import SelfPlayConfig

_NO_SYNC = "sync_ref_model=True, which rounds have no use for"
# Fields of DPOConfig that change nothing here, and what they are for.
_WITHOUT_EFFECT = {
    "ref_model_mixup_alpha": _NO_SYNC,
    "ref_model_sync_steps": _NO_SYNC,
    "label_smoothing_factor": "models that are trained on labels",
    "padding_free": "SFTTrainer; TRL pads pairs whatever is set",
    "truncation_mode": "rows that are cut, and long ones are left out here instead",
}


@dataclass
class ReferenceConfig(SelfPlayConfig):
    """Fields of training on pairs against the policy as it enters the round."""

    _reference = "reference"  # what errors call it; not a field

    start_from: str = field(
        default="previous",
        metadata={
            "help": "Weights that a round's training starts from. The reference is the policy as "
            "it enters the round, so only 'previous' is right.",
            "choices": ["previous"],
        },
    )
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={
            "help": "Compute the reference's log-probs once per round, before any update. False "
            "is refused: TRL would then use another reference."
        },
    )

    def __post_init__(self) -> None:
        if self.start_from != "previous":
            raise ValueError(
                f"start_from={self.start_from!r}: the {self._reference} is the policy as it enters "
                "the round, and a restart from the base would begin away from it. Leave it "
                "'previous'."
            )
        super().__post_init__()
        self._check_reference()

    def unused_fields(self) -> Mapping[str, str]:
        """Return the method's further fields that have no effect, and what each is for."""
        return {}

    def _check_reference(self) -> None:
        """Raise ValueError for another reference, for noise, and for fields without effect."""
        config: Any = self  # the other base of each config is DPOConfig
        name = self._reference
        for field_name, right, reason in (
            (
                "precompute_ref_log_probs",
                True,
                "TRL would compare with the base model or the checkpoint on disk, which is the "
                f"wrong {name} from round 1 on",
            ),
            (
                "disable_dropout",
                True,
                f"with dropout the policy differs from its {name} at the first step of each round, "
                "so the margins don't begin at 0",
            ),
            (
                "neftune_noise_alpha",
                None,
                f"the {name}'s log-probs have no noise and the policy's would, so the margins don't "
                "begin at 0",
            ),
            (
                "sync_ref_model",
                False,
                f"the {name} stays as it is within a round and becomes the policy at the start of "
                "the next, without any setting",
            ),
        ):
            value = getattr(config, field_name)
            if value != right:
                raise ValueError(f"{field_name}={value!r}: {reason}. Leave it {right}.")
        if (config.gradient_checkpointing_kwargs or {}).get("selective"):
            raise ValueError(
                f"gradient_checkpointing_kwargs={shown(config.gradient_checkpointing_kwargs)}: TRL checkpoints "
                "selectively in SFTTrainer alone. Leave `selective` out."
            )
        for field_name, condition in {**_WITHOUT_EFFECT, **self.unused_fields()}.items():
            value = getattr(config, field_name)
            if value != config.__dataclass_fields__[field_name].default:
                raise ValueError(
                    f"{field_name}={value!r} has no effect here: it is for {condition}. Leave it "
                    "out."
                )
