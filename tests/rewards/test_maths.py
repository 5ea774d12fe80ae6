"""Grading maths by value."""

import threading
import time

import psutil
import pytest

from trl_selfplay.rewards import math_reward, maths
from trl_selfplay.rewards.worker import WorkerFailure, close_workers

pytest.importorskip("math_verify")


@pytest.fixture(scope="module", autouse=True)
def _end_the_workers():
    yield
    close_workers()


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("$\\frac{1}{2}$", "0.5", 1.0),
        ("0.5", "$\\frac{1}{2}$", 1.0),
        ("\\boxed{x^2+1}", "1+x^2", 1.0),
        ("1000", "1,000", 1.0),
        ("1000", "1000.0", 1.0),
        ("1000", "1,0000", 0.0),
        ("5", "5\\%", 0.0),
        ("5%", "5", 0.0),
        ("5%", "0.05", 1.0),
        ("5%", "5 \\%", 1.0),
        ("5%", "0.05%", 0.0),
        ("3.5", "3 1/2", 1.0),
        ("2", "3 1/2", 0.0),
        ("72", "70 2", 0.0),
        ("2x+1", "2", 0.0),
        ("1<x<2", "1", 0.0),
        ("3", "x = 3", 1.0),
        ("72", "**$72$**.", 1.0),
        ("72", "$72$ or $73$", 0.0),
        ("72", "It is 72", 0.0),
        ("Some steps.\n#### 72", "72", 1.0),
        ("$\\begin{pmatrix}1\\\\2\\end{pmatrix}$", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", 1.0),
        ("$\\begin{pmatrix}1\\\\2\\end{pmatrix}$", "\\begin{pmatrix} 1 \\\\ 3 \\end{pmatrix}", 0.0),
        ("42", "41", 0.0),
    ],
)
def test_answers_are_compared_by_value(gold, answer, score) -> None:
    """VF-9."""
    boxed, said, bare = f"So \\boxed{{{answer}}}", f"Hence the answer is {answer}", answer
    assert math_reward([boxed, said, bare], [gold] * 3) == [score] * 3


@pytest.mark.parametrize(
    ("gold", "wrong", "right"),
    [
        ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}", "2^{-99}"),
        ("1.6\\times 10^{-19}", "-1.6\\times 10^{-19}", "16\\times 10^{-20}"),
        ("1.6\\times 10^{-19}", "1.6\\times 10^{-34}", "\\frac{1.6}{10^{19}}"),
        ("10^{-20}", "10^{-21}", "\\frac{1}{10^{20}}"),
        ("10^{-400}", "10^{-401}", "0.1^{400}"),
        ("0.00000012", "0.00000049", "1.2\\times 10^{-7}"),
        ("10^{-20}", "0", "10^{-20}"),
        ("0", "10^{-20}", "\\sqrt{2}+\\sqrt{3}-\\sqrt{5+2\\sqrt{6}}"),
        ("e^{-50}", "e^{-51}", "\\frac{1}{e^{50}}"),
        ("x=10^{-20}", "10^{-21}", "10^{-20}"),
        ("x=10^{-20}", "x=10^{-21}", "x=\\frac{1}{10^{20}}"),
        ("(10^{-20},1)", "(10^{-21},1)", "(\\frac{1}{10^{20}},1)"),
        ("\\{10^{-20},1\\}", "\\{10^{-21},1\\}", "\\{1,10^{-20}\\}"),
        ("[10^{-20},1]", "[10^{-21},1]", "[\\frac{1}{10^{20}},1]"),
        ("\\frac{1}{3}", "0.333", "0.333333"),
        ("\\frac{1}{7}", "0.143", "0.142857"),
        ("x<1", "x<2", "1>x"),
    ],
)
def test_numbers_are_compared_by_their_relative_difference(gold, wrong, right) -> None:
    assert math_reward([f"\\boxed{{{a}}}" for a in (wrong, right)], [gold] * 2) == [0.0, 1.0]


def test_an_earlier_number_never_rescues_a_wrong_final_answer() -> None:
    """VF-10."""
    completions = ["first \\boxed{42}, then \\boxed{7}", "42, no: \\boxed{7}", "\\boxed{7} 42"]
    assert math_reward(completions, ["42"] * 3) == [0.0] * 3


def test_an_unparsable_gold_answer_is_no_verdict(caplog) -> None:
    """VF-11, with one warning that counts; words are no product of letters."""
    golds = ["%%%", None, "", "Paris", "3"]
    assert math_reward(["%%%", "2", "", "pairs", "3"], golds) == [None, None, None, None, 1.0]
    assert [r.getMessage() for r in caplog.records if "4 of 5" in r.getMessage()] != []
    assert len(caplog.records) == 1


def test_a_comparison_that_hangs_costs_its_own_verdict_alone(monkeypatch, caplog) -> None:
    """VF-3, VF-4: killed at the deadline; the others keep their scores; one warning counts."""
    monkeypatch.setattr(maths, "DEADLINE_S", 2.0)
    tower = "$9^{9^{9^{9}}}$"
    scores = math_reward(["\\boxed{1}", tower, "\\boxed{3}", tower], ["1", "3", "3", "3"])
    assert scores == [1.0, None, 1.0, None]
    assert "2 of 4 completions: no answer within the deadline" in caplog.text


def test_a_prompt_whose_answers_hang_is_given_up(monkeypatch, caplog) -> None:
    """Each costs the deadline and a process: after four the others of that prompt have no verdict."""
    monkeypatch.setattr(maths, "DEADLINE_S", 1.0)
    towers = [f"\\boxed{{9^{{9^{{9^{{{n}}}}}}}}}" for n in range(1, 9)]
    scores = math_reward([*towers, "3", "3"], ["3"] * 10, prompts=["p"] * 9 + ["q"])
    assert scores == [None] * 8 + [1.0, 1.0]
    assert "4 of 10 completions: no answer within the deadline" in caplog.text
    assert "4 of 10 completions: not tried after 4 of the same prompt" in caplog.text
    assert scores.count_causes().total() == 8


def test_a_hang_in_one_thread_does_not_hold_up_another(monkeypatch) -> None:
    """VF-4, from any thread; VF-5 for the number of processes."""
    found = {}

    def grade(key, completion, gold):
        found[key] = math_reward([completion], [gold])

    monkeypatch.setattr(maths, "DEADLINE_S", 120.0)
    close_workers()
    hanging = threading.Thread(target=grade, args=("hangs", "$9^{9^{9^{9}}}$", "3"))
    hanging.start()
    while not (children := psutil.Process().children()):
        time.sleep(0.01)
    others = [
        threading.Thread(target=grade, args=(i, f"\\boxed{{{i % 2}}}", "1")) for i in range(3)
    ]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert hanging.is_alive()
    assert [found[i] for i in range(3)] == [[0.0], [1.0], [0.0]]
    close_workers()  # leaves the call at work alone
    assert hanging.is_alive()
    children[0].kill()  # rather than wait for the deadline
    hanging.join()
    assert found["hangs"] == [None]


def test_the_deadline_holds_for_every_call() -> None:
    """VF-4: within deadline + 1 s of the call, once the process is there."""
    math_reward(["1"], ["1"])
    started = time.monotonic()
    with pytest.raises(WorkerFailure, match="deadline"):
        maths._pool.call("3", "9^{9^{9^{9}}}", deadline_s=1.0)
    assert time.monotonic() - started < 2.0
