"""Select the graded rollouts that the model trains on, and count what each step drops.

In: the graded rollouts of one round. Out: the kept ones, the outcome of every rollout, and a `Funnel`.
Pure functions of records, options and seed: the order of the records doesn't matter.

The steps, in this order: drop abstentions and truncated completions; drop those whose reward is below
the threshold (STaR, arXiv 2203.14465, Algorithm 1, lines 5 and 6), hinted ones that quote their hint,
those that don't fit into a training row, and duplicates; then apply the cap per prompt.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from trl_selfplay.rewards.equations import find_equations
from trl_selfplay.rollouts.funnel import Funnel, Outcome, OutcomeCounts, count_causes
from trl_selfplay.rollouts.record import Rollout

NormalForm = Callable[[str], Hashable]
_WRONG = ("abstained", "truncated", "failed")


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


@dataclass(frozen=True, slots=True)
class Selection:
    """What a round trains on, and why the rest was left out.

    Attributes:
        kept: Rollouts of the round, by (prompt_id, sample_index).
        outcomes: Every rollout of the round with its outcome, in the same order.
        funnel: Their counts.
        history: Rollouts of earlier rounds that are trained on as well.
        gold: Human completions that are trained on as well.
    """

    kept: tuple[Rollout, ...]
    outcomes: tuple[tuple[Rollout, Outcome], ...]
    funnel: Funnel
    history: tuple[Rollout, ...] = ()
    gold: tuple[Rollout, ...] = ()

    @classmethod
    def from_outcomes(
        cls,
        outcomes: Iterable[tuple[Rollout, Outcome]],
        *,
        solved: Collection[str] | None = None,
        leak_reasons: Mapping[str, int] = MappingProxyType({}),
        history: Sequence[Rollout] = (),
        gold: Sequence[Rollout] = (),
    ) -> Self:
        """Count outcomes, and take the rollouts that are "kept".

        Args:
            outcomes: Every rollout of the round, by (prompt_id, sample_index).
            solved: Ids of the prompts to count as solved; None: those with a completion without
                hint that is right, whether it is kept or not.
            leak_reasons: Number of leaked completions by reason.
            history: As the attribute, like `gold`.
            gold: Human completions.
        """
        outcomes = tuple(outcomes)
        counts: dict[bool, Counter[str]] = {
            hinted: Counter(outcome for r, outcome in outcomes if r.hinted == hinted)
            for hinted in (False, True)
        }
        if solved is None:
            solved = {r.prompt_id for r, o in outcomes if not r.hinted and o not in _WRONG}
        funnel = Funnel(
            prompts=len({r.prompt_id for r, _ in outcomes}),
            prompts_solved=len(solved),
            unhinted=OutcomeCounts(**counts[False]),
            hinted=OutcomeCounts(**counts[True]),
            leak_reasons=tuple(sorted(leak_reasons.items())),
            abstain_causes=count_causes(r.cause for r, o in outcomes if o == "abstained"),
            history=len(history),
        )
        kept = tuple(r for r, outcome in outcomes if outcome == "kept")
        return cls(kept, outcomes, funnel, tuple(history), tuple(gold))

    @property
    def rollouts(self) -> list[Rollout]:
        """All rollouts of the round."""
        return [rollout for rollout, _ in self.outcomes]

    @property
    def examples(self) -> list[Rollout]:
        """What is trained on: of this round, of earlier ones, and human completions."""
        return [*self.kept, *self.history, *self.gold]


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
        history: What earlier rounds selected, the newest round first. Those that repeat a newer
            one are left out, whatever `normal_form`; the others join the new ones before the cap
            is applied, and are counted separately.
        beside: Completions that are trained on in any case; a rollout with the normal form of one
            of them for the same prompt is a duplicate.

    Raises:
        ValueError: Two rollouts have the same prompt id and sample index, or one is not graded.
    """
    ordered = sorted(rollouts, key=_key)
    _check_records(ordered)
    outcomes: dict[tuple[str, int], Outcome] = {}
    leak_reasons: Counter[str] = Counter()
    candidates: dict[str, list[Rollout]] = {}
    for rollout in ordered:
        outcome = _grade_outcome(rollout, rules.is_correct)
        if outcome == "kept" and rollout.hinted and rules.leak_reason is not None:
            reason = rules.leak_reason(rollout)
            if reason is not None:
                leak_reasons[reason] += 1
                outcome = "leaked"
        if outcome == "kept" and rules.fits is not None and not rules.fits(rollout):
            outcome = "too_long"
        outcomes[_key(rollout)] = outcome
        if outcome == "kept":
            candidates.setdefault(rollout.prompt_id, []).append(rollout)
    form = rules.normal_form or default_normal_form
    seen = {(r.prompt_id, form(r.completion)) for same in candidates.values() for r in same}
    given: dict[str, set[Hashable]] = {}
    for rollout in beside:
        given.setdefault(rollout.prompt_id, set()).add(form(rollout.completion))
    earlier: list[Rollout] = []
    for rollout in filter(rules.lets_pass, history):
        key = (rollout.prompt_id, form(rollout.completion))
        # Among duplicates, the best is kept.
        if key not in seen or (rules.best_first and rules.normal_form):
            seen.add(key)
            earlier.append(rollout)
            candidates.setdefault(rollout.prompt_id, []).append(rollout)
    newest = ordered[0].round_index if ordered else 0
    dropped: dict[int, Outcome] = {}
    for prompt_id, same_prompt in candidates.items():
        if rules.best_first:  # the sort is stable: of equal ones, the first is kept
            same_prompt.sort(key=lambda r: -(r.reward or 0.0))
        distinct, duplicates = _split_duplicates(
            same_prompt, rules.normal_form, given.get(prompt_id, set())
        )
        capped = _over_cap(distinct, rules, newest)
        dropped |= {id(r): "duplicate" for r in duplicates}
        dropped |= {id(r): "capped" for r in capped}
    outcomes |= {_key(r): dropped[id(r)] for r in ordered if id(r) in dropped}
    return Selection.from_outcomes(
        ((r, outcomes[_key(r)]) for r in ordered),
        leak_reasons=leak_reasons,
        history=[r for r in earlier if id(r) not in dropped],
    )


def _key(rollout: Rollout) -> tuple[str, int]:
    return rollout.prompt_id, rollout.sample_index


def _check_records(ordered: Sequence[Rollout]) -> None:
    for i, rollout in enumerate(ordered):
        if i > 0 and _key(ordered[i - 1]) == _key(rollout):
            raise ValueError(
                f"prompt {rollout.prompt_id} has two rollouts with sample_index "
                f"{rollout.sample_index}; number hinted ones after the others."
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


def _split_duplicates(
    same_prompt: Sequence[Rollout], normal_form: NormalForm | None, given: set[Hashable]
) -> tuple[list[Rollout], list[Rollout]]:
    """Split one prompt's rollouts, in order of their indices, into first ones and repeats.

    Rollouts with one of the `given` forms are repeats.
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
    distinct: Sequence[Rollout], rules: SelectionRules, round_index: int
) -> list[Rollout]:
    """Return the rollouts of one prompt that are over the cap, drawn by a hash of seed and ids."""
    if rules.max_per_prompt is None:
        return []

    def draw(rollout: Rollout) -> bytes:
        text = f"{rules.seed}/{rollout.prompt_id}/{rollout.sample_index}"
        if rollout.round_index != round_index:  # of an earlier round, under an index of its own
            text += f"/{rollout.round_index}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def rank(rollout: Rollout) -> tuple[float, bytes]:
        return -(rollout.reward or 0.0) if rules.best_first else 0.0, draw(rollout)

    return sorted(distinct, key=rank)[rules.max_per_prompt :]


def unsolved_prompts(rollouts: Collection[Rollout], reward_threshold: float) -> set[str]:
    """Return the ids of prompts without any finished, unhinted rollout that reached the threshold.

    These are to be rationalized.

    Source: STaR, arXiv 2203.14465, Algorithm 1, line 6.
    """
    solved = {r.prompt_id for r in rollouts if not r.hinted and r.passes(reward_threshold)}
    return {r.prompt_id for r in rollouts} - solved


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
