import time

import pytest

from trl_selfplay.rewards import exact_reward, extract_answer, final_answer
from trl_selfplay.rewards.answer import answers_agree


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("\\boxed{1} or rather \\boxed{2}", "2"),
        ("\\boxed{3}, #### 4, the answer is 5", "3"),
        ("#### 3\nthe answer is 5\n#### 4", "4"),
        ("<answer>a</answer> <answer> b </answer>", "b"),
        ("the answer is 5. No, the answer is 6.", "6"),
        ("Answer: c, b, a\n", "c, b, a"),
        ("The final answer is: 12", "12"),
        ("ANSWER: x", "x"),
        ("no marker, 7", None),
        ("\\boxed{unbalanced", None),
        ("<answer>open", None),
    ],
)
def test_the_last_marker_of_the_first_kind_counts(text, answer) -> None:
    """VF-10's first half."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("72", "72"),
        ("so $\\boxed{72}$", "72"),
        (72, "72"),
        ("c, b, a", "c, b, a"),
    ],
)
def test_the_final_answer_of_a_solution(solution, answer) -> None:
    assert final_answer(solution) == answer


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [
        ("1,000", "1000", True),
        ("1000.0", "1,000", True),
        ("1000", "1,0000", False),
        ("5%", "5", False),
        ("72.", "72", True),
        ("$3.50", "3.5", True),
        ("1/2", "0.5", True),
        ("-5", "5", False),
        ("x-5", "-5", False),
        ("Paris", "  paris ", True),
        ("a, b", "a,  b", True),
        ("a, b", "b, a", False),
        ("", "", False),
        ("0.1", "0.10000000000000001", False),
        ("1/0", "0", False),
        ("\u0661", "1", False),
        ("９", "9", False),
        ("2000", "2024", False),
    ],
)
def test_answers_agree_by_value_and_not_by_accident(first, second, agree) -> None:
    """VF-9."""
    assert answers_agree(first, second) is agree
    assert answers_agree(second, first) is agree


def test_the_reward_takes_text_and_messages() -> None:
    """VF-1, VF-2: gold in the documented form scores 1, another row's gold 0."""
    golds = ["72", "0.5", "c, b, a"]
    texts = [f"Some steps.\nAnswer: {gold}" for gold in golds]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert exact_reward(texts, golds) == exact_reward(chats, golds) == [1.0, 1.0, 1.0]
    assert exact_reward(texts, golds[1:] + golds[:1]) == [0.0, 0.0, 0.0]


def test_a_solution_that_cannot_be_used_is_no_verdict() -> None:
    """VF-11's second half."""
    assert exact_reward(["Answer: 1"] * 3, [None, "", "  "]) == [None, None, None]


def test_without_a_marker_only_the_bare_answer_counts() -> None:
    assert exact_reward(["72", "it is 72", "72 or 73"], ["72"] * 3) == [1.0, 0.0, 0.0]


AUDIT = {
    "empty": "",
    "white space": " \n\t ",
    "a million characters": "answer " * 150_000,
    "options": "1 2 3 4 5 6 7 72 73",
    "gold in a quotation of the question": 'You ask whether "it is 72".',
    "two contradictory answers": "the answer is 72. Wait, the answer is 73.",
    "hashes alone": "#### ",
    "unbalanced braces": "\\boxed{{{72",
    "null bytes": "72\x00\x00",
    "right to left": "\u202e27",
    "full-width digits": "Answer: ７２",
    "a tower of exponents": "Answer: 9**9**9**9",
    "deep parentheses": "Answer: " + "(" * 10_000 + "72" + ")" * 10_000,
    "deep braces": "\\boxed{" + "{" * 10_000 + "72" + "}" * 10_000,
    "many spaces": "the" + " " * 1_000_000 + "answer" + " " * 1_000_000 + "72",
    "gold followed by garbage": "Answer: 72 bananas or 99",
}


@pytest.mark.parametrize("name", AUDIT)
def test_no_trick_gets_a_reward_or_hangs(name) -> None:
    """The audit: 0.0, well within a second of real work."""
    started = time.process_time()
    assert exact_reward([AUDIT[name]], ["72"]) == [0.0]
    assert time.process_time() - started < 30  # a hang, not a slow machine
