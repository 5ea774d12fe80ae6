"""How far a reward function, a judge above all, agrees with labels that people gave.

In: a reward function, and rows with the columns prompt, completion and label. Out: accuracy, Cohen's
kappa, precision and recall at the threshold that a run would use, the share of abstentions, and for
judges that compare the bias of position; all with 95 % bounds. From the command line, with rows as
JSON lines and a judge by import path:

    python -m trl_selfplay.evaluation.agreement my_judges.judge labelled.jsonl --threshold 1.0
"""

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_selfplay.evaluation.estimates import binomial_interval
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.prompts import canonical_prompt

# Of fewer items the bounds of any share are wider than 0.28.
LEAST_ITEMS = 50
_DRAWS = 1000
_NEEDED = ("prompt", "completion", "label")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % bounds, and the number of items that it is of; None without items."""

    value: float | None
    low: float
    high: float
    count: int

    @classmethod
    def share(cls, successes: int, count: int) -> "Estimate":
        """Return a share with Wilson's interval."""
        return cls(
            successes / count if count else None, *binomial_interval(successes, count), count
        )

    def __str__(self) -> str:
        if self.value is None:
            return "– (no items)"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}; {self.count})"


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a reward function says of labelled items.

    Attributes:
        threshold: A score of at least this is a pass.
        accuracy: Share of scored items whose pass or fail is the label.
        kappa: Cohen's kappa of the scored items: 0 is chance, 1 is agreement.
        precision: Share of passes whose label is 1: what a run would train on.
        recall: Share of scored items with label 1 that pass.
        abstained: Share of items without a score.
        causes: Abstentions by cause.
        orders_disagree: Of pairs that were asked in both orders, the share with different verdicts.
        prefers_first: Of verdicts other than ties, the share that names the first response.
    """

    threshold: float
    accuracy: Estimate
    kappa: Estimate
    precision: Estimate
    recall: Estimate
    abstained: Estimate
    causes: Mapping[str, int]
    orders_disagree: Estimate
    prefers_first: Estimate

    def __str__(self) -> str:
        lines = [f"threshold: {self.threshold:g}; estimate (95 % bounds; items)"]
        for name in ("accuracy", "kappa", "precision", "recall", "abstained"):
            lines.append(f"{name}: {getattr(self, name)}")
        lines += [f"  {count} × {cause}" for cause, count in sorted(self.causes.items())]
        if self.orders_disagree.count:
            lines.append(f"orders disagree: {self.orders_disagree}")
            lines.append(f"prefers the first response: {self.prefers_first}")
        return "\n".join(lines)


def measure_agreement(
    reward_func: Callable[..., Any], rows: Iterable[Mapping[str, Any]], *, threshold: float = 1.0
) -> Agreement:
    """Grade labelled completions and compare.

    Bounds are Wilson's; those of kappa are of a bootstrap over prompts. Several completions of a
    prompt aren't independent, so with few prompts the true bounds of the shares are wider.

    Args:
        reward_func: A reward function; a judge of the policy has no policy here, so give it a model.
        rows: With `prompt`, `completion`, `label` (1 or true if it is right) and any other columns
            that the function reads. All completions of a prompt are graded in one call.
        threshold: The run's `reward_threshold`.

    Raises:
        ValueError: A column is missing, a label isn't 0 or 1, all labels are the same, or there are
            fewer than 50 rows.
    """
    table = [dict(row) for row in rows]
    labels = _read_labels(table)
    names = sorted({name for row in table for name in row} - set(_NEEDED))
    graded = Scorer(reward_func).score(
        prompts=[row["prompt"] for row in table],
        completions=[row["completion"] for row in table],
        completion_ids=[[] for _ in table],
        columns={name: [row.get(name) for row in table] for name in names},
    )
    scores = [each[0] for each in graded]
    scored = [i for i, score in enumerate(scores) if score is not None]
    passes = {i: (scores[i] or 0.0) >= threshold for i in scored}
    right = {i for i in scored if labels[i]}
    passed = {i for i in scored if passes[i]}
    votes: Sequence[tuple[float, float]] = getattr(reward_func, "votes", ())
    decided = [vote for pair in votes for vote in pair if vote != 0.5]
    return Agreement(
        threshold=threshold,
        accuracy=Estimate.share(sum(passes[i] == labels[i] for i in scored), len(scored)),
        kappa=_kappa(
            [(canonical_prompt(table[i]["prompt"]), passes[i], labels[i]) for i in scored]
        ),
        precision=Estimate.share(len(passed & right), len(passed)),
        recall=Estimate.share(len(passed & right), len(right)),
        abstained=Estimate.share(len(table) - len(scored), len(table)),
        causes=Counter(cause for each in graded for cause in each.causes.values()),
        orders_disagree=Estimate.share(sum(a != 1.0 - b for a, b in votes), len(votes)),
        prefers_first=Estimate.share(int(sum(decided)), len(decided)),
    )


def _read_labels(table: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return the labels.

    Raises:
        ValueError: See `measure_agreement`.
    """
    if len(table) < LEAST_ITEMS:
        raise ValueError(
            f"{len(table)} labelled rows say little: label at least {LEAST_ITEMS} completions."
        )
    labels = []
    for index, row in enumerate(table):
        missing = [name for name in _NEEDED if name not in row]
        if missing:
            raise ValueError(f"row {index} lacks {missing}; it has {sorted(row)}.")
        if isinstance(row["label"], str) or row["label"] not in (0, 1):
            raise ValueError(f"row {index} has the label {row['label']!r:.100}; give 1 or 0.")
        labels.append(bool(row["label"]))
    if len(set(labels)) == 1:
        raise ValueError(f"all labels are {int(labels[0])}: label right and wrong completions.")
    return labels


def _kappa(items: Sequence[tuple[str, bool, bool]]) -> Estimate:
    """Return Cohen's kappa of (prompt, pass, label), with a bootstrap over prompts.

    Source: Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological
    Measurement 20 (1960).
    """
    # Per prompt: how many are passed and right, passed, right, all.
    counts: dict[str, np.ndarray] = {}
    for prompt, passes, label in items:
        one = np.array([passes and label, passes, label, 1])
        counts[prompt] = counts.get(prompt, 0) + one
    if not counts:
        return Estimate(None, -1.0, 1.0, 0)
    table = np.stack(list(counts.values()))
    generator = np.random.default_rng(0)
    drawn = [
        _kappa_of(table[generator.integers(len(table), size=len(table))].sum(axis=0))
        for _ in range(_DRAWS)
    ]
    value = _kappa_of(table.sum(axis=0))
    known = [kappa for kappa in drawn if kappa is not None]
    if value is None or not known:
        return Estimate(None, -1.0, 1.0, len(items))
    low, high = np.quantile(known, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(items))


def _kappa_of(counts: np.ndarray) -> float | None:
    """Return kappa from the numbers of passed and right, passed, right and all; None if undefined."""
    both, passed, right, count = map(float, counts)
    observed = (count - passed - right + 2 * both) / count
    expected = (passed * right + (count - passed) * (count - right)) / count**2
    return None if expected == 1.0 else (observed - expected) / (1.0 - expected)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the agreement of a judge with a file of labelled rows."""
    parser = argparse.ArgumentParser(description=measure_agreement.__doc__)
    parser.add_argument("judge", help="Import path of a reward function, such as my_judges.judge.")
    parser.add_argument("rows", type=Path, help="JSON lines with prompt, completion and label.")
    parser.add_argument("--threshold", type=float, default=1.0, help="The run's reward_threshold.")
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(Path.cwd()))
    module, _, name = given.judge.rpartition(".")
    judge = getattr(importlib.import_module(module), name)
    rows = [json.loads(line) for line in given.rows.read_text().splitlines() if line.strip()]
    print(measure_agreement(judge, rows, threshold=given.threshold))  # noqa: T201  # a command


if __name__ == "__main__":
    main()
