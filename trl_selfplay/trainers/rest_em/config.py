"""Configuration of ReSTEMTrainer, with the settings of three papers as presets."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from trl import SFTConfig

from trl_selfplay.rounds.plan import OnResume, RoundPlan
from trl_selfplay.trainers.field_checks import ABOVE_0, Bounds
from trl_selfplay.trainers.graded_config import GradedConfig
from trl_selfplay.trainers.ported_scripts import takes_ported_fields
from trl_selfplay.trainers.rest_em.thresholds import check_thresholds

_PRESETS: dict[str, dict[str, Any]] = {
    # ReST^EM, arXiv 2312.06585, section 5: 32 samples per problem at temperature 0.7 with top-k
    # 40, at most 10 right ones per problem, 3 iterations. Rate, batch and epochs are not reported.
    "math": {
        "num_rounds": 3,
        "num_generations": 32,
        "max_per_prompt": 10,
        "temperature": 0.7,
        "top_k": 40,
        "start_from": "base",
    },
    # The same on APPS (introductory): 64 samples per problem, and one iteration, its best of two.
    "apps": {
        "num_rounds": 1,
        "num_generations": 64,
        "max_per_prompt": 10,
        "temperature": 0.7,
        "top_k": 40,
        "start_from": "base",
    },
    # The generator of V-STaR, arXiv 2402.06457, section 4.1: 3 iterations of 16 samples, each from
    # the base weights on the right samples of all iterations and the human ones.
    "v_star": {
        "num_rounds": 3,
        "history_rounds": 2,
        "num_generations": 16,
        "max_per_prompt": None,
        "top_k": 0,
        "start_from": "base",
        "few_shot_in_training": False,
    },
    # ReST, arXiv 2308.08998, section 4 and appendix A: IWSLT 2014, 100 candidates at temperature
    # 0.8 with at most 128 tokens, rewards in 0..1, first the supervised model, 2 Grow steps with
    # 3 Improve steps (figure 3's best), the data stays in the mix.
    "rest": {
        "num_rounds": 2,
        "num_generations": 100,
        "max_per_prompt": None,
        "temperature": 0.8,
        "top_k": 0,
        "max_completion_length": 128,
        "start_from": "previous",
        "few_shot_in_training": False,
        "improve_thresholds": [0.7, 0.8, 0.9],
        "warm_up_on_gold": True,
    },
    # RFT, arXiv 2308.01825, section 3.3, and OFA-Sys/gsm8k-ScRel: 100 paths per question from the
    # supervised model at temperature 0.7, the base model trained on gold and accepted paths for 3
    # epochs at 2e-5, batch 128 (here for one process), cosine with 3 % warm-up, length 512.
    "rft": {
        "num_rounds": 1,
        "num_generations": 100,
        "max_per_prompt": None,
        "temperature": 0.7,
        "top_k": 0,
        "max_completion_length": 256,
        "start_from": "base",
        "few_shot_in_training": False,
        "reward_weights": [0.5, 0.5],
        "warm_up_on_gold": True,
        "num_train_epochs": 3,
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 16,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "max_length": 512,
    },
}


@takes_ported_fields
@dataclass
class ReSTEMConfig(GradedConfig, SFTConfig):
    """Configuration of `ReSTEMTrainer`: SFTConfig's fields, per round, and those of the outer loop.

    The defaults are ReST^EM's (arXiv 2312.06585): 32 samples per prompt at temperature 0.7 with
    top-k 40, at most 10 right ones per prompt, each round trained from the base weights, and the
    round with the best held-out score kept. `ReSTEMConfig.from_paper` gives each paper's settings.

    The papers' M-step goes on "while the reward on D_val improves". That is an `eval_dataset` with
    `eval_strategy="steps"` or "epoch", the same `save_strategy`, `load_best_model_at_end=True` and
    a `transformers.EarlyStoppingCallback`, which ends the training of its round alone.
    `num_generations_eval=0` makes each of these evaluations one greedy completion per prompt.
    """

    _BOUNDS = {  # noqa: RUF012  # not a field
        "improve_thresholds": Bounds(infinite=True),
        "improve_learning_rate_factor": Bounds(
            0, 1, exclusive=True, meaning="1.0 is the same rate in all Improve steps"
        ),
        "gold_ratio": ABOVE_0,
    }

    num_generations: int = field(default=32, metadata={"help": "Completions sampled per prompt."})
    temperature: float = field(
        default=0.7, metadata={"help": "Sampling temperature; 0.0 is greedy decoding."}
    )
    top_k: int = field(
        default=40, metadata={"help": "Sample from this many most likely tokens; 0 disables it."}
    )
    max_per_prompt: int | None = field(
        default=10,
        metadata={
            "help": "Maximum completions kept per prompt after deduplication, drawn at random; with "
            "improve_thresholds those with the highest rewards, so that the set of each Improve "
            "step is a subset of the one before. None keeps all."
        },
    )
    few_shot_in_training: bool = field(
        default=True,
        metadata={
            "help": "Keep the few-shot examples in the prompt for training and evaluation as well, as "
            "ReST^EM does, not only for sampling."
        },
    )
    improve_thresholds: Annotated[list[float] | None, OnResume.UNTIL_TRAINED] = field(
        default=None,
        metadata={
            "help": "ReST: increasing thresholds of the Improve steps that follow each Grow step. Each "
            "trains on the same samples, those with a reward strictly above its threshold, and "
            "continues from the one before; `num_rounds` counts the Grow steps. -inf as the first "
            "selects everything. None trains once per round on what reaches reward_threshold.",
        },
    )
    threshold_kind: Annotated[str, OnResume.UNTIL_TRAINED] = field(
        default="value",
        metadata={
            "help": "Unit of improve_thresholds: rewards, percentiles (0 to 100) of the rewards of the "
            "same prompt, or positions between their mean (0) and maximum (1).",
            "choices": ["value", "percentile", "interpolate"],
        },
    )
    improve_learning_rate_factor: Annotated[float, OnResume.UNTIL_TRAINED] = field(
        default=0.5,
        metadata={
            "help": "Factor by which each Improve step multiplies the learning rate of the one before. "
            "ReST lowers the rate, by a factor that the paper doesn't give.",
        },
    )
    loss_weighting: Annotated[str, OnResume.UNTIL_TRAINED] = field(
        default="filter",
        metadata={
            "help": "'filter' trains on what reaches the threshold, with equal weights; 'reward' on every "
            "completion with a reward above 0, weighted by it (arXiv 2312.06585, Eq. 3). The weight "
            "is the reward divided by the round's mean, so that neither the scale of the rewards "
            "nor the batch size matters. A gold completion without a reward has weight 1.0.",
            "choices": ["filter", "reward"],
        },
    )
    gold_ratio: Annotated[float | None, OnResume.UNTIL_TRAINED] = field(
        default=None,
        metadata={
            "help": "Gold completions per selected completion of the model's own, drawn without "
            "replacement. None trains on all of gold_dataset once per round.",
        },
    )
    deduplicate_against_gold: Annotated[bool, OnResume.UNTIL_TRAINED] = field(
        default=False,
        metadata={
            "help": "Drop a completion with the normal form of a gold completion of its prompt. False "
            "keeps it in addition to the gold one, as RFT's code does.",
        },
    )
    agent_rewards: Annotated[str, OnResume.FIXED] = field(
        default="steps",
        metadata={
            "help": "With an `agent`, what `reward_funcs` grade: 'steps' ranks the samples of each step, "
            "without gold answers, and trains on the best (arXiv 2312.10003); 'answers' grades each "
            "trajectory's answer, and trains on the steps of those that reach reward_threshold.",
            "choices": ["steps", "answers"],
        },
    )
    warm_up_on_gold: Annotated[bool, OnResume.FIXED] = field(
        default=False,
        metadata={
            "help": "Train on gold_dataset before sampling begins: ReST's first step, and how RFT gets "
            "its sampler. start_from='base' still means the weights before that.",
        },
    )

    def __post_init__(self) -> None:
        if self.rewards_have_degrees and self.metric_for_best_model is None:
            # A real-valued reward need never reach the threshold that accuracy counts by.
            self.metric_for_best_model = "eval_mean_reward"
        super().__post_init__()
        self._check_improve_steps()
        self._check_weighting()
        self._check_gold_duplicates()

    @property
    def rewards_have_degrees(self) -> bool:
        """Whether completions are trained on that `reward_threshold` doesn't count as correct."""
        has_degrees = self.improve_thresholds is not None or self.loss_weighting == "reward"
        return has_degrees or self.ranks_steps

    def how_to_keep_more(self, highest_reward: float) -> str:
        """Return what lets more completions pass, in words that follow "or"."""
        if self.improve_thresholds is not None:
            return f"lower improve_thresholds ({self.improve_thresholds})"
        if self.loss_weighting == "reward":
            return "give rewards above 0, which loss_weighting='reward' asks for"
        return super().how_to_keep_more(highest_reward)

    @property
    def num_improve_steps(self) -> int:
        """Improve steps that follow each Grow step; 1 without `improve_thresholds`."""
        return len(self.improve_thresholds or [None])

    def plan_rounds(self) -> tuple[RoundPlan, ...]:
        """Return the Improve steps of each Grow step as rounds that train on its samples."""
        if self.improve_thresholds is None:
            return super().plan_rounds()
        plans: list[RoundPlan] = []
        for grow in super().plan_rounds():
            rate = grow.settings.get("learning_rate", self.learning_rate)
            first = len(plans)
            for improve, threshold in enumerate(self.improve_thresholds):
                factor = self.improve_learning_rate_factor**improve
                # JSON has no infinity.
                shown = None if threshold == -math.inf else threshold
                plans.append(
                    RoundPlan(
                        first + improve,
                        sampling_round=first,
                        settings={**grow.settings, "learning_rate": rate * factor},
                        details={
                            "grow": grow.round_index,
                            "improve": improve,
                            "threshold": shown,
                        },
                        may_be_skipped=improve > 0 and self.on_empty_round == "stop",
                    )
                )
        return tuple(plans)

    def _check_improve_steps(self) -> None:
        if self.improve_thresholds is None:
            for name in ("threshold_kind", "improve_learning_rate_factor"):
                value = getattr(self, name)
                if value != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"{name}={value!r} concerns the Improve steps of `improve_thresholds`, "
                        "which is None. Set that, or leave it out."
                    )
            return
        check_thresholds(self.improve_thresholds, self.threshold_kind)
        if self.start_from != "previous":
            raise ValueError(
                f"improve_thresholds with start_from={self.start_from!r}: ReST's Improve steps go "
                "on from the current weights (arXiv 2308.08998, Algorithm 1). Set "
                "start_from='previous'."
            )

    def _check_weighting(self) -> None:
        if self.loss_weighting == "filter":
            return
        for name, neutral in (
            ("packing", False),
            ("padding_free", False),
            ("loss_type", "nll"),
            ("label_smoothing_factor", 0.0),
        ):
            if (value := getattr(self, name)) != neutral:
                raise ValueError(
                    f"loss_weighting='reward' with {name}={value!r}: the weight belongs to a row "
                    f"and to its log-likelihood. Set {name}={neutral!r}, or "
                    "loss_weighting='filter'."
                )

    def _check_gold_duplicates(self) -> None:
        """A duplicate of gold is dropped because gold is trained on as much in its place."""
        if not self.deduplicate_against_gold:
            return
        for name, needed in (
            ("deduplicate", True),
            ("gold_ratio", None),
            ("loss_weighting", "filter"),
        ):
            if (value := getattr(self, name)) != needed:
                raise ValueError(
                    f"deduplicate_against_gold=True with {name}={value!r}: set {name}={needed!r}, "
                    "or deduplicate_against_gold=False."
                )

    @classmethod
    def from_paper(cls, experiment: str, **overrides: Any) -> Self:
        """Return a paper's settings.

        "math" and "apps": ReST^EM on MATH and on APPS. "v_star": the generator of V-STaR, with a
        `gold_dataset`. "rest": ReST on IWSLT 2014, for a reward normalised to 0..1 and
        with a `gold_dataset`. "rft": RFT on GSM8K, with a `gold_dataset`, two reward functions
        (`[exact_reward, equations_reward]`: half of the threshold each) and
        `normal_form=reasoning_path`. As in the authors' code each distinct reasoning path of the
        samples is kept once, that of the gold completion too, which stays beside it;
        `deduplicate_against_gold=True` drops it.

        Args:
            experiment: See above.
            **overrides: Fields to set otherwise, such as `output_dir`.

        Raises:
            ValueError: No such experiment, or more than one round of RFT.

        Source: arXiv 2312.06585, 2308.08998 and 2308.01825.
        """
        return cls(**cls.paper_settings(experiment, **overrides))

    @staticmethod
    def paper_settings(experiment: str, **overrides: Any) -> dict[str, Any]:
        """Return the fields that `from_paper` sets, by name, and the overrides."""
        if experiment not in _PRESETS:
            raise ValueError(f"no preset {experiment!r}; there are {tuple(_PRESETS)}.")
        settings = {**_PRESETS[experiment], **overrides}
        if experiment == "rft" and settings["num_rounds"] != 1:
            raise ValueError(
                f"num_rounds={settings['num_rounds']}: RFT is one round (arXiv 2308.01825, section "
                "3.3). For more rounds take the preset 'math', or ReSTEMConfig itself."
            )
        return settings
