"""Warn of fields that have no effect beside others, or with the data at hand.

In: a config, and what its trainer was given besides. Out: one warning for each cause. Fields that could
never have an effect are refused by the configs themselves.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from trl_selfplay.rounds.plan import per_round_lists
from trl_selfplay.trainers.config import sampling_temperatures

logger = logging.getLogger(__name__)


def warn_unused_fields(
    config: Any, *, has_heldout: bool, has_examples: bool, has_tools: bool, num_prompts: int
) -> None:
    """Warn of fields of a config over rounds that were set and change nothing.

    Args:
        config: Checked already.
        has_heldout: Whether there are held-out prompts.
        has_examples: Whether there are few-shot examples.
        has_tools: Whether completions may call tools.
        num_prompts: Number of training prompts.
    """
    needs: dict[str, list[str]] = {}
    if not config.log_completions:
        needs["log_completions=True"] = ["num_completions_to_print", "log_unique_prompts"]
    if max(sampling_temperatures(config)) == 0.0:
        needs["a temperature above 0"] = ["top_p", "top_k", "min_p"]
    if not has_heldout:
        needs["an `eval_dataset`"] = ["num_generations_eval", "temperature_eval"]
    elif config.num_generations_eval == 0:
        needs["num_generations_eval above 0"] = ["temperature_eval"]
    if not has_examples:
        needs["`few_shot_examples`"] = ["few_shot_in_training"]
    if not has_tools:
        fields = ["max_tool_calling_iterations", "tool_deadline", "tool_format"]
        needs["`tools` or an `environment_factory`"] = fields
    warn_without(config, needs)
    for name, replaced in per_round_lists(type(config)).items():
        values, value = getattr(config, name), getattr(config, replaced)
        if values and _is_set(config, replaced) and not math.isclose(value, values[0]):
            logger.warning(
                "%s=%r has no effect: %s=%r takes its place in every round. Leave one out.",
                replaced,
                value,
                name,
                values,
            )
    most = config.num_prompts_per_round
    if most is not None and most > num_prompts:
        logger.warning(
            "num_prompts_per_round=%d has no effect: there are %d different prompts, and each round "
            "uses all of them.",
            most,
            num_prompts,
        )


def warn_without(config: Any, needs: Mapping[str, Iterable[str]]) -> None:
    """Warn of fields that differ from their defaults and need something that isn't there.

    Args:
        config: Any config.
        needs: Fields by what they need, in words that follow "without".
    """
    for condition, names in needs.items():
        given = [f"{name}={getattr(config, name)!r}" for name in names if _is_set(config, name)]
        if given:
            logger.warning(
                "%s: without effect without %s. Set that, or leave %s out.",
                ", ".join(given),
                condition,
                "it" if len(given) == 1 else "them",
            )


def _is_set(config: Any, name: str) -> bool:
    """Return whether a config has a field, and not at its default."""
    each = config.__dataclass_fields__.get(name)
    return each is not None and getattr(config, name) != each.default
