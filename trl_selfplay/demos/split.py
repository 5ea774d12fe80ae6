"""The sets of a demo.

In: nothing. Out: the record that each demo's task fills.
"""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset


@dataclass(frozen=True, slots=True)
class Split:
    """Disjoint sets: for training, for selecting the best round, for the final score, as examples.

    Attributes:
        train, select, report: With the columns `prompt` and `solution`, and more if the task has more.
        few_shot: Worked examples, with `prompt`, `completion` and `solution`.
    """

    train: Dataset
    select: Dataset
    report: Dataset
    few_shot: list[dict[str, Any]]
