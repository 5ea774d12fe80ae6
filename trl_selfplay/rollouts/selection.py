"""Select the graded rollouts that the model trains on, and count what each step drops.

In: the graded rollouts of one round. Out: the kept ones, the outcome of every rollout, and a `Funnel`.
Pure functions of records, options and seed: the order of the records doesn't matter.

The steps, in this order: drop trajectories that ended without an answer, abstentions and truncated
completions; drop those whose reward is below
the threshold (STaR, arXiv 2203.14465, Algorithm 1, lines 5 and 6), hinted ones that quote their hint,
those that don't fit into a training row, and duplicates; then apply the cap per prompt.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Self

import numpy as np

from trl_selfplay.rewards.equations import find_equations
from trl_selfplay.rollouts.facts import Facts, digest_form, examine
from trl_selfplay.rollouts.funnel import UNFINISHED, Funnel, Outcome, OutcomeCounts, count_causes
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.sequence import Rollouts

NormalForm = Callable[[str], Hashable]
_WRONG: tuple[Outcome, ...] = ("abstained", "failed", *UNFINISHED)


@dataclass(frozen=True, slots=True)
class SelectionRules:
    """Which rollouts of a round are trained on.

    Attributes:
        is_correct: Whether a rollout that was graded and ended by itself is right.
        seed: Seed of the draw under the cap, which depends only on the seed and the ids.
        leak_reason: Returns why a completion quotes its hint, or None. Asked only of correct,
            hinted rollouts. None lets all pass.
        fits: Whether a rollout fits in a training row; None lets all pass.
        normal_form: Of a prompt's completions with equal normal form, the one with the lowest
            sample index is kept. None keeps duplicates.
        max_per_prompt: Maximum rollouts kept per prompt, after deduplication; None keeps all.
        best_first: Of duplicates, the one with the highest reward is kept, and the cap keeps the
            highest rewards, so that a higher threshold selects a subset of what a lower one
            selects.
    """

    is_correct: Callable[[Rollout], bool]
    seed: int
    leak_reason: Callable[[Rollout], str | None] | None = None
    fits: Callable[[Rollout], bool] | None = None
    normal_form: NormalForm | None = None
    max_per_prompt: int | None = None
    best_first: bool = False

    def lets_pass(self, rollout: Rollout) -> bool:
        """Return whether a rollout is right and fits."""
        return self.is_correct(rollout) and (self.fits is None or self.fits(rollout))


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What a round trains on, and why the rest was left out.

    Attributes:
        facts: Of every rollout of the round, by (prompt_id, sample_index).
        outcomes: The outcome of each, in the same order.
        kept: Rollouts of the round that are trained on, in this order.
        funnel: Counts of the outcomes.
        history: Rollouts of earlier rounds that are trained on as well.
        gold: Human completions that are trained on as well.
    """

    facts: Facts
    outcomes: tuple[Outcome, ...]
    kept: Rollouts
    funnel: Funnel
    history: Sequence[Rollout] = ()
    gold: Sequence[Rollout] = ()

    @classmethod
    def of(
        cls,
        rollouts: Sequence[Rollout],
        outcome_of: Callable[[Rollout], Outcome],
        unsolved: Collection[Outcome] = _WRONG,
    ) -> Self:
        """Count the outcomes of a round's rollouts, and take those that are "kept".

        Args:
            rollouts: Each (prompt_id, sample_index) once, in any order.
            outcome_of: Returns the outcome of each.
            unsolved: As in `from_outcomes`.
        """
        facts, outcomes, _ = examine(rollouts, lambda rollout: (outcome_of(rollout), None))
        return cls.from_outcomes(facts, outcomes, unsolved=unsolved)

    @classmethod
    def from_outcomes(
        cls,
        facts: Facts,
        outcomes: Sequence[Outcome],
        *,
        unsolved: Collection[Outcome] = _WRONG,
        leak_reasons: Mapping[str, int] = MappingProxyType({}),
        history: Sequence[Rollout] = (),
        gold: Sequence[Rollout] = (),
    ) -> Self:
        """Count outcomes, and take the rollouts that are "kept".

        Args:
            facts: Of every rollout of the round.
            outcomes: Of each, in the same order.
            unsolved: A prompt counts as solved if it has a completion without hint with any other
                outcome than these.
            leak_reasons: Number of leaked completions by reason.
            history: As the attribute, like `gold`.
            gold: Human completions.
        """
        counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        solved = set()
        for prompt, hinted, outcome in zip(
            facts.prompts.tolist(), facts.hinted.tolist(), outcomes, strict=True
        ):
            counts[hinted][outcome] += 1
            if not hinted and outcome not in unsolved:
                solved.add(prompt)
        funnel = Funnel(
            prompts=len(facts.prompt_ids),
            prompts_solved=len(solved),
            unhinted=OutcomeCounts(**counts[False]),
            hinted=OutcomeCounts(**counts[True]),
            leak_reasons=tuple(sorted(leak_reasons.items())),
            abstain_causes=count_causes(
                cause
                for cause, outcome in zip(facts.causes, outcomes, strict=True)
                if outcome == "abstained"
            ),
            history=len(history),
        )
        kept = [place for place, outcome in enumerate(outcomes) if outcome == "kept"]
        return cls(facts, tuple(outcomes), facts.rollouts.pick(kept), funnel, history, gold)

    @property
    def rollouts(self) -> Rollouts:
        """All rollouts of the round."""
        return self.facts.rollouts

    @property
    def examples(self) -> Rollouts:
        """What is trained on: of this round, of earlier ones, and human completions."""
        return self.kept + self.history + self.gold


def select(
    rollouts: Sequence[Rollout],
    rules: SelectionRules,
    *,
    history: Sequence[Rollout] = (),
    beside: Sequence[Rollout] = (),
) -> Selection:
    """Select one round's rollouts to train on.

    Args:
        rollouts: Graded, each (prompt_id, sample_index) once, in any order.
        rules: How to select.
        history: What earlier rounds selected. Those that repeat a newer one are left out, whatever
            `normal_form`; the others join the new ones before the cap is applied, and are counted
            separately.
        beside: Completions that are trained on in any case; a rollout with the normal form of one
            of them for the same prompt is a duplicate.

    Raises:
        ValueError: Two rollouts have the same prompt id and sample index, or one is not graded.
    """
    leak_reasons: Counter[str] = Counter()
    form = rules.normal_form or default_normal_form

    def form_of(rollout: Rollout) -> Hashable:
        return digest_form(form(rollout.completion))

    def judge(rollout: Rollout) -> tuple[Outcome, Hashable]:
        outcome = _grade_outcome(rollout, rules.is_correct)
        if outcome == "kept" and rollout.hinted and rules.leak_reason is not None:
            reason = rules.leak_reason(rollout)
            if reason is not None:
                leak_reasons[reason] += 1
                outcome = "leaked"
        if outcome == "kept" and rules.fits is not None and not rules.fits(rollout):
            outcome = "too_long"
        return outcome, form_of(rollout) if outcome == "kept" else None

    def judge_earlier(rollout: Rollout) -> tuple[Outcome, Hashable]:
        return ("kept", form_of(rollout)) if rules.lets_pass(rollout) else ("failed", None)

    facts, outcomes, forms = examine(rollouts, judge)
    _check_records(facts)
    old, passing, old_forms = examine(history, judge_earlier)
    newest_first = np.lexsort((old.sample_indices, old.prompts, -old.round_indices))
    given: dict[str, set[Hashable]] = {}
    for rollout in beside:
        given.setdefault(rollout.prompt_id, set()).add(form_of(rollout))
    earlier: dict[str, list[_Candidate]] = {}
    for place in newest_first.tolist():
        if passing[place] == "kept":
            candidate = _Candidate.of(old, place, old_forms[place], is_earlier=True)
            earlier.setdefault(candidate.prompt_id, []).append(candidate)
    newest = int(facts.round_indices[0]) if outcomes else 0
    repeats: set[int] = set()
    for prompt_id, same_prompt in _by_prompt(facts, outcomes, forms, earlier):
        seen = {c.form for c in same_prompt}
        for candidate in earlier.get(prompt_id, ()):
            # Among duplicates, the best is kept.
            if candidate.form not in seen or (rules.best_first and rules.normal_form):
                seen.add(candidate.form)
                same_prompt.append(candidate)
            else:
                repeats.add(candidate.place)
        if rules.best_first:  # the sort is stable: of equal ones, the first is kept
            same_prompt.sort(key=lambda c: -c.reward)
        distinct: Sequence[_Candidate] = same_prompt
        duplicates: Sequence[_Candidate] = ()
        if rules.normal_form is not None:
            distinct, duplicates = _split_duplicates(same_prompt, given.get(prompt_id, set()))
        capped = _over_cap(distinct, rules, newest)
        reasons: tuple[tuple[Outcome, Sequence[_Candidate]], ...]
        reasons = ("duplicate", duplicates), ("capped", capped)
        for outcome, dropped in reasons:
            for candidate in dropped:
                if candidate.is_earlier:
                    repeats.add(candidate.place)
                else:
                    outcomes[candidate.place] = outcome
    selected = [i for i in newest_first.tolist() if passing[i] == "kept" and i not in repeats]
    return Selection.from_outcomes(
        facts,
        outcomes,
        leak_reasons=leak_reasons,
        history=old.rollouts.pick(selected),
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A rollout that may be trained on: what the choice among those of its prompt depends on."""

    place: int
    is_earlier: bool
    prompt_id: str
    sample_index: int
    round_index: int
    reward: float
    form: Hashable

    @classmethod
    def of(cls, facts: Facts, place: int, form: Hashable, is_earlier: bool) -> Self:
        reward = float(facts.rewards[place])
        return cls(
            place=place,
            is_earlier=is_earlier,
            prompt_id=facts.prompt_ids[facts.prompts[place]],
            sample_index=int(facts.sample_indices[place]),
            round_index=int(facts.round_indices[place]),
            reward=0.0 if math.isnan(reward) else reward,
            form=form,
        )


def _by_prompt(
    facts: Facts,
    outcomes: Sequence[Outcome],
    forms: Sequence[Hashable],
    earlier: Collection[str],
) -> Iterator[tuple[str, list[_Candidate]]]:
    """Yield each prompt's rollouts that may be kept; none for one that only `earlier` rounds have."""
    left = set(earlier)
    kept = (place for place, outcome in enumerate(outcomes) if outcome == "kept")
    for _, places in groupby(kept, key=facts.prompts.__getitem__):
        found = [_Candidate.of(facts, place, forms[place], is_earlier=False) for place in places]
        left.discard(found[0].prompt_id)
        yield found[0].prompt_id, found
    for prompt_id in left:
        yield prompt_id, []


def _check_records(facts: Facts) -> None:
    repeated = np.zeros(len(facts.rollouts), bool)
    repeated[1:] = (np.diff(facts.prompts) == 0) & (np.diff(facts.sample_indices) == 0)
    for place in np.flatnonzero(repeated | ~facts.graded)[:1].tolist():
        prompt_id = facts.prompt_ids[facts.prompts[place]]
        if repeated[place]:
            raise ValueError(
                f"prompt {prompt_id} has two rollouts with sample_index "
                f"{facts.sample_indices[place]}; number hinted ones after the others."
            )
        raise ValueError(
            f"rollout {facts.sample_indices[place]} of prompt {prompt_id} is not graded; "
            "selection needs rewards (None where every reward function abstained)."
        )


def _grade_outcome(rollout: Rollout, is_correct: Callable[[Rollout], bool]) -> Outcome:
    if rollout.halt is not None:
        return rollout.halt
    if rollout.reward is None:
        return "abstained"
    if rollout.is_truncated:
        return "truncated"
    return "kept" if is_correct(rollout) else "failed"


def _split_duplicates(
    same_prompt: Sequence[_Candidate], given: set[Hashable]
) -> tuple[list[_Candidate], list[_Candidate]]:
    """Split one prompt's rollouts, in order of their indices, into first ones and repeats.

    Rollouts with one of the `given` forms are repeats.
    """
    seen = set(given)
    distinct: list[_Candidate] = []
    duplicates: list[_Candidate] = []
    for candidate in same_prompt:
        (duplicates if candidate.form in seen else distinct).append(candidate)
        seen.add(candidate.form)
    return distinct, duplicates


def _over_cap(
    distinct: Sequence[_Candidate], rules: SelectionRules, round_index: int
) -> Sequence[_Candidate]:
    """Return the rollouts of one prompt that are over the cap, drawn by a hash of seed and ids."""
    if rules.max_per_prompt is None:
        return []

    def draw(candidate: _Candidate) -> bytes:
        text = f"{rules.seed}/{candidate.prompt_id}/{candidate.sample_index}"
        if candidate.round_index != round_index:  # of an earlier round, under an index of its own
            text += f"/{candidate.round_index}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def rank(candidate: _Candidate) -> tuple[float, bytes]:
        return -candidate.reward if rules.best_first else 0.0, draw(candidate)

    return sorted(distinct, key=rank)[rules.max_per_prompt :]


def unsolved_prompts(rollouts: Iterable[Rollout], reward_threshold: float) -> set[str]:
    """Return the ids of prompts without any finished, unhinted rollout that reached the threshold.

    These are to be rationalized.

    Source: STaR, arXiv 2203.14465, Algorithm 1, line 6.
    """
    prompts, solved = set(), set()
    for rollout in rollouts:
        prompts.add(rollout.prompt_id)
        if not rollout.hinted and rollout.passes(reward_threshold):
            solved.add(rollout.prompt_id)
    return prompts - solved


# Forms under which two completions of one prompt count as the same.


def default_normal_form(completion: str) -> str:
    r"""Return a completion in lower case with white space folded.

    >>> default_normal_form(" 3 + 4\n= 7. Answer:  7 ")
    '3 + 4 = 7. answer: 7'
    """
    return " ".join(completion.lower().split())


def reasoning_path(completion: str) -> tuple[str, ...]:
    """Return the list of equations of a completion, in order and in one spelling.

    Two orders of the same equations, or of the operands of one, are different paths. A text
    without any equation is its own path, lower-cased and with white space folded; the official
    code would treat all such texts of a prompt as one path.

    Source: RFT, arXiv 2308.01825, section 3.3: one path for each distinct equation list. Of the
    samples with the same list, RFT keeps the one farthest from the others by edit distance; here,
    it is the one that was sampled first.

    >>> reasoning_path("Half of 48 is <<48 / 2=24>>24.") == reasoning_path("So <<48/2 = 24>>24 clips.")
    True
    """
    return tuple(find_equations(completion)) or (default_normal_form(completion),)
