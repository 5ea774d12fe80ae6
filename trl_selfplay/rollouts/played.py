"""What a round's sampling, grading and selecting came to: the record that the loop trains on.

In: the stages' results. Out: one record, made by a trainer's `play_round`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset

from trl_selfplay.rollouts.funnel import Funnel
from trl_selfplay.rollouts.record import Rollout


@dataclass(frozen=True, slots=True)
class PlayedRound:
    """What a round's sampling, grading and selecting came to.

    Attributes:
        training_rows: The parent's dataset, final.
        num_examples: Selected examples; packed rows hold several.
        funnel: Counts of what each selection step dropped.
        rollouts: All graded rollouts of the round.
        metrics: Numbers for the log, with the prefixes play/ and select/.
        rewards: Mean weighted reward, and the mean of each function by name.
        remedy: Why a round of this method is left empty and what to do; "" where rewards decide.
        details: What else to write down of the round.
        may_be_skipped: An empty round leaves the weights as they are, and the next one begins.
    """

    training_rows: Dataset
    num_examples: int
    funnel: Funnel
    rollouts: tuple[Rollout, ...]
    metrics: dict[str, float]
    rewards: dict[str, float | None]
    remedy: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    may_be_skipped: bool = False

    def as_improve_step(
        self, grow: int, improve: int, threshold: float, *, may_be_skipped: bool
    ) -> "PlayedRound":
        """Return the round as one of several that train on the same samples (ReST)."""
        # JSON has no infinity.
        shown = None if threshold == float("-inf") else threshold
        details = {"grow": grow, "improve": improve, "threshold": shown}
        return replace(self, details=details, may_be_skipped=may_be_skipped)
