"""Configuration of SPINTrainer, with the published recipe as a preset."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from datasets import Dataset
from trl import DPOConfig

from trl_selfplay.generation.sampler import build_sampling_options
from trl_selfplay.rounds.plan import OnResume, PerRound
from trl_selfplay.trainers.config import graded_metric_names, sampling_temperatures
from trl_selfplay.trainers.field_checks import ABOVE_0
from trl_selfplay.trainers.ported_scripts import takes_ported_fields
from trl_selfplay.trainers.reference_config import ReferenceConfig
from trl_selfplay.trainers.spin.discriminator import measure_heldout

logger = logging.getLogger(__name__)

# Official code of SPIN, arXiv 2401.01335 (configs, scripts and README of uclaml/SPIN): RMSProp
# without weight decay, linear schedule with a tenth of warm-up, 64 pairs a step, 2 epochs, a
# greedy opponent with at most 256 tokens, this round's and the last round's pairs.
_PAPER: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "optim": "rmsprop",
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "max_length": 1024,
    "max_completion_length": 256,
    "temperature": 0.0,
    "history_rounds": 1,
}
# The loss of a pair of which policy and opponent say the same, by beta and label smoothing ε, as
# TRL defines the losses; "sft" is the data's own likelihood, whatever the opponent.
_LN_2 = math.log(2.0)
_FIRST_LOSSES: dict[str, Callable[[float, float], float]] = {
    **dict.fromkeys(
        ("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"), lambda beta, e: _LN_2
    ),
    **dict.fromkeys(("nca_pair", "bco_pair"), lambda beta, e: 2.0 * _LN_2),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), lambda beta, e: 1.0),
    "ipo": lambda beta, e: 1.0 / (4.0 * beta**2),
    "sppo_hard": lambda beta, e: 1.0 / (2.0 * beta**2),
    "exo_pair": lambda beta, e: -_LN_2 - 0.5 * math.log(e * (1.0 - e)),
    "discopop": lambda beta, e: 0.5 * _LN_2 + 0.5,
}
_SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
_PAPER_LEARNING_RATES = (5e-7, 5e-7, 1e-7, 1e-7)
_PAPER_BETAS = (0.1, 0.1, 0.1, 5.0)


@takes_ported_fields
@dataclass
class SPINConfig(ReferenceConfig, DPOConfig):
    """Configuration of `SPINTrainer`: DPOConfig's fields, per round, and those of the outer loop.

    The defaults are the algorithm of SPIN (arXiv 2401.01335): the opponent is sampled as it is
    (temperature 1, nothing filtered), each round trains on its own pairs, from where the last
    round ended, with the logistic loss. `SPINConfig.from_paper` gives the published recipe.
    """

    _BOUNDS = {"round_betas": ABOVE_0}  # noqa: RUF012  # not a field
    _reference = "opponent"
    _default_metric = "eval_logps"

    round_betas: Annotated[list[float] | None, PerRound("beta"), OnResume.UNTIL_TRAINED] = field(
        default=None,
        metadata={
            "help": "One beta per round, in place of `beta`.",
        },
    )

    def __post_init__(self) -> None:
        self._has_task_score = False
        self._chooses_by_default = self.metric_for_best_model is None
        super().__post_init__()
        if self.stop_strings:
            raise ValueError(
                f"stop_strings={self.stop_strings!r}: the opponent's completions would end without "
                "EOS and the data's with it, which tells them apart. Leave it out."
            )
        given: Any = self.generation_kwargs or {}  # text has become a dict by now
        if "eos_token_id" in given:
            raise ValueError(
                f"generation_kwargs has eos_token_id={given['eos_token_id']}: the "
                "opponent's completions would end otherwise than the data's, which tells them "
                "apart. Set it in the model's generation config."
            )
        self._check_losses()
        self._check_betas()
        self._warn_other_loss()
        self._warn_off_policy()

    def unused_fields(self) -> dict[str, str]:
        """Return the fields of losses that were not chosen."""
        losses, unused = set(self.loss_type), {}
        if not losses & _SMOOTHED:
            unused["label_smoothing"] = f"a loss_type of {sorted(_SMOOTHED)}"
        if "discopop" not in losses:
            unused["discopop_tau"] = "loss_type=['discopop']"
        if self.f_divergence_type != "alpha_divergence":
            unused["f_alpha_divergence_coef"] = "f_divergence_type='alpha_divergence'"
        return unused

    def _check_losses(self) -> None:
        """Raise ValueError for losses that SPIN can't have, or that lack a value."""
        if not self.loss_type:
            raise ValueError("loss_type=[]; leave it out for SPIN's own, ['sigmoid'].")
        unknown = sorted(set(self.loss_type) - {*_FIRST_LOSSES, "sft"})
        if unknown:
            raise ValueError(
                f"loss_type={self.loss_type}: TRL has no loss {unknown[0]!r}; choose among "
                f"{sorted({*_FIRST_LOSSES, 'sft'})}."
            )
        losses = set(self.loss_type)
        if losses == {"sft"}:
            raise ValueError(
                "loss_type=['sft'] alone has no opponent: that is supervised fine-tuning, for which "
                "TRL has SFTTrainer. Add it to SPIN's loss with loss_type=['sigmoid', 'sft'] and "
                "`loss_weights`."
            )
        if "exo_pair" in losses and not 0.0 < self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} with loss_type={self.loss_type}: "
                "'exo_pair' needs a value between 0 and 1; its paper recommends 1e-3."
            )
        if "robust" in losses and not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} with loss_type={self.loss_type}: it must "
                "be at least 0 and below 0.5 for 'robust'."
            )

    def _check_betas(self) -> None:
        if self.round_betas is not None and len(self.round_betas) != self.num_rounds:
            raise ValueError(
                f"round_betas has {len(self.round_betas)} values for num_rounds={self.num_rounds}; "
                "give one per round."
            )

    def heldout_metric_names(self) -> tuple[str, ...]:
        """Return the metrics of a held-out set, without the set's prefix."""
        pair = {"prompt_id": "", "chosen_ids": [0], "has_opponent": True,
                "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}  # fmt: skip
        metrics, _ = measure_heldout(Dataset.from_list([pair]), [(0.0, 0.0)], self.beta, "eval")
        graded = graded_metric_names(self.num_generations_eval) if self._has_task_score else ()
        return (*(name.removeprefix("eval_") for name in metrics), *graded)

    def choose_by_task_score(self) -> None:
        """Let held-out accuracy choose the best round, unless the user has named a metric."""
        self._has_task_score = True
        if self._chooses_by_default:
            self.metric_for_best_model = "eval_accuracy"

    def first_loss(self, beta: float) -> float | None:
        """Return the loss at the first step of a round, where every margin is 0.

        ln 2 for SPIN's own, the logistic loss. None where it depends on the model: for 'sft' and
        with `use_weighting`. A mixture of experts adds its balancing loss.
        """
        if self.use_weighting or "sft" in self.loss_type:
            return None
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return sum(
            weight * _FIRST_LOSSES[name](beta, self.label_smoothing)
            for name, weight in zip(self.loss_type, weights, strict=True)
        )

    def _warn_other_loss(self) -> None:
        """Say what becomes of ln 2, and of the theory, under another loss than the paper's."""
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name in (
                "loss_type",
                "loss_weights",
                "f_divergence_type",
                "ld_alpha",
                "use_weighting",
            )
            if getattr(self, name) not in (None, False, ["sigmoid"], [1.0], "reverse_kl")
        ]
        if not changed:
            return
        first = self.first_loss(self.beta if self.round_betas is None else self.round_betas[0])
        logger.warning(
            "%s: the margins still begin each round at 0, but the loss then is %s, where SPIN's "
            "logistic loss is ln 2 = 0.6931, and the fixed point that the paper proves is of the "
            "logistic loss. Held-out win rate, margin, loss and distance are measured with the "
            "logistic loss of whole completions.",
            ", ".join(changed),
            "not known beforehand" if first is None else f"{first:.4f}",
        )

    def _warn_off_policy(self) -> None:
        options = build_sampling_options(self, ())  # with generation_kwargs laid over
        changed = [
            f"temperature={temperature}"
            for temperature in dict.fromkeys(sampling_temperatures(self))
            if temperature != 1.0
        ]
        changed += [
            f"{name}={getattr(options, name)}"
            for name, neutral in (
                ("top_p", (1.0,)),
                ("top_k", (0,)),
                ("min_p", (None, 0.0)),
                ("repetition_penalty", (1.0,)),
            )
            if getattr(options, name) not in neutral
        ]
        if changed:
            logger.warning(
                "%s: the opponent is sampled from another distribution than the one whose "
                "log-probs are in the loss. The published recipe did so (greedy); the fixed point "
                "of the theory needs temperature=1.0 without filters.",
                ", ".join(changed),
            )

    @classmethod
    def from_paper(cls, **overrides: Any) -> Self:
        """Return the published recipe.

        It departs from the formula in two places: completions are decoded greedily, so they are
        the mode of the opponent and no samples of it, and from round 1 on half of the pairs hold
        completions of the round before, while the reference of all pairs is the newest opponent.
        Two things differ from the official code: prompts have the training template also while
        sampling, and completions that are cut at 256 tokens are dropped, where the code ends them
        with EOS. The 64 pairs of a step are 8 times 8 in one process; set
        `gradient_accumulation_steps=1` on 8 GPUs. The schedule ends after the 2 epochs that the
        paper names, where the scripts stop a 6-epoch schedule early. LoRA needs a learning rate
        ten to twenty times higher.

        Args:
            **overrides: Fields to set otherwise, such as `output_dir`. More than 4 rounds repeat
                the last round's learning rate and beta. `learning_rate` and `beta` are those of
                round 0, from which the other rounds' keep their proportion.

        Source: SPIN, arXiv 2401.01335, section 6.1, and the configs of uclaml/SPIN.
        """
        return cls(**cls.paper_settings(**overrides))

    @staticmethod
    def paper_settings(**overrides: Any) -> dict[str, Any]:
        """Return the fields that `from_paper` sets, by name, and the overrides."""
        num_rounds = overrides.get("num_rounds", len(_PAPER_BETAS))
        per_round = {}
        for name, schedule in (("learning_rate", _PAPER_LEARNING_RATES), ("beta", _PAPER_BETAS)):
            scale = overrides.get(name, schedule[0]) / schedule[0]
            values = [schedule[min(t, len(schedule) - 1)] * scale for t in range(num_rounds)]
            per_round[f"round_{name}s"] = values
        return {**_PAPER, **per_round, "num_rounds": num_rounds, **overrides}
