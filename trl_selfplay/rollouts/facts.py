"""What stays in memory of a round's rollouts while they are selected: neither tokens nor texts.

In: rollouts, read once, and what a method says of each. Out: one array per fact.
"""

import math
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from trl_selfplay.rollouts.funnel import Outcome
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.sequence import Rollouts


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """Rollouts by (prompt_id, sample_index), and one value of each per attribute.

    Attributes:
        rollouts: The rollouts in this order.
        prompt_ids: The ids of their prompts, each once, sorted.
        prompts: Place of its prompt in `prompt_ids`.
        sample_indices: As in the record, like `round_indices`, `hinted`, `truncated` and `graded`.
        lengths: Number of tokens that the policy wrote of it.
        calls: Number of its calls whose results the policy read.
        failed_calls: How many of these failed.
        rerendered_turns: How many of its turns with calls the chat template would render otherwise.
        rewards: Its reward, NaN for none.
        scores: The same of each reward function's score.
        causes: Why it has no reward, or None.
        has_tools: Whether any is a trajectory.
    """

    rollouts: Rollouts
    prompt_ids: list[str]
    prompts: np.ndarray
    sample_indices: np.ndarray
    round_indices: np.ndarray
    hinted: np.ndarray
    truncated: np.ndarray
    graded: np.ndarray
    lengths: np.ndarray
    calls: np.ndarray
    failed_calls: np.ndarray
    rerendered_turns: np.ndarray
    rewards: np.ndarray
    scores: list[np.ndarray]
    causes: list[str | None]
    has_tools: bool


def examine(
    rollouts: Sequence[Rollout], judge: Callable[[Rollout], tuple[Outcome, Hashable]]
) -> tuple[Facts, list[Outcome], list[Hashable]]:
    """Read rollouts once; return the facts of each, and the two values that `judge` gives of it."""
    source = Rollouts.of(rollouts)
    numbers: dict[str, int] = {}
    ints = {
        name: array("i")
        for name in (
            "places", "prompts", "sample_indices", "round_indices", "lengths", "calls", "failed_calls",
            "rerendered_turns",
        )
    }  # fmt: skip
    flags = {name: array("b") for name in ("hinted", "truncated", "graded")}
    rewards = array("d")
    scores: list[array[float]] = []
    causes: list[str | None] = []
    outcomes: list[Outcome] = []
    forms: list[Hashable] = []
    known: dict[str, str] = {}
    has_tools = False
    for place, r in source.scan():
        outcome, form = judge(r)
        outcomes.append(outcome)
        forms.append(form)
        ints["places"].append(place)
        ints["prompts"].append(numbers.setdefault(r.prompt_id, len(numbers)))
        ints["sample_indices"].append(r.sample_index)
        ints["round_indices"].append(r.round_index)
        ints["lengths"].append(len(r.own_ids))
        ints["calls"].append(r.num_calls)
        ints["failed_calls"].append(r.num_failed_calls)
        ints["rerendered_turns"].append(r.num_rerendered_turns)
        has_tools = has_tools or len(r.messages) > 0
        flags["hinted"].append(r.hinted)
        flags["truncated"].append(r.is_truncated)
        flags["graded"].append(r.is_graded)
        while len(scores) < len(r.rewards):
            scores.append(array("d", [math.nan] * len(rewards)))
        given = (*r.rewards, *[None] * (len(scores) - len(r.rewards)))
        for column, score in zip((rewards, *scores), (r.reward, *given), strict=True):
            column.append(math.nan if score is None else score)
        cause = r.cause
        causes.append(None if cause is None else known.setdefault(cause, cause))
    prompt_ids = sorted(numbers)
    ranks = np.empty(len(prompt_ids), np.int32)
    ranks[[numbers[prompt_id] for prompt_id in prompt_ids]] = np.arange(len(prompt_ids))
    columns = {name: np.array(values) for name, values in ints.items()}
    columns["prompts"] = ranks[columns["prompts"]]
    order = np.lexsort((columns["sample_indices"], columns["prompts"]))
    facts = Facts(
        rollouts=source.pick(columns.pop("places")[order]),
        prompt_ids=prompt_ids,
        **{name: values[order] for name, values in columns.items()},
        **{name: np.array(values, dtype=bool)[order] for name, values in flags.items()},
        rewards=np.array(rewards)[order],
        scores=[np.array(values)[order] for values in scores],
        causes=[causes[i] for i in order],
        has_tools=has_tools,
    )
    return facts, [outcomes[i] for i in order], [forms[i] for i in order]


def call_metrics(
    calls: Sequence[int], failed: Sequence[int], rerendered: Sequence[int]
) -> dict[str, float]:
    """Return what is logged of calls.

    That is the calls per completion; the share of them that failed, 0 without any; and per completion the
    turns that the chat template would render otherwise than they were sampled.
    """
    return {
        "tools/call_frequency": float(np.mean(calls)),
        "tools/failure_frequency": float(np.sum(failed) / max(np.sum(calls), 1)),
        "tools/rerendered_frequency": float(np.mean(rerendered)),
    }


def digest_form(form: Hashable) -> Hashable:
    """Return a short stand-in for a normal form, equal for equal forms alone.

    Texts, and tuples of texts, are replaced by a digest of 128 bits; other forms are small.
    """
    parts = form if type(form) is tuple else (form,)
    if all(type(part) is str for part in parts):
        return blake2b(repr(form).encode(), digest_size=16).digest()
    return form
