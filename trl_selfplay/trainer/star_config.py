"""Configuration of STaRTrainer, with the paper's settings as presets."""

from dataclasses import dataclass, field
from typing import Any, Self

from trl import SFTConfig

from trl_selfplay.trainer.self_play_config import (
    SelfPlayConfig,
    check_self_play_config,
    switch_off_bf16_without_gpu,
)

# STaR, arXiv 2203.14465, section 4.1 and appendix H: Adam at 1e-6 without weight decay, warm-up
# of 100 steps and then constant, 8 packed sequences of 1024 tokens, greedy, one completion.
_PAPER: dict[str, Any] = {
    "learning_rate": 1e-6,
    "weight_decay": 0.0,
    "warmup_steps": 100,
    "lr_scheduler_type": "constant_with_warmup",
    "optim": "adamw_torch",
    "per_device_train_batch_size": 8,
    "max_length": 1024,
    "packing": True,
    "temperature": 0.0,
    "num_generations": 1,
    "start_from": "base",
    "rationalize": True,
}
# Section 4.1: 40 steps in the first round, 20 % more each round, capped at the 30th (7,912).
_GROWTH_CAP = 7912
PAPER_PRESETS = ("commonsense_qa", "gsm8k", "addition")


@dataclass
class STaRConfig(SelfPlayConfig, SFTConfig):
    """Configuration of `STaRTrainer`: SFTConfig's fields, per round, and those of the outer loop.

    STaR (arXiv 2203.14465) samples greedily, one completion a prompt, and trains each round from
    the base weights; those are the defaults here. `STaRConfig.from_paper` gives the paper's
    optimizer, schedule and steps as well.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012  # as in TRL: read by the parser, not a field
        *SFTConfig._VALID_DICT_FIELDS,
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature; 0.0 is greedy, as in the paper."}
    )
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
    rationalize: bool = field(
        default=True,
        metadata={
            "help": "Sample prompts that no completion solved again with the answer as hint, and "
            "train on what passes without the hint."
        },
    )

    def __post_init__(self) -> None:
        switch_off_bf16_without_gpu(self)
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_accuracy"
        super().__post_init__()
        check_self_play_config(self)
        if self.max_per_prompt is not None and self.max_per_prompt < 1:
            raise ValueError(
                f"max_per_prompt={self.max_per_prompt}; it must be at least 1, or None (no cap)."
            )
        if self.few_shot_rounds is not None and self.few_shot_rounds < 0:
            raise ValueError(
                f"few_shot_rounds={self.few_shot_rounds}; it must be 0 or above, or None (all)."
            )
        if self.few_shot_rounds is not None and self.few_shot_in_training:
            raise ValueError(
                f"few_shot_rounds={self.few_shot_rounds} with few_shot_in_training=True: the model "
                "would be sampled without the examples that it is trained with. Leave one out."
            )
        if self.metric_for_best_model.removeprefix("eval_") == "loss":
            raise ValueError(
                "metric_for_best_model='loss': held-out prompts are sampled and graded, so there "
                "is no held-out loss. Use 'eval_accuracy' (the default) or 'eval_pass@1'."
            )

    @classmethod
    def from_paper(cls, experiment: str, **overrides: Any) -> Self:
        """Return the settings of one of the paper's experiments.

        Args:
            experiment: "commonsense_qa", "gsm8k" or "addition".
            **overrides: Fields to set otherwise, such as `output_dir`.

        Raises:
            ValueError: No such experiment.

        Source: STaR, arXiv 2203.14465, sections 4.1 to 4.5 and appendix H.
        """
        if experiment not in PAPER_PRESETS:
            raise ValueError(f"no preset {experiment!r}; there are {PAPER_PRESETS}.")
        preset = dict(_PAPER)
        # Rounds: 16 on addition (section 4.3), 36 on GSM8K (section 4.5); for CommonsenseQA the
        # paper goes on "until saturation" and the schedule is capped at round 30.
        num_rounds = overrides.get(
            "num_rounds", {"addition": 16, "gsm8k": 36, "commonsense_qa": 30}[experiment]
        )
        if experiment == "addition":
            preset["num_prompts_per_round"] = 10_000
            preset["round_max_steps"] = [300 + 20 * t for t in range(num_rounds)]
        else:
            preset["round_max_steps"] = [
                min(int(40 * 1.2**t), _GROWTH_CAP) for t in range(num_rounds)
            ]
        return cls(**{**preset, "num_rounds": num_rounds, **overrides})
