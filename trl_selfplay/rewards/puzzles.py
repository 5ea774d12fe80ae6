"""Any reasoning-gym scorer as a reward function.

In: completions, and the puzzle's entry as columns of the dataset. Out: the scorer's number, from
0.0 to 1.0, or None where the scorer failed.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

from trl_selfplay.rewards.answer import extract_answer, text_of

logger = logging.getLogger(__name__)


class puzzle_reward:
    """Make the reward function of a reasoning-gym task.

    The returned object is called with `completions`, `solution` and, where the task's scorer needs
    it, `metadata`: the entry's metadata as a dict, or as JSON text, which a dataset can hold whatever
    its keys are. The marked final answer is scored, or the whole completion without a marker.

    Args:
        name: The task, such as "word_sequence_reversal".

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: There is no such task.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.__name__ = f"{name}_reward"
        self._score_answer()

    def _score_answer(self) -> Any:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ImportError(
                'Scoring puzzles needs reasoning-gym: pip install "trl-selfplay[demo]".'
            ) from error
        try:
            return reasoning_gym.get_score_answer_fn(self.name)
        except (ValueError, KeyError) as error:
            raise ValueError(f"reasoning-gym has no task {self.name!r}: {error}") from error

    def __call__(
        self,
        completions: Sequence[Any],
        solution: Sequence[Any],
        metadata: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Score each completion; None where the scorer raised, with one counted warning."""
        score_answer = self._score_answer()
        scores: list[float | None] = []
        failures = []
        rows = metadata if metadata is not None else [None] * len(completions)
        for completion, gold, row in zip(completions, solution, rows, strict=True):
            details = json.loads(row) if isinstance(row, str) else dict(row or {})
            details.setdefault("source_dataset", self.name)
            text = text_of(completion)
            marked = extract_answer(text)
            entry = {"question": "", "answer": gold, "metadata": details}
            try:
                scores.append(
                    float(score_answer(text.strip() if marked is None else marked, entry))
                )
            except Exception as error:  # the graders' boundary: a scorer's failure is no verdict
                failures.append(error)
                scores.append(None)
        if failures:
            logger.warning(
                "%s: no score for %d of %d completions; the first failure: %r",
                self.__name__,
                len(failures),
                len(scores),
                failures[0],
            )
        return scores
