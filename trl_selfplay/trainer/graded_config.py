"""Fields of the configs whose rounds are graded by reward functions, and their checks."""

from dataclasses import dataclass, field
from typing import Any

from trl_selfplay.trainer.self_play_config import (
    SelfPlayConfig,
    check_self_play_config,
    switch_off_bf16_without_gpu,
)


@dataclass
class GradedConfig(SelfPlayConfig):
    """Fields of selection by reward, which STaR and ReST^EM share."""

    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward function; None weighs all with 1.0."},
    )
    reward_threshold: float = field(
        default=1.0,
        metadata={"help": "A completion is correct if its weighted reward is at least this."},
    )
    max_per_prompt: int | None = field(
        default=None,
        metadata={
            "help": "Most completions to keep of a prompt, drawn at random after deduplication. "
            "None keeps all."
        },
    )
    deduplicate: bool = field(
        default=True,
        metadata={"help": "Keep one of a prompt's completions that are equal in normal form."},
    )
    few_shot_in_training: bool = field(
        default=False,
        metadata={
            "help": "Train (and evaluate) with the few-shot examples in the prompt, and not only "
            "sample with them."
        },
    )
    few_shot_rounds: int | None = field(
        default=None,
        metadata={
            "help": "Sample with the few-shot examples in this many first rounds only; from then "
            "on the model is asked in the form that it is trained on. None: in all rounds, as in "
            "the paper."
        },
    )

    @property
    def rewards_have_degrees(self) -> bool:
        """Whether completions are trained on that `reward_threshold` doesn't count as correct."""
        return False

    def __post_init__(self) -> None:
        config: Any = self  # the other base of each config is TRL's
        switch_off_bf16_without_gpu(config)
        if config.metric_for_best_model is None:
            config.metric_for_best_model = "eval_accuracy"
        super().__post_init__()  # type: ignore[misc]
        check_graded_config(config)


def check_graded_config(config: Any) -> None:
    """Raise ValueError for values of the shared fields that can't work."""
    check_self_play_config(config)
    if config.max_per_prompt is not None and config.max_per_prompt < 1:
        raise ValueError(
            f"max_per_prompt={config.max_per_prompt}; it must be at least 1, or None (no cap)."
        )
    if config.few_shot_rounds is not None and config.few_shot_rounds < 0:
        raise ValueError(
            f"few_shot_rounds={config.few_shot_rounds}; it must be 0 or above, or None (all)."
        )
    if config.few_shot_rounds is not None and config.few_shot_in_training:
        raise ValueError(
            f"few_shot_rounds={config.few_shot_rounds} with few_shot_in_training=True: the model "
            "would be sampled without the examples that it is trained with. Leave one out."
        )
    if config.metric_for_best_model.removeprefix("eval_") == "loss":
        raise ValueError(
            "metric_for_best_model='loss': held-out prompts are sampled and graded, so there "
            "is no held-out loss. Use 'eval_accuracy' (the default) or 'eval_pass@1'."
        )
