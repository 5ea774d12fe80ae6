"""Fields of the configs whose rounds are graded by reward functions, and their checks."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from trl_selfplay.rounds.plan import OnResume
from trl_selfplay.trainers.config import SelfPlayConfig
from trl_selfplay.trainers.field_checks import ABOVE_0, AT_LEAST_0, AT_LEAST_1
from trl_selfplay.trainers.ported_scripts import refuse_grpo_loss


@dataclass
class GradedConfig(SelfPlayConfig):
    """Fields of selection by reward.

    Attributes:
        ranks_steps: Set by a trainer with an agent: reward functions rank the samples of a step, and none has
            to reach a threshold.
    """

    ranks_steps = False  # not a field

    _BOUNDS = {  # noqa: RUF012  # not a field
        "max_per_prompt": AT_LEAST_1,
        "few_shot_rounds": AT_LEAST_0,
        "max_tool_calling_iterations": AT_LEAST_0,
        "tool_deadline": ABOVE_0,
    }

    reward_weights: Annotated[list[float] | None, OnResume.FIXED] = field(
        default=None,
        metadata={
            "help": "Weight of each reward function; None gives each a weight of 1.0.",
        },
    )
    reward_threshold: Annotated[float, OnResume.UNTIL_TRAINED] = field(
        default=1.0,
        metadata={
            "help": "A completion is correct if its weighted reward is at least this.",
        },
    )
    max_per_prompt: Annotated[int | None, OnResume.UNTIL_TRAINED] = field(
        default=None,
        metadata={
            "help": "Maximum completions kept per prompt, drawn at random after deduplication. None "
            "keeps all.",
        },
    )
    deduplicate: Annotated[bool, OnResume.UNTIL_TRAINED] = field(
        default=True,
        metadata={
            "help": "Keep only one of a prompt's completions with the same normal form.",
        },
    )
    few_shot_in_training: Annotated[bool, OnResume.FIXED] = field(
        default=False,
        metadata={
            "help": "Keep the few-shot examples in the prompt for training and evaluation as well, not "
            "only for sampling.",
        },
    )
    few_shot_rounds: Annotated[int | None, OnResume.FIXED] = field(
        default=None,
        metadata={
            "help": "Number of initial rounds that sample with the few-shot examples; later ones ask in "
            "the form that the model is trained on. None: all rounds, as in the paper.",
        },
    )
    max_tool_calling_iterations: Annotated[int | None, OnResume.FIXED] = field(
        default=None,
        metadata={
            "help": "Maximum turns of a completion whose calls of tools are made. None: no limit but "
            "`max_completion_length`, which results count towards.",
        },
    )
    tool_deadline: Annotated[float, OnResume.WARNED] = field(
        default=10.0,
        metadata={
            "help": "Seconds that a call of a tool may take. The process of one that takes longer is killed, "
            "and the model reads that it failed.",
        },
    )
    tool_format: Annotated[str | None, OnResume.FIXED] = field(
        default=None,
        metadata={
            "help": "How tools are shown and called: chat (by the chat template), or react (in words, as "
            "Thought, Action, Observation). None: chat if the chat template knows tools, else react.",
            "choices": ["chat", "react"],
        },
    )

    def __post_init__(self) -> None:
        config: Any = self  # the other base of each config is TRL's
        refuse_grpo_loss(config.loss_type)
        super().__post_init__()
        check_graded_config(config)

    def how_to_keep_more(self, highest_reward: float) -> str:
        """Return what lets more completions pass, in words that follow "or"."""
        return (
            f"lower reward_threshold={self.reward_threshold} (the highest reward, truncated "
            f"completions included, was {highest_reward:g})"
        )


def check_graded_config(config: Any) -> None:
    """Raise ValueError for values of the fields of selection that can't work."""
    if config.reward_weights == []:
        raise ValueError("reward_weights=[]; give one for each reward function, or None (all 1.0).")
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
