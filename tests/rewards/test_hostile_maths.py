"""Completions that attack the grader of mathematics, at a deadline of one second."""

import threading
import time
from pathlib import Path

import psutil
import pytest
from hostile_maths import HOSTILE

from trl_selfplay.rewards import math_reward, maths
from trl_selfplay.rewards.worker import close_workers

pytest.importorskip("latex2sympy2_extended")
DEADLINE_S = 1.0


def grade_each(names, found) -> None:
    """Grade one completion at a time, each with a process that is ready."""
    for name in names:
        assert math_reward(["3"], ["3"]) == [1.0]
        started = time.monotonic()
        (score,) = math_reward([HOSTILE[name]], ["3"])
        found[name] = (score, time.monotonic() - started)


@pytest.mark.slow
def test_no_completion_gets_a_reward_or_outlives_the_deadline(monkeypatch) -> None:
    """VF-3, VF-4 and VF-7: from the main thread and from another, at the same time."""
    assert len(HOSTILE) >= 40
    monkeypatch.setattr(maths, "DEADLINE_S", DEADLINE_S)
    close_workers()
    before = psutil.Process().children(recursive=True)
    here: dict[str, tuple[float | None, float]] = {}
    there: dict[str, tuple[float | None, float]] = {}
    other = threading.Thread(target=grade_each, args=(list(HOSTILE)[::-1], there))
    other.start()
    grade_each(list(HOSTILE), here)
    other.join()
    for found in (here, there):
        assert found.keys() == HOSTILE.keys()
        assert {n: score for n, (score, _) in found.items() if score not in (0.0, None)} == {}
        assert {n: took for n, (_, took) in found.items() if took > DEADLINE_S + 1} == {}
    assert math_reward(["3", "4"], ["3", "3"]) == [1.0, 0.0]
    close_workers()
    assert psutil.Process().children(recursive=True) == before
    assert not Path("/tmp/escaped").exists()


@pytest.mark.slow
def test_the_scores_of_hostile_completions_depend_on_nothing_else(monkeypatch) -> None:
    """VF-5: all in one call, among right answers, which keep their scores."""
    monkeypatch.setattr(maths, "DEADLINE_S", DEADLINE_S)
    completions = [text for hostile in HOSTILE.values() for text in ("\\boxed{3}", hostile)]
    prompts = [str(index // 16) for index in range(len(completions))]
    scores = math_reward(completions, ["3"] * len(completions), prompts=prompts)
    assert scores[::2] == [1.0] * len(HOSTILE)
    assert set(scores[1::2]) <= {0.0, None}
    close_workers()
