"""Pair right with wrong completions of the same prompt.

In: graded rollouts, and human completions if there are any. Out: pairs of rollouts, and
the outcome of every rollout. Pure functions of records, options and seed: the order of the records
doesn't matter.

Source: IRPO, arXiv 2404.19733, section 2; V-STaR, arXiv 2402.06457, Algorithm 1.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

from trl_selfplay.rollouts.funnel import Outcome
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.selection import (
    Selection,
    SelectionRules,
    default_normal_form,
    select,
)


@dataclass(frozen=True, slots=True)
class Pairing:
    """The pairs of a round.

    Attributes:
        pairs: (right, wrong) rollouts of the same prompt, ordered by prompt.
        selection: The outcome of every rollout. Right rollouts are "kept" if they are in a pair,
            "capped" if they were not drawn, and "unpaired" if their prompt has no wrong rollout. Wrong
            rollouts are "failed", whether they are in a pair or not.
        metrics: Counts for the log: pairs, and prompts with one, without a right completion, and
            without a wrong one.
    """

    pairs: tuple[tuple[Rollout, Rollout], ...]
    selection: Selection
    metrics: dict[str, float]


def pair_rollouts(
    rollouts: Sequence[Rollout],
    gold: Sequence[Rollout],
    *,
    is_right: Callable[[Rollout], bool],
    fits: Callable[[Rollout], bool],
    deduplicate: bool,
    max_pairs: int | None,
    seed: int,
) -> Pairing:
    """Draw pairs of a right and a wrong completion for every prompt that has both.

    Abstentions, completions cut by length and those that don't fit in training are on neither side.

    Args:
        rollouts: Graded, each (prompt_id, sample_index) once, in any order.
        gold: Graded human completions; right ones may be chosen, wrong ones are on neither side.
        is_right: Whether a completion that was graded and ended by itself is right.
        fits: Whether a completion fits in a training row.
        deduplicate: Use only one of a prompt's completions that are equal in normal form.
        max_pairs: Maximum number of pairs per prompt, drawn without replacement from all of its
            pairs; None takes all.
        seed: Seed of the draw, which depends on nothing else but the ids.
    """
    gold = [rollout for rollout in gold if is_right(rollout) and fits(rollout)]
    rules = SelectionRules(
        is_right, seed, fits=fits, normal_form=default_normal_form if deduplicate else None
    )
    right = select(rollouts, rules, beside=gold)
    wrong = select(rollouts, replace(rules, is_correct=lambda rollout: not is_right(rollout)))
    chosen = _by_prompt([*right.kept, *gold])
    rejected = _by_prompt(wrong.kept)
    pairs: list[tuple[Rollout, Rollout]] = []
    for prompt_id in sorted(chosen.keys() & rejected.keys()):
        every = list(product(chosen[prompt_id], rejected[prompt_id]))
        count = len(every) if max_pairs is None else min(max_pairs, len(every))
        pairs += random.Random(f"pairs/{seed}/{prompt_id}").sample(every, count)
    drawn = {id(rollout) for rollout, _ in pairs}

    def outcome_of(rollout: Rollout, outcome: Outcome) -> Outcome:
        if outcome != "kept" or id(rollout) in drawn:
            return outcome
        return "capped" if rollout.prompt_id in rejected else "unpaired"

    prompts = {r.prompt_id for r in rollouts}
    return Pairing(
        pairs=tuple(pairs),
        selection=Selection.from_outcomes(
            ((r, outcome_of(r, outcome)) for r, outcome in right.outcomes),
            gold=[rollout for rollout in gold if id(rollout) in drawn],
        ),
        metrics={
            "select/examples": float(len(pairs)),
            "select/prompts_paired": float(len(chosen.keys() & rejected.keys())),
            "select/prompts_without_right": float(len(prompts - chosen.keys())),
            "select/prompts_without_wrong": float(len(chosen.keys() - rejected.keys())),
        },
    )


def _by_prompt(rollouts: Iterable[Rollout]) -> dict[str, list[Rollout]]:
    ordered = sorted(rollouts, key=lambda r: (r.prompt_id, r.sample_index))
    return {name: list(group) for name, group in groupby(ordered, key=lambda r: r.prompt_id)}
