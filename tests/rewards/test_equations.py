"""Arithmetic in completions is read, never run. Invariants RF-1, RF-2, RF-3, RF-6, RF-7."""

import random

import equation_table
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
        ("1/3=0.33", True),  # a rounding
        ("1/3=0.34", False),
        ("(1+2)*3=9", True),
        ("-2 + 3 = 1", True),
        ("$1,200 + $300 = $1,500", True),
        ("50% * 8 = 4", True),
        ("1/0=1", False),
        ("two=2", False),
        ("2**9=512", True),
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
    assert find_equations(f"3 + 4 = 7{between}2 + 2 = 5.") == ["3+4=7", "2+2=5"]
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
    assert find_equations(text) == ["3+4=7"]
    assert equations_reward(["x = 3 and y = 4"]) == [1.0]


@pytest.mark.parametrize(
    "part",
    ["1", "1=", "1 + ", "(", ")", "= ", " ", "x", "1,", "1,000", "1:", "1.", "\\frac{", "*", "\n", "&",
     "3 + 4 = 7\n", "-", "<<", "<<1+1=2>>", "\\text{", "$", "of ", "1/2 of ", "https://", "1 2/3 ",
     "9^", "7/11", "\u00a0", "3 apples ", "\\\\", "3 + 4 = 8 is", "1/2", "{", "\\[", "~", "= about "],
)  # fmt: skip
def test_a_long_text_takes_linear_time(part) -> None:
    many = part * (20_000 // len(part))
    for text in (many + " = 1", "3 + 4 = 7" + many):
        assert equations_reward([text])[0] in (0.0, 1.0)


@pytest.mark.parametrize("kind", ["TRUE", "FALSE", "NONE"])
@pytest.mark.parametrize("hardness", ["", "_ADVERSARIAL"])
def test_the_table_of_equations(kind, hardness) -> None:
    """RF-2: and text that is no plain arithmetic isn't called false."""
    cases = getattr(equation_table, kind + hardness)
    found = {text: (equations_reward([text])[0], bool(find_equations(text))) for text in cases}
    expected = {"TRUE": (1.0, True), "NONE": (1.0, False)}
    if kind == "FALSE":
        assert [text for text, (score, _) in found.items() if score != 0.0] == []
    else:
        assert {text: got for text, got in found.items() if got != expected[kind]} == {}


def test_the_table_is_large_and_half_of_it_adversarial() -> None:
    names = [f"{kind}{hard}" for kind in ("TRUE", "FALSE", "NONE") for hard in ("", "_ADVERSARIAL")]
    sizes = {name: len(set(getattr(equation_table, name))) for name in names}
    total, hard = sum(sizes.values()), sum(n for name, n in sizes.items() if "_" in name)
    assert total >= 500
    assert hard >= 0.5 * total


def test_true_and_false_equations_of_every_spelling() -> None:
    """Against Python's own arithmetic: the right result scores 1, and any other 0."""
    rng = random.Random(1)
    signs = {"+": ["+", "＋"], "-": ["-", "−", "–"], "*": ["*", "×", "·", "x", r"\times", r"\cdot"],
             "/": ["/", "÷", r"\div"]}  # fmt: skip
    frames = [
        "{}",
        "${}$",
        r"\({}\)",
        "so {}.",
        "- {}",
        "* {}",
        "Step 1: {}",
        "**{}**",
        "It is {} now",
    ]
    for _ in range(500):
        left = [rng.randint(1, 999) for _ in range(rng.randint(2, 5))]
        operators = [rng.choice("+-*/") for _ in left[1:]]
        plain = str(left[0]) + "".join(f"{o}{n}" for o, n in zip(operators, left[1:], strict=True))
        written = str(left[0]) + "".join(
            f" {rng.choice(signs[o])} {n}" for o, n in zip(operators, left[1:], strict=True)
        )
        value = eval(plain)  # made here
        result = f"{value:.4f}" if "/" in operators else f"{value}"
        wrong = (
            f"{value + 0.3:.4f}" if "/" in operators else f"{value + rng.choice([-10, -1, 1, 9])}"
        )
        frame = rng.choice(frames)
        assert equations_reward([frame.format(f"{written} = {result}")]) == [1.0], written
        assert find_equations(frame.format(f"{written} = {result}")) == [f"{plain}={result}"], (
            written
        )
        assert equations_reward([frame.format(f"{written} = {wrong}")]) == [0.0], written


def test_one_reasoning_path_is_one_form() -> None:
    """RF-1: blanks don't matter, the order of operands and of equations does."""
    path = reasoning_path("Half is <<48/2=24>>24, then <<48+24=72>>72.")
    assert path == reasoning_path("So << 48 / 2 = 24 >> and at last <<48+24 = 72>>: 72")
    assert path != reasoning_path("Half is <<48/2=24>>24, then <<24+48=72>>72.")
    assert path != reasoning_path("<<48+24=72>> before <<48/2=24>>")


def test_a_path_does_not_depend_on_the_spelling_of_signs_and_units() -> None:
    """RF-1: what isn't arithmetic is no part of it."""
    path = reasoning_path(r"$6 \times 2 = 12$, and $\frac{1}{2} \cdot 1{,}200 = 600$.")
    assert path == ("6*2=12", "1/2*1200=600")
    assert path == reasoning_path("6 apples × 2 = 12 apples. With 2x = 6: 1/2 of $1,200 = $600")


def test_prose_without_equations_is_not_collapsed() -> None:
    """RF-6: the official code would take both for the empty list."""
    first, second = "It rained, so she stayed.", "She was tired, so she stayed."
    assert reasoning_path(first) != reasoning_path(second)
    assert reasoning_path(first) == reasoning_path(f"  {first.upper()} ")
    assert reasoning_path(first) == (default_normal_form(first),)
