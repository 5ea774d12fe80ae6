"""Configuration of VSTaRTrainer."""

from dataclasses import dataclass, field
from typing import Annotated

from trl import DPOConfig

from trl_selfplay.rounds.plan import OnResume
from trl_selfplay.trainers.field_checks import AT_LEAST_1
from trl_selfplay.trainers.ported_scripts import takes_ported_fields
from trl_selfplay.trainers.reference_config import ReferenceConfig

_SAMPLING = "trainers that sample, and the verifier's samples are those of a finished run"
_ROUNDS = "trainers with several rounds, and the verifier is trained once"
_UNUSED = {
    "num_rounds": _ROUNDS,
    "history_rounds": _ROUNDS,
    "round_learning_rates": _ROUNDS,
    "round_max_steps": _ROUNDS,
    "round_temperatures": _ROUNDS,
    "load_best_round_at_end": _ROUNDS,
    "stop_after_rounds_without_gain": _ROUNDS,
    "num_prompts_per_round": _SAMPLING,
    "num_generations": _SAMPLING,
    "max_completion_length": _SAMPLING,
    "temperature": _SAMPLING,
    "top_p": _SAMPLING,
    "top_k": _SAMPLING,
    "min_p": _SAMPLING,
    "repetition_penalty": _SAMPLING,
    "stop_strings": _SAMPLING,
    "generation_kwargs": _SAMPLING,
    "num_generations_eval": _SAMPLING,
    "temperature_eval": _SAMPLING,
    "use_vllm": _SAMPLING,
    "use_ray": _SAMPLING,
    "log_completions_hub_repo": _SAMPLING,
}


@takes_ported_fields
@dataclass
class VSTaRConfig(ReferenceConfig, DPOConfig):
    """Configuration of `VSTaRTrainer`: DPOConfig's fields, and how completions are paired.

    The verifier is trained once, so the fields of rounds and of sampling, which this class has from
    the other trainers' configs, are refused. The paper (arXiv 2402.06457) reports about 2,000
    optimizer steps with LoRA, and neither beta nor learning rate nor the number of pairs per
    prompt.

    The paper's generator is ReSTEMTrainer with `num_rounds=3`, `num_generations=16`,
    `start_from="base"`, `history_rounds=2`, `max_per_prompt=None` and `few_shot_in_training=False`,
    with the worked answers of the training set as `gold_dataset`.
    """

    _BOUNDS = {"max_per_prompt": AT_LEAST_1}  # noqa: RUF012  # not a field

    num_rounds: Annotated[int, OnResume.FIXED] = field(
        default=1, metadata={"help": "Has no effect: the verifier is trained once."}
    )
    max_completion_length: Annotated[int, OnResume.FIXED] = field(
        default=1, metadata={"help": "Has no effect: nothing is sampled."}
    )
    reward_threshold: Annotated[float, OnResume.UNTIL_TRAINED] = field(
        default=1.0,
        metadata={"help": "A completion is right if its weighted reward is at least this."},
    )
    max_per_prompt: Annotated[int | None, OnResume.UNTIL_TRAINED] = field(
        default=16,
        metadata={
            "help": "Maximum pairs per prompt, drawn without replacement from all pairs of a right "
            "and a wrong completion. None trains on every pair."
        },
    )
    deduplicate: Annotated[bool, OnResume.UNTIL_TRAINED] = field(
        default=True,
        metadata={
            "help": "Pair only one of a prompt's completions that are equal in normal form, over all "
            "rounds."
        },
    )

    def unused_fields(self) -> dict[str, str]:
        """Return the fields of rounds and of sampling."""
        return _UNUSED
