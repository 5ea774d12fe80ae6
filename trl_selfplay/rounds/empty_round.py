"""A round that kept nothing: stop the run, or raise, with the usual reason.

In: what a round's selection came to. Out: a warning or an error with the funnel and completions.
"""

import heapq
import logging
from typing import Any

from trl_selfplay.disk import RESUME
from trl_selfplay.evaluation.room_of_results import RoomOfResults
from trl_selfplay.rollouts.funnel import (
    UNFINISHED,
    describe_causes,
    describe_funnel,
)
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.sequence import Rollouts

logger = logging.getLogger(__name__)


class EmptyRoundError(RuntimeError):
    """A round kept nothing to train on."""


def handle_empty_round(args: Any, round_index: int, played: PlayedRound) -> None:
    """Report why a round kept nothing and what to do, with the funnel and three completions.

    Raises:
        EmptyRoundError: Unless `on_empty_round` is "stop", which warns.
    """
    examples = "\n".join(
        f"--- {r.prompt[-200:]!r}\n    → {r.completion[:300]!r} (finish {r.finish}, reward {r.reward})"
        for r in heapq.nsmallest(
            3, (r for _, r in Rollouts.of(played.rollouts).scan()), key=_finished_first
        )
    )
    funnel = played.funnel
    kept = (
        " The samples are kept: num_generations, reward_threshold and max_length may change before "
        f"you {RESUME}; what changes the sampling needs another output_dir."
        if round_index == 0
        else ""
    )
    message = (
        f"round {round_index} kept nothing to train on: "
        f"{describe_funnel(funnel, graded=bool(played.rewards))}. "
        f"{played.remedy or _remedy(args, played) + kept} Completions:\n{examples}"
    )
    if args.on_empty_round == "raise":
        raise EmptyRoundError(message)
    logger.warning("stopping: %s", message)


def _finished_first(rollout: Rollout) -> tuple[bool, bool, str, int]:
    return not rollout.is_finished, rollout.hinted, rollout.prompt_id, rollout.sample_index


def _remedy(args: Any, played: PlayedRound) -> str:
    """Return what to do about a round that rewards left empty."""
    funnel = played.funnel
    num_too_long = funnel.unhinted.too_long + funnel.hinted.too_long
    num_abstained = funnel.unhinted.abstained + funnel.hinted.abstained
    num_sampled = funnel.unhinted.sampled + funnel.hinted.sampled
    if num_too_long:
        return (
            f"{num_too_long} correct completions are longer than max_length={args.max_length} with "
            "their prompts: raise it."
        )
    if num_abstained == num_sampled:
        names = ", ".join(name for name in played.rewards if name != "mean")
        causes = describe_causes(funnel.abstain_causes)
        usual = (
            "Usually the `solution` column can't be read, or a function returns None or NaN for what "
            "it should give 0.0."
        )
        return (
            f"The reward functions ({names}) abstained on all of them: None says that a completion "
            f"has no score, not that it is wrong. {f'Causes: {causes}.' if causes else usual}"
        )
    if funnel.unhinted.unfinished + funnel.hinted.unfinished == num_sampled:
        return _finish(args, played)
    (rewards,) = Rollouts.of(played.rollouts).columns("reward")
    highest = max((reward for reward in rewards if reward is not None), default=0.0)
    return (
        "A wrong answer format is the usual reason; compare these completions with what the reward "
        "functions expect. Show the format with few_shot_examples, sample more (num_generations, "
        f"temperature), raise max_completion_length, or {args.how_to_keep_more(highest)}."
    )


def _finish(args: Any, played: PlayedRound) -> str:
    """Return what to do where no completion came to an end, about the most frequent reason first."""
    funnel = played.funnel
    counts = {o: getattr(funnel.unhinted, o) + getattr(funnel.hinted, o) for o in UNFINISHED}
    reasons = sorted((o for o in UNFINISHED if counts[o]), key=lambda o: -counts[o])
    if len(reasons) == 1:
        return _advise(args, played, reasons[0], counts[reasons[0]], "All")
    advice = (_advise(args, played, o, counts[o], str(counts[o])) for o in reasons)
    return f"None has an end. {' '.join(advice)}"


def _advise(args: Any, played: PlayedRound, reason: str, count: int, share: str) -> str:
    """Return what to do about completions that came to no end for one reason."""
    if reason == "malformed":
        return (
            f"{share} of them ended with a call that can't be read, and such trajectories are never "
            "trained on. Show how a call is written with few_shot_examples, choose another tool_format, "
            "or begin with a model that was trained to call tools."
        )
    if reason == "tool_limit":
        return (
            f"{share} of them wanted more calls than max_tool_calling_iterations="
            f"{args.max_tool_calling_iterations}, and such trajectories are never trained on. Raise it, "
            "or show with few_shot_examples when to answer."
        )
    most = args.max_completion_length
    results = RoomOfResults()
    for _, rollout in Rollouts.of(played.rollouts).scan():
        results.add(rollout, most)
    if results.num_without_room > count / 2:
        return (
            f"In {results.num_without_room} of them there was no room for the result of a call: results count "
            f"towards max_completion_length={most}, and to the model's context. Raise it, or let the tools "
            "return less."
        )
    return (
        f"{share} of them were cut at max_completion_length={args.max_completion_length}, and what "
        "is cut is never trained on. Raise it, set stop_strings, or check that the model knows "
        "its EOS token."
    )
