"""Choose which graded rollouts the model trains on, and count what each step dropped.

In: the graded rollouts of one round. Out: the kept ones, what became of every rollout, and a
`Funnel`. Pure functions of records, options and seed: the order of the records has no influence.

The steps, in this order: abstentions and completions cut by length go, the reward must reach the
threshold (STaR, arXiv 2203.14465, Algorithm 1, lines 5 and 6), hinted ones must not quote their
hint, what doesn't fit in training goes, then duplicates, and only then a prompt is capped.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_selfplay.rollouts.funnel import Funnel, Outcome, OutcomeCounts
from trl_selfplay.rollouts.normal_forms import default_normal_form
from trl_selfplay.rollouts.prompts import Prompt
from trl_selfplay.rollouts.record import Rollout

LeakFilter = Callable[[Any, str, Any], str | None]
NormalForm = Callable[[str], Hashable]


@dataclass(frozen=True, slots=True)
class Selection:
    """What a round trains on, and why not on the rest.

    Attributes:
        kept: Rollouts of the round, by (prompt_id, sample_index).
        outcomes: Every rollout's outcome, likewise.
        funnel: Their counts.
        history: Rollouts of earlier rounds that are trained on as well.
    """

    kept: tuple[Rollout, ...]
    outcomes: tuple[tuple[Rollout, Outcome], ...]
    funnel: Funnel
    history: tuple[Rollout, ...] = ()


def select(
    rollouts: Sequence[Rollout],
    *,
    reward_threshold: float,
    leak_filter: LeakFilter | None,
    prompts: Mapping[str, tuple[Prompt, Any]],
    normal_form: NormalForm | None,
    max_per_prompt: int | None,
    fits: Callable[[Rollout], bool] | None,
    seed: int,
    is_correct: Callable[[Rollout], bool] | None = None,
    history: Sequence[Rollout] = (),
    beside: Sequence[Rollout] = (),
    best_first: bool = False,
) -> Selection:
    """Select one round's rollouts to train on.

    Args:
        rollouts: Graded, each (prompt_id, sample_index) once, in any order.
        reward_threshold: A reward at this or above is correct.
        leak_filter: `f(prompt, completion, solution)` returns why a hinted completion quotes its
            hint, or None. Asked only of correct, hinted rollouts. None lets all pass.
        prompts: The unhinted prompt and the solution of each prompt id, for the leak filter.
        normal_form: Of a prompt's completions with equal normal form the one with the lowest
            sample index stays. None keeps duplicates.
        max_per_prompt: Most rollouts to keep of a prompt, after deduplication; None keeps all.
        fits: Says whether a rollout fits in a training row; None lets all pass.
        seed: Of the draw under the cap, which depends on nothing but it and the ids.
        is_correct: Decides instead of `reward_threshold`, on rollouts that were graded and ended
            by themselves.
        history: What earlier rounds selected, the newest round first. Those that repeat a newer
            one are left out, whatever `normal_form`; the others join the new ones before the cap
            is applied, and are counted apart.
        beside: What is trained on in any case; a rollout with the normal form of one of these, of
            its prompt, is a duplicate.
        best_first: Of duplicates the one with the highest reward stays, and the cap keeps the
            highest rewards, so that what a higher threshold selects is part of what a lower one
            does.

    Raises:
        ValueError: Two rollouts have the same prompt id and sample index, or one is not graded.
        TypeError: The leak filter returned something else than a reason or None.
    """
    ordered = sorted(rollouts, key=_key)
    _check_records(ordered)
    if is_correct is None:

        def is_correct(rollout: Rollout) -> bool:
            return rollout.passes(reward_threshold)

    outcomes: dict[tuple[str, int], Outcome] = {}
    leak_reasons: Counter[str] = Counter()
    candidates: dict[str, list[Rollout]] = {}
    for rollout in ordered:
        outcome = _grade_outcome(rollout, is_correct)
        if outcome == "kept" and rollout.hinted and leak_filter is not None:
            reason = _leak_reason(rollout, leak_filter, prompts)
            if reason is not None:
                leak_reasons[reason] += 1
                outcome = "leaked"
        if outcome == "kept" and fits is not None and not fits(rollout):
            outcome = "too_long"
        outcomes[_key(rollout)] = outcome
        if outcome == "kept":
            candidates.setdefault(rollout.prompt_id, []).append(rollout)
    form = normal_form or default_normal_form
    seen = {(r.prompt_id, form(r.completion)) for same in candidates.values() for r in same}
    given: dict[str, set[Hashable]] = {}
    for rollout in beside:
        given.setdefault(rollout.prompt_id, set()).add(form(rollout.completion))
    earlier: list[Rollout] = []
    for rollout in history:
        if not is_correct(rollout) or (fits is not None and not fits(rollout)):
            continue
        key = (rollout.prompt_id, form(rollout.completion))
        if key not in seen or (best_first and normal_form):  # among duplicates the best stays
            seen.add(key)
            earlier.append(rollout)
            candidates.setdefault(rollout.prompt_id, []).append(rollout)
    newest = ordered[0].round_index if ordered else 0
    dropped: dict[int, Outcome] = {}
    for prompt_id, same_prompt in candidates.items():
        if best_first:
            same_prompt.sort(
                key=lambda r: -(r.reward or 0.0)
            )  # stable: of equal ones the first stays
        distinct, duplicates = _split_duplicates(
            same_prompt, normal_form, given.get(prompt_id, set())
        )
        capped = _over_cap(distinct, max_per_prompt, seed, newest, best_first)
        dropped |= {id(r): "duplicate" for r in duplicates}
        dropped |= {id(r): "capped" for r in capped}
    outcomes |= {_key(r): dropped[id(r)] for r in ordered if id(r) in dropped}
    added = tuple(r for r in earlier if id(r) not in dropped)
    return Selection(
        kept=tuple(r for r in ordered if outcomes[_key(r)] == "kept"),
        outcomes=tuple((r, outcomes[_key(r)]) for r in ordered),
        funnel=_build_funnel(ordered, outcomes, leak_reasons, len(added)),
        history=added,
    )


def _key(rollout: Rollout) -> tuple[str, int]:
    return rollout.prompt_id, rollout.sample_index


def _check_records(ordered: Sequence[Rollout]) -> None:
    for i, rollout in enumerate(ordered):
        if i > 0 and _key(ordered[i - 1]) == _key(rollout):
            raise ValueError(
                f"prompt {rollout.prompt_id} has two rollouts with sample_index "
                f"{rollout.sample_index}; number hinted ones on from where the others end."
            )
        if not rollout.is_graded:
            raise ValueError(
                f"rollout {rollout.sample_index} of prompt {rollout.prompt_id} is not graded; "
                "selection needs rewards (None where every reward function abstained)."
            )


def _grade_outcome(rollout: Rollout, is_correct: Callable[[Rollout], bool]) -> Outcome:
    if rollout.reward is None:
        return "abstained"
    if rollout.is_truncated:
        return "truncated"
    return "kept" if is_correct(rollout) else "failed"


def _leak_reason(
    rollout: Rollout, leak_filter: LeakFilter, prompts: Mapping[str, tuple[Prompt, Any]]
) -> str | None:
    prompt, solution = prompts[rollout.prompt_id]
    reason = leak_filter(prompt, rollout.completion, solution)
    if reason is not None and not isinstance(reason, str):
        raise TypeError(
            f"leak_filter returned {reason!r}; return the reason as a short text such as "
            '"mentions_hint" for a completion to drop, or None for one to keep.'
        )
    return reason


def _split_duplicates(
    same_prompt: Sequence[Rollout], normal_form: NormalForm | None, given: set[Hashable]
) -> tuple[list[Rollout], list[Rollout]]:
    """Split one prompt's rollouts, in order of their indices, into first ones and repeats.

    What has one of the `given` forms repeats it.
    """
    if normal_form is None:
        return list(same_prompt), []
    seen = set(given)
    distinct: list[Rollout] = []
    duplicates: list[Rollout] = []
    for rollout in same_prompt:
        form = normal_form(rollout.completion)
        (duplicates if form in seen else distinct).append(rollout)
        seen.add(form)
    return distinct, duplicates


def _over_cap(
    distinct: Sequence[Rollout],
    max_per_prompt: int | None,
    seed: int,
    round_index: int,
    best_first: bool,
) -> list[Rollout]:
    """Return the rollouts of one prompt that are over the cap, drawn by a hash of seed and ids."""
    if max_per_prompt is None:
        return []

    def lot(rollout: Rollout) -> bytes:
        text = f"{seed}/{rollout.prompt_id}/{rollout.sample_index}"
        if rollout.round_index != round_index:  # of an earlier round, under an index of its own
            text += f"/{rollout.round_index}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def rank(rollout: Rollout) -> tuple[float, bytes]:
        return -(rollout.reward or 0.0) if best_first else 0.0, lot(rollout)

    return sorted(distinct, key=rank)[max_per_prompt:]


def _build_funnel(
    rollouts: Sequence[Rollout],
    outcomes: Mapping[tuple[str, int], Outcome],
    leak_reasons: Mapping[str, int],
    num_history: int,
) -> Funnel:
    counts: dict[bool, Counter[str]] = {
        hinted: Counter(outcomes[_key(r)] for r in rollouts if r.hinted == hinted)
        for hinted in (False, True)
    }
    wrong = ("abstained", "truncated", "failed")
    solved = {r.prompt_id for r in rollouts if not r.hinted and outcomes[_key(r)] not in wrong}
    return Funnel(
        prompts=len({r.prompt_id for r in rollouts}),
        prompts_solved=len(solved),
        unhinted=OutcomeCounts(**counts[False]),
        hinted=OutcomeCounts(**counts[True]),
        leak_reasons=tuple(sorted(leak_reasons.items())),
        history=num_history,
    )


def unsolved_prompts(rollouts: Collection[Rollout], reward_threshold: float) -> set[str]:
    """Return the ids of prompts without any finished, unhinted rollout that reached the threshold.

    These are the ones to rationalize.

    Source: STaR, arXiv 2203.14465, Algorithm 1, line 6.
    """
    solved = {r.prompt_id for r in rollouts if not r.hinted and r.passes(reward_threshold)}
    return {r.prompt_id for r in rollouts} - solved
