"""Counts of the outcomes of a round's rollouts: the funnel from sampled to kept.

In: counts by outcome. Out: records that add up, a flat mapping for rounds.jsonl, one line of text.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, Self

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
    "unpaired",
    "malformed",
    "tool_limit",
]

# Why a completion came to no end, whatever its reward.
UNFINISHED: tuple[Outcome, ...] = ("truncated", "malformed", "tool_limit")
# Records leave these out if they are 0, so that older records, which lack them, look the same.
_RARE = ("unpaired", "malformed", "tool_limit")
_HINTED_PREFIX = "hinted_"
_REASON_PREFIX = "leak_"
_CAUSE_PREFIX = "abstained: "
# Of a function that names more causes than these, the rarest are counted together.
_MOST_CAUSES = 10
OTHER_CAUSES = "other causes"


@dataclass(frozen=True, slots=True)
class OutcomeCounts:
    """Number of rollouts per outcome, in the order of the steps; they add up to `sampled`.

    Attributes:
        abstained: Every reward function abstained (reward None).
        truncated: Truncated, whatever the reward.
        failed: Reward below the threshold.
        leaked: Hinted, and quotes the hint instead of reasoning.
        too_long: Doesn't fit into a training row with its prompt.
        duplicate: Has the normal form of another rollout of the same prompt.
        capped: Exceeds the maximum kept per prompt.
        kept: Trained on.
        identical: Equal to the completion that it would be paired with.
        empty: Has no text.
        unpaired: Right, but its prompt has no wrong rollout to pair it with.
        malformed: A trajectory that ended with a call that can't be read, whatever the reward.
        tool_limit: A trajectory that wanted more calls than allowed, whatever the reward.
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
    unpaired: int = 0
    malformed: int = 0
    tool_limit: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the counts by outcome, without rare ones that are 0."""
        return {name: n for name, n in asdict(self).items() if n or name not in _RARE}

    @property
    def sampled(self) -> int:
        """The number of all rollouts."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def finished(self) -> int:
        """The number that are graded and came to an end."""
        return self.sampled - self.abstained - self.unfinished

    @property
    def unfinished(self) -> int:
        """The number that came to no end: truncated, malformed, or at the limit of calls."""
        return sum(getattr(self, outcome) for outcome in UNFINISHED)

    @property
    def correct(self) -> int:
        """The number of finished rollouts with a reward of at least the threshold."""
        return self.finished - self.failed


@dataclass(frozen=True, slots=True)
class Funnel:
    """The counts of one round's selection.

    It is shown as sampled → finished → correct (all without hint) → rationalized → kept (both kinds).

    Attributes:
        prompts: Number of sampled prompts.
        prompts_solved: Number of prompts with a correct completion without hint.
        unhinted: Outcomes of completions sampled without a hint.
        hinted: Outcomes of completions sampled with the answer as a hint.
        leak_reasons: (reason, count) of leaked completions, sorted by reason.
        abstain_causes: (cause, count) of the completions that reward functions abstained on and
            said why, sorted by cause.
        history: Number of completions of earlier rounds that are trained on as well.
        gold: Number of human completions that are trained on as well.
    """

    prompts: int
    prompts_solved: int
    unhinted: OutcomeCounts
    hinted: OutcomeCounts = OutcomeCounts()
    leak_reasons: tuple[tuple[str, int], ...] = ()
    abstain_causes: tuple[tuple[str, int], ...] = ()
    history: int = 0
    gold: int = 0

    @property
    def sampled(self) -> int:
        """The number sampled without a hint."""
        return self.unhinted.sampled

    @property
    def finished(self) -> int:
        """The number sampled without a hint that are graded and came to an end."""
        return self.unhinted.finished

    @property
    def correct(self) -> int:
        """The number of finished ones with a reward of at least the threshold."""
        return self.unhinted.correct

    @property
    def rationalized(self) -> int:
        """The number that are correct with the hint and don't leak it."""
        return self.hinted.correct - self.hinted.leaked

    @property
    def kept(self) -> int:
        """The number that are trained on, with and without hint."""
        return self.unhinted.kept + self.hinted.kept

    def to_dict(self) -> dict[str, int]:
        """Return the counts as one flat mapping; those of hinted rollouts begin with `hinted_`."""
        return {
            "prompts": self.prompts,
            "prompts_solved": self.prompts_solved,
            "sampled": self.unhinted.sampled,
            **self.unhinted.to_dict(),
            "hinted_sampled": self.hinted.sampled,
            **{_HINTED_PREFIX + name: count for name, count in self.hinted.to_dict().items()},
            **{_REASON_PREFIX + reason: count for reason, count in self.leak_reasons},
            **{_CAUSE_PREFIX + cause: count for cause, count in self.abstain_causes},
            "history": self.history,
            "gold": self.gold,
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
            leak_reasons=_with_prefix(_REASON_PREFIX, counts),
            abstain_causes=_with_prefix(_CAUSE_PREFIX, counts),
            history=counts.get("history", 0),
            gold=counts.get("gold", 0),
        )


def _with_prefix(prefix: str, counts: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(
        (key.removeprefix(prefix), count)
        for key, count in sorted(counts.items())
        if key.startswith(prefix)
    )


def count_causes(causes: Iterable[str | None]) -> tuple[tuple[str, int], ...]:
    """Return (cause, count), sorted by cause, without None; the rarest of many count together."""
    counts = Counter(cause for cause in causes if cause is not None)
    common = dict(counts.most_common(_MOST_CAUSES))
    if rest := counts.total() - sum(common.values()):
        common[OTHER_CAUSES] = common.get(OTHER_CAUSES, 0) + rest
    return tuple(sorted(common.items()))


def describe_causes(causes: Iterable[tuple[str, int]]) -> str:
    """Return causes or reasons with their counts, the most frequent first, as text.

    >>> describe_causes([("no gold", 2), ("tie", 1_500)])
    '1,500 tie, 2 no gold'
    """
    return ", ".join(f"{n:,} {cause}" for cause, n in sorted(causes, key=lambda c: (-c[1], c[0])))


def describe_funnel(funnel: Funnel, graded: bool = True) -> str:
    """Return the funnel as one line: the chain, then what was dropped and why.

    It has only what applies to the method: completions that are paired rather than `graded` can't
    be correct, and without hints none is rationalized.
    """
    names = {
        "too_long": "too long", "duplicate": "duplicates", "capped": "over the cap",
        "tool_limit": "at the limit of calls",
    }  # fmt: skip
    hinted, unhinted = asdict(funnel.hinted), asdict(funnel.unhinted)
    dropped = []
    for name in unhinted:
        total = unhinted[name] + hinted[name]
        if name == "kept" or total == 0:
            continue
        text = f"{total:,} {names.get(name, name)}"
        parts = {"leaked": funnel.leak_reasons, "abstained": funnel.abstain_causes}.get(name)
        if parts:
            text += f" ({describe_causes(parts)})"
        elif hinted[name]:
            text += f" ({hinted[name]:,} with hint)"
        dropped.append(text)
    with_hint = rationalized = without_hint = ""
    if funnel.hinted.sampled:
        with_hint = f" + {funnel.hinted.sampled:,} with hint"
        rationalized = f" → {funnel.rationalized:,} rationalized"
        without_hint = " without hint"
    added = "".join(
        f" + {count:,} {what}"
        for count, what in ((funnel.history, "of earlier rounds"), (funnel.gold, "gold"))
        if count
    )
    correct = f" → {funnel.correct:,} correct" if graded else ""
    solved = f"solved{without_hint}" if graded else "with a pair"
    return (
        f"{funnel.sampled:,} sampled{with_hint} → {funnel.finished:,} finished"
        f"{correct}{rationalized} → {funnel.kept:,} kept{added}; "
        f"dropped: {', '.join(dropped) or 'none'}; {funnel.prompts_solved:,} of "
        f"{funnel.prompts:,} prompts {solved}"
    )
