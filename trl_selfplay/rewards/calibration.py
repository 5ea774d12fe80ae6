"""Scores as percentiles of those that the first round's samples got.

In: the scores of round 0. Out: `Calibration`, which turns any later score of a function that asks for
it into a number between 0 and 1 that means the same in every round and for every reward model.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Calibration:
    """Percentiles of the functions that have a true attribute `calibrate`.

    Args:
        functions: All functions by name, in the order of their scores.

    Attributes:
        names: Of those that are calibrated.
    """

    def __init__(self, functions: Mapping[str, Any]) -> None:
        self._places = {
            name: place
            for place, (name, function) in enumerate(functions.items())
            if getattr(function, "calibrate", False)
        }
        self.names = tuple(self._places)
        self._scores: dict[str, list[float]] = {}

    def scores_of(self, rewards: Iterable[Sequence[float | None]]) -> dict[str, list[float | None]]:
        """Return, by name, the scores among those of round 0's samples, to be kept."""
        rows = list(rewards)
        return {name: [row[place] for row in rows] for name, place in self._places.items()}

    def compare_with(self, scores: Mapping[str, Sequence[float | None]]) -> None:
        """Turn scores into percentiles of these from now on.

        Raises:
            ValueError: A function abstained on all of round 0's samples.
        """
        for name in self.names:
            self._scores[name] = sorted(s for s in scores[name] if s is not None)
            if not self._scores[name]:
                raise ValueError(
                    f"{name} can't be calibrated by round 0, since it abstained on all samples."
                )

    def apply(self, name: str, score: float) -> float:
        """Return the share of round 0's scores below this one; equal ones count half.

        A score stays as it is if its function isn't calibrated, or not yet.
        """
        scores = self._scores.get(name)
        if scores is None:
            return score
        return (bisect_left(scores, score) + bisect_right(scores, score)) / (2 * len(scores))
