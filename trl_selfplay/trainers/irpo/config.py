"""Configuration of IRPOTrainer, with the paper's settings as presets."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from trl import DPOConfig

from trl_selfplay.rounds.plan import OnResume
from trl_selfplay.trainers.field_checks import AT_LEAST_0
from trl_selfplay.trainers.graded_config import GradedConfig
from trl_selfplay.trainers.ported_scripts import takes_ported_fields
from trl_selfplay.trainers.reference_config import ReferenceConfig

# IRPO, arXiv 2404.19733, section 3: Llama-2-70B-Chat, beta 0.1, alpha 1, 16 pairs per step (here
# for one process), learning rate 7e-7 (tuned in 5e-7 … 5e-6), at most 5,000 steps per round.
_PAPER: dict[str, Any] = {
    "beta": 0.1,
    "nll_coef": 1.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": 7e-7,
    "max_steps": 5000,
}
# N, K and the temperature of each round, as reported.
_PRESETS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "num_generations": 30,
        "max_per_prompt": 10,
        "round_temperatures": [0.8, 0.8, 1.3, 1.3],
    },
    "arc": {
        "num_generations": 30,
        "max_per_prompt": 20,
        "round_temperatures": [0.8, 0.8, 1.3],
    },
    "math": {
        "num_generations": 20,
        "max_per_prompt": 15,
        "round_temperatures": [0.8, 0.8, 1.0],
    },
}
# What the paper's loss has of DPOConfig's fields.
_LOSS: dict[str, Any] = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
}
_UNUSED = {
    "label_smoothing": "other losses than the logistic one",
    "discopop_tau": "loss_type=['discopop']",
    "f_alpha_divergence_coef": "f_divergence_type='alpha_divergence'",
    "history_rounds": "methods without a reference that changes from round to round",
}


@takes_ported_fields
@dataclass
class IRPOConfig(ReferenceConfig, GradedConfig, DPOConfig):
    """Configuration of `IRPOTrainer`: DPOConfig's fields, per round, and those of the outer loop.

    The defaults are IRPO's (arXiv 2404.19733): 30 samples per prompt at temperature 0.8, at most 10
    pairs per prompt, beta 0.1, and the likelihood of the chosen completions in the loss, with
    weight 1. `IRPOConfig.from_paper` gives the settings of each experiment.
    """

    _BOUNDS = {"nll_coef": AT_LEAST_0}  # noqa: RUF012  # not a field

    num_generations: int = field(default=30, metadata={"help": "Completions to sample per prompt."})
    temperature: float = field(default=0.8, metadata={"help": "Sampling temperature."})
    max_per_prompt: int | None = field(
        default=10,
        metadata={
            "help": "Maximum pairs per prompt, drawn without replacement from all pairs of a right "
            "and a wrong completion. None trains on every pair."
        },
    )
    deduplicate: bool = field(
        default=False,
        metadata={"help": "Pair only one of a prompt's completions that are equal in normal form."},
    )
    nll_coef: Annotated[float, OnResume.UNTIL_TRAINED] = field(
        default=1.0,
        metadata={
            "help": "Weight of the chosen completions' negative log-likelihood per token beside "
            "the DPO loss (the paper's alpha). 0.0 is plain DPO."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, own in _LOSS.items():
            if (value := getattr(self, name)) != own:
                raise ValueError(
                    f"{name}={value!r}: IRPO's loss is DPO's logistic one and `nll_coef` times the "
                    f"likelihood of the chosen completions. Leave it {own!r}."
                )

    def unused_fields(self) -> dict[str, str]:
        """Return the fields of other losses, and that of earlier rounds."""
        return _UNUSED

    @classmethod
    def from_paper(cls, experiment: str, **overrides: Any) -> Self:
        """Return the settings of one of the paper's experiments, as reported.

        "gsm8k": 4 rounds, and the worked answers of the training set as `gold_dataset`. "arc" and
        "math": 3 rounds. Later rounds sample at a higher temperature, so that wrong completions
        remain. The paper takes the checkpoint of each round that is best on held-out prompts: an
        `eval_dataset` with `eval_strategy="steps"`, the same `save_strategy`, and
        `load_best_model_at_end=True`. LoRA needs a learning rate ten to twenty times higher.

        Args:
            experiment: See above.
            **overrides: Fields to set otherwise, such as `output_dir`. More rounds than the
                paper's repeat its last temperature; a `temperature` replaces all of them.

        Raises:
            ValueError: No such experiment.

        Source: IRPO, arXiv 2404.19733, section 3.
        """
        return cls(**cls.paper_settings(experiment, **overrides))

    @staticmethod
    def paper_settings(experiment: str, **overrides: Any) -> dict[str, Any]:
        """Return the fields that `from_paper` sets, by name, and the overrides."""
        if experiment not in _PRESETS:
            raise ValueError(f"no preset {experiment!r}; there are {tuple(_PRESETS)}.")
        settings = {**_PAPER, **_PRESETS[experiment]}
        schedule = settings.pop("round_temperatures")
        settings["num_rounds"] = num_rounds = overrides.get("num_rounds", len(schedule))
        if "temperature" not in overrides:
            settings["round_temperatures"] = [
                schedule[min(t, len(schedule) - 1)] for t in range(num_rounds)
            ]
        return {**settings, **overrides}
