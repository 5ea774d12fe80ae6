"""Arithmetic in completions is read, never run. Invariants RF-1, RF-2, RF-3, RF-6, RF-7."""

import random

import pytest

from trl_selfplay.rewards.equations import equations_reward, find_equations, is_true_equation
from trl_selfplay.rollouts.selection import default_normal_form, reasoning_path


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("48/2=24", True),
        ("48 ÷ 2 = 24", True),
        ("5 x 3 = 15", True),
        ("2+2=4=5", False),  # the official code compares the first two sides only
        ("1/3=0.333", True),
        ("1/3=0.33", False),
        ("(1+2)*3=9", True),
        ("-2 + 3 = 1", True),
        ("$1,200 + $300 = $1,500", True),
        ("50% * 8 = 4", True),
        ("1/0=1", False),
        ("two=2", False),
        ("2**9=512", False),
        ("7", False),
        ("=", False),
        ("(" * 10_000 + "1" + ")" * 10_000 + "=1", False),
        ("9" * 1000 + "=1", False),
    ],
)
def test_an_equation_holds_if_all_its_sides_are_equal(equation, expected) -> None:
    assert is_true_equation(equation) is expected


def test_random_arithmetic_agrees_with_python() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = str(rng.randint(1, 99))
        for _ in range(rng.randint(1, 4)):
            text += f" {rng.choice('+-*/')} {rng.randint(1, 99)}"
        value = eval(text)  # made here
        assert is_true_equation(f"{text} = {value:.6f}")
        assert not is_true_equation(f"{text} = {value + 1:.6f}")


def test_a_false_equation_drops_a_completion_with_the_right_answer() -> None:
    """RF-2."""
    completions = ["<<2+2=4>> so the answer is 4", "<<2+2=5>> so the answer is 4", "just 4"]
    assert equations_reward(completions) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("between", [". ", ", ", "; ", ".\n", " so "])
def test_of_several_equations_in_line_each_is_read(between) -> None:
    """RF-2: whatever stands between them; a list of numbers is none."""
    assert find_equations(f"3 + 4 = 7{between}2 + 2 = 5.") == ["3 + 4 = 7", "2 + 2 = 5"]
    assert equations_reward([f"3 + 4 = 7{between}2 + 2 = 5"]) == [0.0]
    assert equations_reward([f"1,200 + 0.5 = 1,200.5{between}2 + 2 = 4"]) == [1.0]
    assert find_equations("the numbers 3, 4 = 7 in all") == []


def test_model_text_is_never_run(tmp_path) -> None:
    """RF-3."""
    proof = tmp_path / "ran"
    text = f"<<__import__('pathlib').Path('{proof}').touch()=0>> the answer is 0"
    assert equations_reward([text, [{"role": "assistant", "content": text}]]) == [0.0, 0.0]
    assert not proof.exists()


def test_in_line_text_that_is_no_arithmetic_is_left_alone() -> None:
    text = "Let x = 3, then 3, 4 = 7 is no sum, but 3 + 4 = 7. On 2024-01-02 = today."
    assert find_equations(text)[0] == "3 + 4 = 7"
    assert equations_reward(["x = 3 and y = 4"]) == [1.0]


def test_a_long_text_takes_linear_time() -> None:
    assert find_equations("1" * 100_000) == []
    assert find_equations("1=" * 20_000) is not None


def test_one_reasoning_path_is_one_form() -> None:
    """RF-1: blanks don't matter, the order of operands and of equations does."""
    path = reasoning_path("Half is <<48/2=24>>24, then <<48+24=72>>72.")
    assert path == reasoning_path("So << 48 / 2 = 24 >> and at last <<48+24 = 72>>: 72")
    assert path != reasoning_path("Half is <<48/2=24>>24, then <<24+48=72>>72.")
    assert path != reasoning_path("<<48+24=72>> before <<48/2=24>>")


def test_prose_without_equations_is_not_collapsed() -> None:
    """RF-6: the official code would take both for the empty list."""
    first, second = "It rained, so she stayed.", "She was tired, so she stayed."
    assert reasoning_path(first) != reasoning_path(second)
    assert reasoning_path(first) == reasoning_path(f"  {first.upper()} ")
    assert reasoning_path(first) == (default_normal_form(first),)
