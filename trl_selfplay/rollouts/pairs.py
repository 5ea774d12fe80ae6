"""Pair right with wrong completions of the same prompt.

In: graded rollouts, and human completions if there are any. Out: pairs of rollouts, and
the outcome of every rollout. Pure functions of records, options and seed: the order of the records
doesn't matter.

Source: IRPO, arXiv 2404.19733, section 2; V-STaR, arXiv 2402.06457, Algorithm 1.
"""

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from trl_selfplay.rollouts.funnel import Outcome
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.selection import (
    Selection,
    SelectionRules,
    default_normal_form,
    select,
)
from trl_selfplay.rollouts.sequence import Rollouts


@dataclass(frozen=True, slots=True)
class Pairing:
    """The pairs of a round.

    Attributes:
        chosen: The right rollout of each pair, ordered by prompt.
        rejected: The wrong rollout of each pair, of the same prompt.
        selection: The outcome of every rollout. Right rollouts are "kept" if they are in a pair,
            "capped" if they were not drawn, and "unpaired" if their prompt has no wrong rollout. Wrong
            rollouts are "failed", whether they are in a pair or not.
        metrics: Counts for the log: pairs, and prompts with one, without a right completion, and
            without a wrong one.
    """

    chosen: Rollouts
    rejected: Rollouts
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
    gold.sort(key=lambda r: r.sample_index)  # all below those of samples
    rules = SelectionRules(
        is_right, seed, fits=fits, normal_form=default_normal_form if deduplicate else None
    )
    right = select(rollouts, rules, beside=gold)
    wrong = select(rollouts, replace(rules, is_correct=lambda rollout: not is_right(rollout)))
    facts = right.facts
    right_places: dict[str, list[int]] = {}  # among the round's rollouts, then `gold`
    for place, rollout in enumerate(gold, start=len(facts.rollouts)):
        right_places.setdefault(rollout.prompt_id, []).append(place)
    for prompt_id, place in _kept(right):
        right_places.setdefault(prompt_id, []).append(place)
    wrong_places: dict[str, list[int]] = {}
    for prompt_id, place in _kept(wrong):
        wrong_places.setdefault(prompt_id, []).append(place)
    pairs: list[array[int]] = [array("q"), array("q")]
    paired = right_places.keys() & wrong_places.keys()
    for prompt_id in sorted(paired):
        every = list(product(right_places[prompt_id], wrong_places[prompt_id]))
        count = len(every) if max_pairs is None else min(max_pairs, len(every))
        for pair in random.Random(f"pairs/{seed}/{prompt_id}").sample(every, count):
            for side, place in zip(pairs, pair, strict=True):
                side.append(place)
    drawn = set(pairs[0])

    def outcome_at(place: int, outcome: Outcome) -> Outcome:
        if outcome != "kept" or place in drawn:
            return outcome
        return "capped" if facts.prompt_ids[facts.prompts[place]] in wrong_places else "unpaired"

    pool = right.rollouts + gold
    return Pairing(
        chosen=pool.pick(pairs[0]),
        rejected=pool.pick(pairs[1]),
        selection=Selection.from_outcomes(
            facts,
            [outcome_at(place, outcome) for place, outcome in enumerate(right.outcomes)],
            gold=[r for i, r in enumerate(gold, len(facts.rollouts)) if i in drawn],
        ),
        metrics={
            "select/examples": float(len(pairs[0])),
            "select/prompts_paired": float(len(paired)),
            "select/prompts_without_right": float(len(set(facts.prompt_ids) - right_places.keys())),
            "select/prompts_without_wrong": float(len(right_places.keys() - wrong_places.keys())),
        },
    )


def _kept(selection: Selection) -> Iterator[tuple[str, int]]:
    """Yield the prompt and the place of each rollout that is kept."""
    facts = selection.facts
    for place, outcome in enumerate(selection.outcomes):
        if outcome == "kept":
            yield facts.prompt_ids[facts.prompts[place]], place
