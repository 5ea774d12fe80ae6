"""Grading maths by value."""

import threading
import time
from decimal import Decimal
from fractions import Fraction

import psutil
import pytest
from maths_cases import CASES, UNREADABLE
from patience import under_growing_deadlines

from trl_selfplay.rewards import math_reward, maths
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rewards.worker import WorkerFailure, close_workers

pytest.importorskip("math_verify")


@pytest.fixture(scope="module", autouse=True)
def _end_the_workers():
    yield
    close_workers()


def test_answers_are_compared_by_value() -> None:
    """VF-9, and everything that the docstring promises."""
    golds, answers, expected = zip(*CASES, strict=True)
    assert len(CASES) >= 400
    assert sum(score == 0 for score in expected) >= 0.4 * len(CASES)
    scores = math_reward([f"So \\boxed{{{answer}}}" for answer in answers], golds)
    rows = zip(golds, answers, expected, scores, strict=True)
    assert [row for row in rows if row[2] != row[3]] == []


def test_every_gold_answer_is_equal_to_itself_and_to_no_other() -> None:
    """VF-2."""
    golds = list(dict.fromkeys(gold for gold, _, _ in CASES))
    assert math_reward([f"\\boxed{{{gold}}}" for gold in golds], golds) == [1.0] * len(golds)
    others = [*golds[13:], *golds[:13]]
    known = {(gold, answer) for gold, answer, score in CASES if score == 1}
    pairs = [(g, o) for g, o in zip(golds, others, strict=True) if (g, o) not in known]
    scores = math_reward([f"\\boxed{{{o}}}" for _, o in pairs], [g for g, _ in pairs])
    assert [pair for pair, score in zip(pairs, scores, strict=True) if score != 0] == []


@pytest.mark.parametrize(
    "completion",
    [
        "The answer is $70,000.",
        "**$70,000**",
        "\\boxed{\\$70,000}",
        "#### 70,000",
        "So the answer is 70000",
    ],
)
def test_money_is_a_number(completion) -> None:
    assert math_reward([completion] * 2, ["70000", "7000"]) == [1.0, 0.0]


@pytest.mark.parametrize("gold", UNREADABLE)
def test_an_unreadable_solution_is_no_verdict(gold) -> None:
    """VF-11: whatever the completion is."""
    assert maths.verdict(gold, gold) is None


@pytest.mark.parametrize("number", [72, 72.0, 1e-07, 1e20, -0.5, Decimal("1.10"), Fraction(1, 3)])
def test_a_solution_may_be_a_number(number) -> None:
    assert math_reward([f"\\boxed{{{number}}}", "\\boxed{73}"], [number] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("gold", [["72"], {"a": 1}, b"72"])
def test_a_solution_that_is_no_answer_is_an_error(gold) -> None:
    with pytest.raises(TypeError, match="give one answer"):
        math_reward(["72"], [gold])


def test_an_earlier_number_never_rescues_a_wrong_final_answer() -> None:
    """VF-10."""
    completions = ["first \\boxed{42}, then \\boxed{7}", "42, no: \\boxed{7}", "\\boxed{7} 42"]
    assert math_reward(completions, ["42"] * 3) == [0.0] * 3


def test_an_unparsable_gold_answer_is_no_verdict(caplog) -> None:
    """VF-11, with one warning that counts."""
    golds = ["%%%", None, "", float("nan"), "3"]
    scores = math_reward(["%%%", "2", "", "nan", "3"], golds)
    assert scores == [None, None, None, None, 1.0]
    assert set(scores.causes.values()) == {"the solution can't be read as mathematics"}
    assert [r.getMessage() for r in caplog.records if "4 of 5" in r.getMessage()] != []
    assert len(caplog.records) == 1


@pytest.fixture
def grade_in_time(monkeypatch, caplog):
    """Grade under a deadline that is long enough for the completions that must get a score."""

    def grade(completions, solution, must_score, **columns):
        def grade_within(deadline_s):
            monkeypatch.setattr(maths, "DEADLINE_S", deadline_s)
            caplog.clear()
            return math_reward(completions, solution, **columns)

        return under_growing_deadlines(
            grade_within, lambda scores: all(scores[index] is not None for index in must_score)
        )

    return grade


def test_a_comparison_that_hangs_costs_its_own_verdict_alone(grade_in_time, caplog) -> None:
    """VF-3, VF-4: killed at the deadline; the others keep their scores; one warning counts."""
    tower = "$9^{9^{9^{9}}}$"
    answers = ["\\boxed{1}", tower, "\\boxed{3}", tower]
    scores = grade_in_time(answers, ["1", "3", "3", "3"], must_score=(0, 2))
    assert scores == [1.0, None, 1.0, None]
    assert "2 of 4 completions: no answer within the deadline" in caplog.text


def test_a_prompt_whose_answers_hang_is_given_up(grade_in_time, caplog) -> None:
    """Each costs the deadline and a process: after four the others of that prompt have no verdict."""
    towers = [f"\\boxed{{9^{{9^{{9^{{9^{n}}}}}}}}}" for n in range(2, 10)]
    answers, prompts = [*towers, "3", "3"], ["p"] * 9 + ["q"]
    scores = grade_in_time(answers, ["3"] * 10, must_score=(8, 9), prompts=prompts)
    assert scores == [None] * 8 + [1.0, 1.0]
    assert "4 of 10 completions: no answer within the deadline" in caplog.text
    assert "4 of 10 completions: not tried after 4 of the same prompt" in caplog.text
    assert scores.count_causes().total() == 8


def test_a_hang_in_one_thread_does_not_hold_up_another() -> None:
    """VF-4, from any thread; VF-5 for the number of processes."""
    found = {}

    def grade(key, completion, gold):
        found[key] = math_reward([completion], [gold])

    close_workers()
    before = psutil.Process().children()
    math_reward(["1"], ["1"])  # its process is ready, and the next call takes it
    (process,) = (c for c in psutil.Process().children() if c not in before)
    hanging = threading.Thread(target=grade, args=("hangs", "$9^{9^{9^{9}}}$", "3"))
    hanging.start()
    while not maths._pool._busy:
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
    process.kill()  # rather than wait for the deadline
    hanging.join()
    assert found["hangs"] == [None]


def test_the_deadline_holds_for_every_call() -> None:
    """VF-4."""
    with pytest.raises(WorkerFailure, match="deadline"):
        maths._pool.call("3", "9^{9^{9^{9}}}", deadline_s=1.0)


def test_solutions_that_are_not_mathematics_are_found_before_sampling(monkeypatch) -> None:
    """VF-11: unreadable, unequal to itself, or never done."""
    solutions = [
        "72",
        "%%%",
        "\\frac{1}{0}",
        "#### 7",
        "\\boxed{x+1}",
        "9^{9^{9^{9^{9}}}}!",
        "3 = 4",
    ]

    def find(deadline_s):
        monkeypatch.setattr(maths, "DEADLINE_S", deadline_s)
        return Scorer([math_reward]).find_data_errors(["p"] * 7, {"solution": solutions})

    found = under_growing_deadlines(find, lambda found: not {0, 3, 4} & found["math_reward"].keys())
    assert found["math_reward"].keys() == {1, 2, 5, 6}
