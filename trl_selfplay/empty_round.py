"""A round that kept nothing: stop the run, or raise, and say what the usual reason is.

In: what a round's selection came to. Out: a warning or an error with the funnel and completions.
"""

import logging
from typing import Any

from trl_selfplay.funnel import describe_funnel

logger = logging.getLogger(__name__)


class EmptyRoundError(RuntimeError):
    """A round kept nothing to train on."""


def handle_empty_round(args: Any, round_index: int, played: Any) -> None:
    """Say why a round kept nothing and what to do, with the funnel and three completions.

    Args:
        args: The trainer's.
        round_index: The round.
        played: The `PlayedRound`.

    Raises:
        EmptyRoundError: Unless `on_empty_round` is "stop", which warns.
    """
    examples = "\n".join(
        f"--- {r.prompt[-200:]!r}\n    → {r.completion[:300]!r} (finish {r.finish}, reward {r.reward})"
        for r in played.rollouts[:3]
    )
    num_too_long = played.funnel.unhinted.too_long + played.funnel.hinted.too_long
    remedy = played.remedy or (
        f"{num_too_long} correct completions are longer than max_length={args.max_length} with "
        "their prompts: raise it."
        if num_too_long
        else "A wrong answer format is the usual reason; compare these completions with what the reward "
        "functions expect. Show the format with few_shot_examples, sample more (num_generations, "
        "temperature), raise max_completion_length, or lower reward_threshold."
    )
    message = (
        f"round {round_index} kept nothing to train on: {describe_funnel(played.funnel)}. {remedy} "
        f"Completions:\n{examples}"
    )
    if args.on_empty_round == "raise":
        raise EmptyRoundError(message)
    logger.warning("stopping: %s", message)
