"""Any reasoning-gym scorer as a reward function.

In: completions, and the puzzle's entry as columns of the dataset. Out: the scorer's number, from
0.0 to 1.0, or None if the scorer raised, hung or crashed. Scorers run in a process that can be
killed, because some evaluate the answer: that of `countdown` never returns on 9**9**9**9.
"""

import json
import pickle
from collections.abc import Sequence
from typing import Any

from trl_selfplay.rewards.answer import extract_answer, is_answer, text_of, without_thoughts
from trl_selfplay.rewards.scores import Scores
from trl_selfplay.rewards.worker import WorkerPool

DEADLINE_S = 5.0

_pool = WorkerPool(__name__, "score_answer")


class puzzle_reward:
    """The reward function of a reasoning-gym task.

    Called with `completions`, `solution` and, if the task's scorer needs it, `metadata`: the entry's
    metadata as a dict, or as JSON text, which a dataset can hold whatever its keys are. Scores the
    marked final answer, or the whole completion if there is no marker.

    Args:
        name: Name of the task, such as "word_sequence_reversal".

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: There is no such task.
    """

    def __init__(self, name: str) -> None:
        prepare()
        import reasoning_gym

        try:
            reasoning_gym.get_score_answer_fn(name)
        except (ValueError, KeyError) as error:
            raise ValueError(f"reasoning-gym has no task {name!r}: {error}") from error
        self.name = name
        self.__name__ = f"{name}_reward"

    def __call__(
        self,
        completions: Sequence[Any],
        solution: Sequence[Any],
        metadata: Sequence[Any] | None = None,
        prompts: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Score each completion; None, and a logged count, if the scorer failed."""
        rows = metadata if metadata is not None else [None] * len(completions)
        calls = []
        for completion, gold, row in zip(completions, solution, rows, strict=True):
            if not is_answer(gold):  # scorers would return 0.0
                raise TypeError(
                    f"{self.__name__}: a solution is {gold!r:.100}; give one answer, as text."
                )
            details = json.loads(row) if isinstance(row, str) else dict(row or {})
            details.setdefault("source_dataset", self.name)
            text = text_of(completion)
            marked = extract_answer(text)
            answer = without_thoughts(text).strip() if marked is None else marked
            entry = {"question": "", "answer": gold, "metadata": details}
            calls.append((self.name, answer, entry))
        groups = list(map(pickle.dumps, solution if prompts is None else prompts))
        values, failures = _pool.call_each(calls, DEADLINE_S, groups)
        scores = Scores(values, {index: failure.cause for index, failure in failures.items()})
        scores.log_causes(self.__name__)
        return scores


def score_answer(name: str, answer: str, entry: dict[str, Any]) -> float:
    """Score one answer in this process, without a deadline."""
    import reasoning_gym

    return float(reasoning_gym.get_score_answer_fn(name)(answer=answer, entry=entry))


def prepare() -> None:
    """Import reasoning-gym, or raise an error that says how to install it."""
    try:
        import reasoning_gym  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'Scoring puzzles needs reasoning-gym: pip install "trl-selfplay[demo]".'
        ) from error
