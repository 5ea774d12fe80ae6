"""Configuration of STaRTrainer, with the paper's settings as presets."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from trl import SFTConfig

from trl_selfplay.rounds.plan import OnResume
from trl_selfplay.trainers.graded_config import GradedConfig
from trl_selfplay.trainers.ported_scripts import takes_ported_fields

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


@takes_ported_fields
@dataclass
class STaRConfig(GradedConfig, SFTConfig):
    """Configuration of `STaRTrainer`: SFTConfig's fields, per round, and those of the outer loop.

    STaR (arXiv 2203.14465) samples one greedy completion per prompt and trains each round from the
    base weights; these are the defaults. `STaRConfig.from_paper` gives the paper's
    optimizer, schedule and steps as well.
    """

    temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature; 0.0 is greedy, as in the paper."}
    )
    rationalize: Annotated[bool, OnResume.FIXED] = field(
        default=True,
        metadata={
            "help": "Sample prompts that no completion solved once more, with the answer as a hint, and "
            "train on the correct completions without the hint.",
        },
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
        return cls(**cls.paper_settings(experiment, **overrides))

    @staticmethod
    def paper_settings(experiment: str, **overrides: Any) -> dict[str, Any]:
        """Return the fields that `from_paper` sets, by name, and the overrides."""
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
        return {**preset, "num_rounds": num_rounds, **overrides}
