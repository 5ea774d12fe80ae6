"""Questions that need tools: how bright is a colour, the sum of its red, green and blue?

In: a seed. Out: disjoint sets of questions about the colours of survey.py, which is searched to answer them: which
numbers belong to a name such as "tomato red" nobody knows by heart.

    Question: How bright is tomato red?
    Action: search[tomato red]
    Observation: tomato red: red 236, green 45, blue 1
    Action: calculator[236 + 45 + 1]
    Observation: 282
    Answer: 282

The form is that of ReAct, arXiv 2210.03629, without thoughts, which would double what has to be sampled.
"""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from trl_selfplay.demos.split import Split
from trl_selfplay.demos.survey import colours, search

NUM_FEW_SHOT, NUM_SELECT, NUM_REPORT = 3, 64, 200
_NUM_HELD_OUT_SMOKE = 8
_HELD_OUT_SEED = 21  # the held-out questions and the examples are the same in all runs


def colours_split(seed: int = 0, smoke: bool = False) -> Split:
    """Return the questions, one per colour: no colour of a held-out set is trained on or shown.

    Args:
        seed: Gives the questions of `train` another order. The other sets are the same for all seeds.
        smoke: Keep only a handful of held-out questions.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = sorted(colours())
    random.Random(_HELD_OUT_SEED).shuffle(names)
    few_shot, select, report, train = (
        names[start:end] for start, end in _bounds(NUM_FEW_SHOT, NUM_SELECT, NUM_REPORT, len(names))
    )
    random.Random(seed).shuffle(train)
    if smoke:
        select, report = select[:_NUM_HELD_OUT_SMOKE], report[:_NUM_HELD_OUT_SMOKE]
    return Split(
        train=Dataset.from_list(list(map(_row, train))),
        select=Dataset.from_list(list(map(_row, select))),
        report=Dataset.from_list(list(map(_row, report))),
        few_shot=[{**_row(name), "completion": worked_answer(name)} for name in few_shot],
    )


def _bounds(*sizes: int) -> Sequence[tuple[int, int]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return list(zip([0, *ends], ends, strict=False))


def _row(name: str) -> dict[str, Any]:
    return {"prompt": f"Question: How bright is {name}?\n", "solution": str(sum(colours()[name]))}


def worked_answer(name: str) -> str:
    """Return the actions that answer the question about a colour, with what they come to."""
    expression, total = " + ".join(map(str, colours()[name])), sum(colours()[name])
    return (
        f"Action: search[{name}]\nObservation: {search(name)}\n"
        f"Action: calculator[{expression}]\nObservation: {total}\nAnswer: {total}"
    )
