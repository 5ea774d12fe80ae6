"""Grading maths in a process that can be killed."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_answer import AUDIT

from trl_selfplay.rewards import math_reward, maths
from trl_selfplay.rewards.worker import close_workers
from trl_selfplay.rewards.worker import Worker, WorkerFailure

pytest.importorskip("math_verify")


@pytest.fixture(scope="module", autouse=True)
def _end_the_worker():
    yield
    close_workers()


def test_answers_are_compared_by_value() -> None:
    """VF-1, VF-2, VF-9; of worked steps the final answer counts."""
    pairs = [
        ("so \\boxed{0.5}", "$\\frac{1}{2}$", 1.0),
        ("$\\frac{1}{2}$", "0.5", 1.0),
        ("\\boxed{1+x^2}", "\\boxed{x^2+1}", 1.0),
        ("\\boxed{1,000}", "1000", 1.0),
        ("so it is 42", "40 + 2 = <<40+2=42>>42\n#### 42", 1.0),
        ("\\boxed{41}", "42", 0.0),
    ]
    answers, golds, expected = zip(*pairs, strict=True)
    assert math_reward(answers, golds) == list(expected)


def test_an_earlier_number_never_rescues_a_wrong_final_answer() -> None:
    assert math_reward(["first 42, then finally \\boxed{7}"], ["42"]) == [0.0]


def test_an_unparsable_gold_answer_is_no_verdict(caplog) -> None:
    """VF-11, with one warning that counts."""
    assert math_reward(["1", "2", "3"], ["%%%", None, "3"]) == [None, None, 1.0]
    assert "2 of 3" in caplog.text


@pytest.mark.parametrize("name", sorted(set(AUDIT) - {"a tower of exponents"}))
def test_no_trick_gets_a_reward(name) -> None:
    if name in ("gold followed by garbage", "options", "two contradictory answers"):
        pytest.skip("math-verify reads a number out of this text; the strict extractor doesn't")
    assert math_reward([AUDIT[name]], ["71"])[0] in (0.0, None)


def test_a_comparison_that_hangs_costs_its_own_verdict_alone(monkeypatch) -> None:
    """VF-3, VF-4: killed at the deadline; the others keep their scores."""
    math_reward(["1"], ["1"])
    monkeypatch.setattr(maths, "DEADLINE_S", 2.0)
    started = time.monotonic()
    scores = math_reward(["\\boxed{1}", "$9^{9^{9^{9}}}$", "\\boxed{3}"], ["1", "3", "3"])
    assert scores == [1.0, None, 1.0]
    assert time.monotonic() - started < 60  # the deadline, and a new process on a busy machine


def test_grading_works_from_threads_and_in_any_order() -> None:
    """VF-5."""
    golds = [str(i) for i in range(8)]
    answers = [f"\\boxed{{{i if i % 2 else -1}}}" for i in range(8)]
    expected = [float(i % 2) for i in range(8)]
    found = {}

    def grade(index):
        found[index] = math_reward([answers[index]], [golds[index]])

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i][0] for i in range(8)] == expected
    assert math_reward(answers[::-1], golds[::-1]) == expected[::-1]


def test_a_dead_worker_is_replaced() -> None:
    """VF-3."""
    math_reward(["1"], ["1"])
    maths._worker()._process.kill()
    maths._worker()._process.wait()
    assert math_reward(["\\boxed{1}"], ["1"]) == [1.0]


def test_after_grading_no_process_is_left() -> None:
    """VF-7: closed on request, and gone with the interpreter."""
    math_reward(["1"], ["1"])
    close_workers()
    assert not [
        child for child in psutil.Process().children() if "rewards.worker" in child.cmdline()
    ]
    code = (
        "from trl_selfplay.rewards import math_reward, maths; math_reward(['1'], ['1']); "
        "print(maths._worker()._process.pid)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not psutil.pid_exists(int(finished.stdout.split()[-1]))


def refuse(*arguments):
    """A function for a worker: prints, then raises."""
    print("not an answer")  # noqa: T201
    raise ValueError("no")


refuse.prepare = lambda: None


def test_what_a_graded_function_prints_is_no_answer(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    worker = Worker("test_maths", "refuse")
    with pytest.raises(WorkerFailure, match="ValueError: no"):
        worker.call(1, deadline_s=30.0)
    worker.close()
