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
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from trl_selfplay.prompts import Prompt
from trl_selfplay.rollouts import Rollout

Outcome = Literal[
    "kept",
    "abstained",
    "truncated",
    "failed",
    "leaked",
    "too_long",
    "duplicate",
    "capped",
    "identical",
    "empty",
]
LeakFilter = Callable[[Any, str, Any], str | None]
NormalForm = Callable[[str], Hashable]

_HINTED_PREFIX = "hinted_"
_REASON_PREFIX = "leak_"


@dataclass(frozen=True, slots=True)
class OutcomeCounts:
    """How many rollouts came to each outcome, in the order of the steps; they add up to `sampled`.

    Attributes:
        abstained: No reward function could tell (reward None).
        truncated: Cut by length, whatever the reward.
        failed: Reward below the threshold.
        leaked: Hinted, and quotes the hint instead of reasoning.
        too_long: Doesn't fit in a training row together with its prompt.
        duplicate: Equal in normal form to another one of the same prompt.
        capped: Over the most that are kept of a prompt.
        kept: To be trained on.
        identical: SPIN: the data's own completion, which teaches nothing as its opponent.
        empty: SPIN: nothing but the end.
    """

    abstained: int = 0
    truncated: int = 0
    failed: int = 0
    leaked: int = 0
    too_long: int = 0
    duplicate: int = 0
    capped: int = 0
    kept: int = 0
    identical: int = 0
    empty: int = 0

    @property
    def sampled(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def finished(self) -> int:
        """Graded, and ended by the model itself."""
        return self.sampled - self.abstained - self.truncated

    @property
    def correct(self) -> int:
        """Finished, with a reward at the threshold or above."""
        return self.finished - self.failed


@dataclass(frozen=True, slots=True)
class Funnel:
    """What one round's selection came to.

    The chain that people read is sampled → finished → correct (all without hint) → rationalized →
    kept (both kinds).

    Attributes:
        prompts: Prompts that were sampled.
        prompts_solved: Those with a correct completion without hint.
        unhinted: Outcomes of what was sampled without hint.
        hinted: Outcomes of what was sampled with the answer as hint.
        leak_reasons: (reason, count) of the leaked ones, sorted by reason.
    """

    prompts: int
    prompts_solved: int
    unhinted: OutcomeCounts
    hinted: OutcomeCounts = OutcomeCounts()
    leak_reasons: tuple[tuple[str, int], ...] = ()

    @property
    def sampled(self) -> int:
        """Sampled without hint."""
        return self.unhinted.sampled

    @property
    def finished(self) -> int:
        """Of those, graded and ended by the model itself."""
        return self.unhinted.finished

    @property
    def correct(self) -> int:
        """Of those, with a reward at the threshold or above."""
        return self.unhinted.correct

    @property
    def rationalized(self) -> int:
        """Correct with the hint, and not leaked."""
        return self.hinted.correct - self.hinted.leaked

    @property
    def kept(self) -> int:
        """To be trained on, of both kinds."""
        return self.unhinted.kept + self.hinted.kept

    def to_dict(self) -> dict[str, int]:
        """Return the counts as one flat mapping; those of hinted rollouts begin with `hinted_`."""
        return {
            "prompts": self.prompts,
            "prompts_solved": self.prompts_solved,
            "sampled": self.unhinted.sampled,
            **asdict(self.unhinted),
            "hinted_sampled": self.hinted.sampled,
            **{_HINTED_PREFIX + name: count for name, count in asdict(self.hinted).items()},
            **{_REASON_PREFIX + reason: count for reason, count in self.leak_reasons},
        }

    @classmethod
    def from_dict(cls, counts: Mapping[str, int]) -> Self:
        """Build a funnel from what `to_dict` returned."""
        names = [field.name for field in fields(OutcomeCounts)]
        return cls(
            prompts=counts["prompts"],
            prompts_solved=counts["prompts_solved"],
            unhinted=OutcomeCounts(**{name: counts.get(name, 0) for name in names}),
            hinted=OutcomeCounts(**{n: counts.get(_HINTED_PREFIX + n, 0) for n in names}),
            leak_reasons=tuple(
                (key.removeprefix(_REASON_PREFIX), count)
                for key, count in sorted(counts.items())
                if key.startswith(_REASON_PREFIX)
            ),
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """The kept rollouts and every rollout's outcome, both by (prompt_id, sample_index)."""

    kept: tuple[Rollout, ...]
    outcomes: tuple[tuple[Rollout, Outcome], ...]
    funnel: Funnel


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

    Raises:
        ValueError: Two rollouts have the same prompt id and sample index, or one is not graded.
        TypeError: The leak filter returned something else than a reason or None.
    """
    ordered = sorted(rollouts, key=_key)
    _check_records(ordered)
    outcomes: dict[tuple[str, int], Outcome] = {}
    leak_reasons: Counter[str] = Counter()
    candidates: dict[str, list[Rollout]] = {}
    for rollout in ordered:
        outcome = _grade_outcome(rollout, reward_threshold)
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
    for same_prompt in candidates.values():
        distinct, duplicates = _split_duplicates(same_prompt, normal_form)
        capped = [] if max_per_prompt is None else _over_cap(distinct, max_per_prompt, seed)
        outcomes |= {_key(r): "duplicate" for r in duplicates}
        outcomes |= {_key(r): "capped" for r in capped}
    return Selection(
        kept=tuple(r for r in ordered if outcomes[_key(r)] == "kept"),
        outcomes=tuple((r, outcomes[_key(r)]) for r in ordered),
        funnel=_build_funnel(ordered, outcomes, leak_reasons, reward_threshold),
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


def _grade_outcome(rollout: Rollout, threshold: float) -> Outcome:
    if rollout.reward is None:
        return "abstained"
    if rollout.is_truncated:
        return "truncated"
    return "kept" if rollout.reward >= threshold else "failed"


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


def default_normal_form(completion: str) -> str:
    r"""Return a completion lower-cased and with white space folded.

    >>> default_normal_form(" 3 + 4\n= 7. Answer:  7 ")
    '3 + 4 = 7. answer: 7'
    """
    return " ".join(completion.lower().split())


def _split_duplicates(
    same_prompt: Sequence[Rollout], normal_form: NormalForm | None
) -> tuple[list[Rollout], list[Rollout]]:
    """Split one prompt's rollouts, in order of their indices, into first ones and repeats."""
    if normal_form is None:
        return list(same_prompt), []
    seen: set[Hashable] = set()
    distinct: list[Rollout] = []
    duplicates: list[Rollout] = []
    for rollout in same_prompt:
        form = normal_form(rollout.completion)
        (duplicates if form in seen else distinct).append(rollout)
        seen.add(form)
    return distinct, duplicates


def _over_cap(distinct: Sequence[Rollout], max_per_prompt: int, seed: int) -> list[Rollout]:
    """Return the rollouts of one prompt that are over the cap, drawn by a hash of seed and ids."""

    def lot(rollout: Rollout) -> bytes:
        text = f"{seed}/{rollout.prompt_id}/{rollout.sample_index}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    return sorted(distinct, key=lot)[max_per_prompt:]


def _build_funnel(
    rollouts: Sequence[Rollout],
    outcomes: Mapping[tuple[str, int], Outcome],
    leak_reasons: Mapping[str, int],
    reward_threshold: float,
) -> Funnel:
    counts: dict[bool, Counter[str]] = {
        hinted: Counter(outcomes[_key(r)] for r in rollouts if r.hinted == hinted)
        for hinted in (False, True)
    }
    prompts = {r.prompt_id for r in rollouts}
    return Funnel(
        prompts=len(prompts),
        prompts_solved=len(prompts - unsolved_prompts(rollouts, reward_threshold)),
        unhinted=OutcomeCounts(**counts[False]),
        hinted=OutcomeCounts(**counts[True]),
        leak_reasons=tuple(sorted(leak_reasons.items())),
    )


def unsolved_prompts(rollouts: Collection[Rollout], reward_threshold: float) -> set[str]:
    """Return the ids of prompts without any finished, unhinted rollout that reached the threshold.

    These are the ones to rationalize.

    Source: STaR, arXiv 2203.14465, Algorithm 1, line 6.
    """
    solved = {
        r.prompt_id
        for r in rollouts
        if not r.hinted and _grade_outcome(r, reward_threshold) == "kept"
    }
    return {r.prompt_id for r in rollouts} - solved


def describe_funnel(funnel: Funnel) -> str:
    """Return the funnel as one line: the chain, then what was dropped and why."""
    names = {"too_long": "too long", "duplicate": "duplicates", "capped": "over the cap"}
    hinted, unhinted = asdict(funnel.hinted), asdict(funnel.unhinted)
    dropped = []
    for name in unhinted:
        total = unhinted[name] + hinted[name]
        if name == "kept" or total == 0:
            continue
        text = f"{total:,} {names.get(name, name)}"
        if name == "leaked":
            text += f" ({', '.join(f'{count:,} {r}' for r, count in funnel.leak_reasons)})"
        elif hinted[name]:
            text += f" ({hinted[name]:,} with hint)"
        dropped.append(text)
    with_hint = f" + {funnel.hinted.sampled:,} with hint" if funnel.hinted.sampled else ""
    return (
        f"{funnel.sampled:,} sampled{with_hint} → {funnel.finished:,} finished → "
        f"{funnel.correct:,} correct → {funnel.rationalized:,} rationalized → {funnel.kept:,} kept; "
        f"dropped: {', '.join(dropped) or 'none'}; {funnel.prompts_solved:,} of "
        f"{funnel.prompts:,} prompts solved without hint"
    )
