"""Configuration of QuietSTaRTrainer, with the published recipe as a preset."""

import logging
from dataclasses import dataclass, field
from typing import Any, Self

from trl import SFTConfig

from trl_selfplay.confidential import HidesSecrets
from trl_selfplay.rounds.named_settings import naming_settings
from trl_selfplay.trainers.config import switch_off_bf16_without_gpu
from trl_selfplay.trainers.field_checks import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    SHARE,
    TEMPERATURE,
    Bounds,
    check_fields,
    refuse_strangers,
)
from trl_selfplay.trainers.ported_scripts import takes_ported_fields
from trl_selfplay.trainers.quiet_star.footprint import ThinkingStep
from trl_selfplay.trainers.quiet_star.objective import BASELINES
from trl_selfplay.trainers.unused_fields import warn_without

logger = logging.getLogger(__name__)

# Official code of Quiet-STaR, arXiv 2403.09629 (ezelikman/quiet-star, quiet-star-train.py): 12
# tokens ahead, 9 of which are sampled, 4 true tokens, 2 thoughts, 8 sequences of 256 per step.
_PAPER: dict[str, Any] = {
    "num_thoughts": 2,
    "thought_length": 9,
    "num_ahead_tokens": 4,
    "max_length": 256,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-6,
    "weight_decay": 0.001,
    # Linear over 100,000 steps, of which 100 are run: the rate falls by a thousandth.
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "max_grad_norm": 1.0,
    "max_steps": 100,
}
# The official code's weight of REINFORCE, and the temperature at which it scores thoughts.
_PAPER_WEIGHT, _PAPER_SCORING_TEMPERATURE = 1e6, 3.0

_OF_SAMPLED_THOUGHTS = ("thought_temperature", "reinforce_weight", "reinforce_baseline")


@takes_ported_fields
@dataclass
class QuietSTaRConfig(HidesSecrets, SFTConfig):
    """Configuration of `QuietSTaRTrainer`: SFTConfig's fields, and those of the thoughts.

    `num_thoughts=0` is plain SFT. The defaults are the method of Quiet-STaR (arXiv 2403.09629) with
    thoughts of 8 tokens and a REINFORCE weight of 1; `QuietSTaRConfig.from_paper` gives the
    published recipe.
    """

    _BOUNDS = {  # noqa: RUF012  # not a field
        "num_thoughts": AT_LEAST_0,
        "thought_length": AT_LEAST_0,
        "num_ahead_tokens": AT_LEAST_1,
        "thought_temperature": TEMPERATURE,
        "thought_fraction": Bounds(0, 1, exclusive=True, meaning="for none set num_thoughts=0"),
        "base_loss_weight": SHARE,
        "reinforce_weight": AT_LEAST_0,
        "meta_token_scale": ABOVE_0,
    }

    num_thoughts: int = field(
        default=2,
        metadata={"help": "Thoughts sampled at each thinking token. 0 is plain SFT."},
    )
    thought_length: int = field(
        default=8,
        metadata={
            "help": "Sampled tokens per thought, between its start and end. 0 leaves only these two "
            "learned vectors, a pause-token control."
        },
    )
    num_ahead_tokens: int = field(
        default=4,
        metadata={"help": "Tokens of the text that each thought predicts."},
    )
    thought_temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of sampled thoughts, and of their log-probs in REINFORCE."},
    )
    thought_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of tokens that think, drawn anew at each step. Cost and memory of thoughts "
            "are proportional to it."
        },
    )
    base_loss_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the base loss; the loss with thoughts gets 1 minus this."},
    )
    reinforce_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of REINFORCE on thought tokens. The paper's 1e6 belongs to its learning "
            "rate of 1e-6."
        },
    )
    reinforce_baseline: str = field(
        default="mean",
        metadata={
            "help": "Baseline of a thought's reward: 'mean', the mean over the thoughts of its token, "
            "where worse thoughts are ignored (the paper's); 'base', the likelihood without "
            "thoughts, where worse thoughts are ignored; or 'leave_one_out', the mean of the other "
            "thoughts, where worse thoughts count negatively (unbiased).",
            "choices": list(BASELINES),
        },
    )
    meta_token_scale: float = field(
        default=100.0,
        metadata={
            "help": "Factor on the learning rate (under Adam) of the vectors that begin and end a "
            "thought."
        },
    )

    def __post_init__(self) -> None:
        check_fields(self)
        switch_off_bf16_without_gpu(self)
        with naming_settings(self, "TRL's config can't take these settings."):
            super().__post_init__()
        refuse_strangers(self)
        if self.num_thoughts:
            self._check_thoughts()
        warn_without(self, self._unmet())

    def _unmet(self) -> dict[str, tuple[str, ...]]:
        """Return fields that have no effect beside others, by what they need."""
        if self.num_thoughts == 0:
            return {"num_thoughts above 0": tuple(self._BOUNDS.keys() - {"num_thoughts"})}
        if self.thought_length == 0:
            return {"thought_length above 0": _OF_SAMPLED_THOUGHTS}
        if self.reinforce_weight == 0.0:
            return {"reinforce_weight above 0": ("reinforce_baseline",)}
        return {}

    def _check_thoughts(self) -> None:
        if self.thought_length == 0 and self.num_thoughts > 1:
            raise ValueError(
                f"num_thoughts={self.num_thoughts} with thought_length=0 would compute copies of "
                "one thought. Set num_thoughts=1."
            )
        if self.thought_length > 0 and self.thought_temperature == 0.0:
            raise ValueError(
                f"thought_temperature={self.thought_temperature}; it must be above 0. Otherwise all "
                "thoughts of a token are the same and none can be reinforced."
            )
        if (
            self.num_thoughts == 1
            and self.thought_length > 0
            and self.reinforce_weight > 0.0
            and self.reinforce_baseline != "base"
        ):
            raise ValueError(
                f"num_thoughts=1 with reinforce_baseline={self.reinforce_baseline!r}: a single "
                "thought is its own mean, so no thought would ever be reinforced. Set "
                "reinforce_baseline='base', or num_thoughts=2."
            )
        if self.packing or self.eval_packing or self.padding_free:
            raise ValueError(
                "packing or padding_free puts several texts into one row, where a thought would "
                "see other texts and get wrong positions. Set packing=False, eval_packing=None and "
                "padding_free=False."
            )
        if self.loss_type != "nll":
            raise ValueError(
                f"loss_type={self.loss_type!r}: thoughts are rewarded by the text's likelihood; "
                "set loss_type='nll'."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}; thoughts are rewarded by "
                "the likelihood of the true tokens alone: set it to 0."
            )
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel=True replaces the model's forward: leave it out.")
        if self.torch_compile:
            raise ValueError(
                "torch_compile=True compiles the model's forward, whose attention is replaced while "
                "thoughts are computed: leave it out, and torch_compile_backend="
                f"{self.torch_compile_backend!r} and torch_compile_mode={self.torch_compile_mode!r}, "
                "each of which switches it on."
            )
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha={self.neftune_noise_alpha}: thoughts are sampled without this "
                "noise and would be scored with it, which would be two policies. Leave it out."
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True permanently rounds the whole model, including the mixing head and "
                    "the thought vectors, which need float32. Leave it out; bf16=True also evaluates "
                    "in bfloat16."
                )
        if self.router_aux_loss_coef:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}: the router loss would count "
                "thoughts as text. Leave it out, or set it to 0.0."
            )
        if self.num_thoughts == 1 and self.reinforce_baseline == "leave_one_out":
            raise ValueError(
                "num_thoughts=1 with reinforce_baseline='leave_one_out': there is no other thought "
                "to compare with. Set num_thoughts=2, or another baseline."
            )

    def step_without_data(self) -> ThinkingStep | None:
        """Return a training step for estimates of memory; None without thoughts, for the parent's."""
        return ThinkingStep(self) if self.num_thoughts else None

    @classmethod
    def from_paper(cls, **overrides: Any) -> Self:
        """Return the published recipe for Mistral 7B.

        It differs from the official code as follows:

        - Thoughts are scored at the temperature they were sampled at. The code samples at 1 and
          scores at 3, which divides the gradient by 3. A thought's log-prob is the sum over its
          tokens; the code takes the mean. The weight of 1e6 becomes 1e6 / (3 · thought_length), so
          that REINFORCE has the same size as in the code.
        - The loss with thoughts is averaged over all thinking tokens, and a token thinks if all
          num_ahead_tokens follow it. The code predicts the token t ahead from every token that has
          one, divides by the number of nonzero losses, and divides REINFORCE by all columns,
          including padding.
        - Texts are truncated to their first 256 tokens; the code takes a random span of 256. Shorter
          texts end with EOS, which the code doesn't learn.
        - The vectors that begin and end a thought start as the mean embedding of the tokens of
          "---"; the code takes that of the first token.
        - The run ends after 100 steps; the code raises an error. The learning rate is constant after
          its warm-up; the code's decreases by a thousandth until then.
        - Weights are float32, with bfloat16 in forwards on a GPU; the code's are bfloat16.
        - One process computes the 8 sequences of a step in two halves, and averages over the step
          instead of over each half.

        Args:
            **overrides: Values of other fields, such as `output_dir`.

        Source: Quiet-STaR, arXiv 2403.09629, appendix A, and ezelikman/quiet-star.
        """
        return cls(**cls.paper_settings(**overrides))

    @staticmethod
    def paper_settings(**overrides: Any) -> dict[str, Any]:
        """Return the fields that `from_paper` sets, by name, and the overrides."""
        settings = {**_PAPER, **overrides}
        length = max(1, settings["thought_length"])
        weight = _PAPER_WEIGHT / (_PAPER_SCORING_TEMPERATURE * length)
        return {"reinforce_weight": weight, **settings}
