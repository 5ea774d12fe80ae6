"""A programming task of a small model's size: Python functions of one line over a list of numbers.

In: a seed. Out: disjoint sets of prompts, each a description and the head of a function, with tests.
Those of the held-out sets differ in kind from those of training, which are few: a program that
passes the few by luck fails there.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from trl_selfplay.demos.split import Split

NUM_TRAIN, NUM_SELECT, NUM_REPORT = 192, 64, 200
_NUM_TESTS, _NUM_HIDDEN_TESTS = 3, 12
_NUM_HELD_OUT_SMOKE = 8
# A function in three steps, in words and in Python.
_CHOICES = (
    ("the numbers in xs", ""),
    ("the even numbers in xs", "x % 2 == 0"),
    ("the odd numbers in xs", "x % 2 == 1"),
    ("the positive numbers in xs", "x > 0"),
    ("the negative numbers in xs", "x < 0"),
    ("the numbers in xs that are greater than {n}", "x > {n}"),
    ("the numbers in xs that are less than {n}", "x < {n}"),
    ("the numbers in xs that are divisible by {n}", "x % {n} == 0"),
)
_CHANGES = (
    ("", "x"),
    (", each multiplied by {k}", "x * {k}"),
    (", each plus {k}", "x + {k}"),
    (", each minus {k}", "x - {k}"),
    (", each squared", "x ** 2"),
    (", each negated", "-x"),
)
_RESULTS = (
    ("a list of", "[{}]"),
    ("the sum of", "sum({})"),
    ("the sorted list of", "sorted({})"),
    ("the reversed list of", "[{}][::-1]"),
    ("the number of different values among", "len(set({}))"),
)


def programs_split(seed: int = 0, smoke: bool = False) -> Split:
    """Return the prompts, such as `# Return the sum of the odd numbers in xs, each squared.` and a head.

    The sets have the columns `prompt`, `tests`, `entry_point`, `solution` (a reference program) and
    `hidden_tests`; the `tests` of `select` and `report` are the hidden ones.

    Args:
        seed: Different seeds give different splits of the same tasks, with different tests.
        smoke: Keep only a handful of prompts in the held-out sets.
    """
    rng = random.Random(seed)
    tasks = list(_all_tasks())
    rng.shuffle(tasks)
    examples: dict[str, _Task] = {}  # one for each kind of result, each with another change
    for task in tasks:
        if all(task.result != e.result and task.change != e.change for e in examples.values()):
            examples[task.result] = task
    few_shot = [_row(task, rng) for task in examples.values()]
    rows = iter([_row(task, rng) for task in tasks if task not in examples.values()])
    train, select, report = (
        list(itertools.islice(rows, count)) for count in (NUM_TRAIN, NUM_SELECT, NUM_REPORT)
    )
    if smoke:
        select, report = select[:_NUM_HELD_OUT_SMOKE], report[:_NUM_HELD_OUT_SMOKE]
    return Split(
        Dataset.from_list(train),
        Dataset.from_list([{**row, "tests": row["hidden_tests"]} for row in select]),
        Dataset.from_list([{**row, "tests": row["hidden_tests"]} for row in report]),
        [
            {
                "prompt": row["prompt"],
                "completion": row["solution"].removeprefix(row["prompt"]).removesuffix("\n"),
                "solution": row["solution"],
            }
            for row in few_shot
        ],
    )


@dataclass(frozen=True, slots=True)
class _Task:
    """A function's kind of result and of change, its description, and what it returns."""

    result: str
    change: str
    words: str
    expression: str


def _all_tasks() -> Iterator[_Task]:
    numbers = range(2, 10)
    for (result, outer), (choice, condition), (change, inner) in itertools.product(
        _RESULTS, _CHOICES, _CHANGES
    ):
        for n, k in itertools.product(
            numbers if "{n}" in choice else (0,), numbers if "{k}" in change else (0,)
        ):
            # With all pairs of numbers, nearly all tasks would have two.
            if n and k and (n + 3 * k) % 8:
                continue
            inside = f"{inner} for x in xs" + (f" if {condition}" if condition else "")
            words, expression = (
                text.format(n=n, k=k)
                for text in (f"{result} {choice}{change}", outer.format(inside))
            )
            yield _Task(result, change, words, expression)


def _row(task: _Task, rng: random.Random) -> dict[str, Any]:
    # Without a line break at the end: the model's tokens join it with the next line's indentation.
    prompt = f"# Return {task.words}.\ndef f(xs):"
    function = eval(f"lambda xs: {task.expression}")  # noqa: S307  # from the list above
    lists = [_numbers(rng) for _ in range(_NUM_TESTS + _NUM_HIDDEN_TESTS - 2)]
    shown, hidden = lists[:_NUM_TESTS], [[], [rng.randint(-9, 9)], *lists[_NUM_TESTS:]]
    return {
        "prompt": prompt,
        "tests": [_test(xs, function(xs)) for xs in shown],
        "hidden_tests": [_test(xs, function(xs)) for xs in hidden],
        "entry_point": "f",
        "solution": f"{prompt}\n    return {task.expression}\n",
    }


def _numbers(rng: random.Random) -> list[int]:
    # Repeated numbers, so that a set isn't a list.
    return [rng.randint(-9, 20) for _ in range(rng.randint(4, 7))] + [rng.randint(0, 3)] * 2


def _test(xs: Sequence[int], expected: Any) -> str:
    return f"assert f({list(xs)}) == {expected}"
