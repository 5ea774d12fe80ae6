"""Any reasoning-gym scorer as a reward function.

In: completions, and the puzzle's entry as columns of the dataset. Out: the scorer's number, from
0.0 to 1.0, or None if the scorer raised, hung or crashed. Scorers run in a process that can be
killed, because some evaluate the answer: that of `countdown` never returns on 9**9**9**9.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from trl_selfplay.rewards.answer import is_answer
from trl_selfplay.rewards.checker import checker_reward

# Tasks whose scorers, as of reasoning-gym 0.1.25, give 1.0 to wrong answers.
_NOT_CHECKED = {
    "game_of_life_halting": "any text",
    "puzzle24": "24 of other numbers than the puzzle's",
}


class puzzle_reward(checker_reward):
    """The reward function of a reasoning-gym task.

    Called with `completions`, `solution` and, if the task's scorer needs it, `metadata`: the entry's
    metadata as a dict, or as JSON text, which a dataset can hold whatever its keys are. Scores the
    marked final answer, or the whole completion if there is no marker.

    Args:
        name: Name of the task, such as "word_sequence_reversal".
        deadline: Seconds per completion, as for `checker_reward`.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: There is no such task, or its scorer gives 1.0 to wrong answers.
    """

    def __init__(self, name: str, deadline: float = 5.0) -> None:
        try:
            from reasoning_gym import get_score_answer_fn
        except ImportError as error:
            raise ImportError(
                'Scoring puzzles needs reasoning-gym: pip install "trl-selfplay[demo]".'
            ) from error
        try:
            get_score_answer_fn(name)
        except (ValueError, KeyError) as error:
            raise ValueError(f"reasoning-gym has no task {name!r}: {error}") from error
        if name in _NOT_CHECKED:
            raise ValueError(
                f"reasoning-gym's scorer of {name!r} gives 1.0 to {_NOT_CHECKED[name]}; write your own with "
                "checker_reward."
            )
        self.name = name
        # Sent with reasoning-gym's own function, so that a process imports it as it starts. The same
        # for all tasks, which share the processes.
        super().__init__(functools.partial(score_entry, get_score_answer_fn), deadline)
        self.__name__ = f"{name}_reward"

    def __reduce__(self) -> tuple[Any, ...]:
        return puzzle_reward, (self.name, self.deadline)

    def __call__(
        self, completions: Sequence[Any], solution: Sequence[Any] = (), **columns: Any
    ) -> list[float | None]:
        """Score each completion; None, and a logged count, if the scorer failed."""
        for _, gold in zip(completions, solution, strict=True):
            if not is_answer(gold):  # scorers would return 0.0
                raise TypeError(
                    f"{self.__name__}: a solution is {gold!r:.100}; give one answer, as text."
                )
        columns["task_name"] = [self.name] * len(completions)
        return super().__call__(completions, solution=solution, **columns)

    def _try_start(self) -> None:
        """Start no process: reasoning-gym is there."""


def score_entry(
    get_scorer: Callable[[str], Any],
    answer: str,
    solution: Any,
    metadata: Any = None,
    task_name: str = "",
) -> float:
    """Score one answer in this process, without a deadline."""
    details = json.loads(metadata) if isinstance(metadata, str) else dict(metadata or {})
    details.setdefault("source_dataset", task_name)
    entry = {"question": "", "answer": solution, "metadata": details}
    return float(_scorer(get_scorer, task_name)(answer=answer, entry=entry))


@functools.cache
def _scorer(get_scorer: Callable[[str], Any], task: str) -> Callable[..., float]:
    return get_scorer(task)
