"""Completions that attack the grader of mathematics, at a deadline of one second."""

import threading
from pathlib import Path

import pytest
from holdings import held
from hostile_maths import HOSTILE
from patience import ENDS_S, under_growing_deadlines

from trl_selfplay.rewards import math_reward, maths
from trl_selfplay.rewards.worker import close_workers

pytest.importorskip("latex2sympy2_extended")
DEADLINE_S = 1.0


def grade_each(names, found) -> None:
    """Grade one completion at a time."""
    for name in names:
        (found[name],) = math_reward([HOSTILE[name]], ["3"])


@pytest.mark.slow
def test_no_completion_gets_a_reward_or_outlives_the_deadline(monkeypatch) -> None:
    """VF-3, VF-4 and VF-7: from the main thread and from another, at the same time."""
    assert len(HOSTILE) >= 40
    close_workers()
    before = held()
    here: dict[str, float | None] = {}
    there: dict[str, float | None] = {}
    monkeypatch.setattr(maths, "DEADLINE_S", DEADLINE_S)
    other = threading.Thread(target=grade_each, args=(list(HOSTILE)[::-1], there))
    other.start()
    grade_each(list(HOSTILE), here)
    other.join()
    for found in (here, there):
        assert found.keys() == HOSTILE.keys()
        assert {n: score for n, score in found.items() if score not in (0.0, None)} == {}
    monkeypatch.setattr(maths, "DEADLINE_S", ENDS_S)
    assert math_reward(["3", "4"], ["3", "3"]) == [1.0, 0.0]
    close_workers()
    assert held() <= before
    assert not Path("/tmp/escaped").exists()


@pytest.mark.slow
def test_the_scores_of_hostile_completions_depend_on_nothing_else(monkeypatch) -> None:
    """VF-5: all in one call, among right answers, which keep their scores."""
    completions = [text for hostile in HOSTILE.values() for text in ("\\boxed{3}", hostile)]
    prompts = [str(index // 16) for index in range(len(completions))]

    def grade(deadline_s):
        monkeypatch.setattr(maths, "DEADLINE_S", deadline_s)
        return math_reward(completions, ["3"] * len(completions), prompts=prompts)

    scores = under_growing_deadlines(grade, lambda scores: None not in scores[::2], DEADLINE_S)
    assert scores[::2] == [1.0] * len(HOSTILE)
    assert set(scores[1::2]) <= {0.0, None}
    close_workers()
