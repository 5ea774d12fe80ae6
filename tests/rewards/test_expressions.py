"""Random answers in many notations, against arithmetic of fractions and coefficients."""

import random
from fractions import Fraction

import pytest

from trl_selfplay.rewards.equality import same
from trl_selfplay.rewards.expressions import read
from trl_selfplay.rewards.latex import clean
from trl_selfplay.rewards.units import split_unit
from trl_selfplay.rewards.values import UnreadableError

pytest.importorskip("latex2sympy2_extended")


def are_same(gold: str, answer: str) -> bool:
    return same(read(gold), read(answer))


def notations(value: Fraction) -> list[str]:
    """Write a number in ways that are exact."""
    top, bottom = value.numerator, value.denominator
    whole, rest = divmod(abs(top), bottom)
    sign = "-" if top < 0 else ""
    written = [
        f"\\frac{{{top}}}{{{bottom}}}",
        f"{3 * top}/{3 * bottom}",
        f"{sign}\\dfrac{{{abs(top)}}}{{{bottom}}}",
    ]
    if rest and whole:
        written += [f"{sign}{whole}\\frac{{{rest}}}{{{bottom}}}", f"{sign}{whole} {rest}/{bottom}"]
    if bottom == 1:
        written += [f"{top:,}", f"${top}$", f"{top}.00", f"{top:,}".replace(",", "{,}")]
    if 10**6 % bottom == 0:
        decimal = f"{sign}{whole}.{rest * 10**6 // bottom:06}"
        written += [decimal, decimal.rstrip("0").rstrip("."), f"{top * 100}/{bottom}\\%"]
    return written


def test_every_notation_of_a_number_is_that_number_and_no_other() -> None:
    draw = random.Random(0)
    values = [
        Fraction(draw.randint(-5000, 5000), draw.choice([1, 1, 2, 3, 4, 7, 8, 10, 25, 125, 999]))
        for _ in range(40)
    ]
    values += [value + Fraction(draw.choice([-1, 1]), 1000) for value in values[:20]]
    for value in values:
        other = draw.choice(values)
        for written in notations(value):
            assert are_same(draw.choice(notations(value)), written), written
            assert are_same(str(other), written) is (other == value), (other, written)


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_repeating_decimals_are_fractions(length) -> None:
    draw = random.Random(length)
    for _ in range(20):
        fixed, digits = str(draw.randint(0, 99)), "".join(draw.choices("0123456789", k=length))
        nines = 10**length - 1
        value = Fraction(int(fixed), 10 ** len(fixed)) + Fraction(
            int(digits), nines * 10 ** len(fixed)
        )
        gold = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
        changed = f"{(int(digits) + 1) % nines:0{length}}"
        for form in ("0.{}\\overline{{{}}}", "0.{}({})", ".{}\\bar{{{}}}"):
            assert are_same(gold, form.format(fixed, digits))
            assert not are_same(gold, form.format(fixed, changed))


def test_polynomials_are_equal_as_their_coefficients_are() -> None:
    draw = random.Random(1)
    for _ in range(6):
        a, b, c = (draw.choice([-7, -3, -2, 1, 4, 5, 9]) for _ in range(3))
        factors = f"({a}x{b:+})(x{c:+})"
        square, linear, constant = a, a * c + b, b * c
        expanded = f"{constant}{linear:+}x{square:+}x^2"
        assert are_same(expanded, factors)
        assert not are_same(expanded, f"{constant}{linear + 1:+}x{square:+}x^2")
        assert not are_same(factors, factors.replace("x", "y"))


def test_lists_are_equal_in_any_order_and_tuples_in_theirs() -> None:
    draw = random.Random(2)
    for _ in range(20):
        items = draw.sample([*map(str, range(-9, 10)), "\\frac12", "\\sqrt{2}", "x", "(1,2)"], k=4)
        shuffled = draw.sample(items, k=4)
        changed = [*shuffled[:3], "77"]
        assert are_same(", ".join(items), " and ".join(shuffled))
        assert not are_same(", ".join(items), ", ".join(changed))
        assert not are_same(", ".join(items), ", ".join(items[:3]))
        assert are_same(f"({', '.join(items)})", f"({', '.join(shuffled)})") is (items == shuffled)


def test_brackets_and_signs_of_inequalities_agree_for_every_interval() -> None:
    ways = [("(", "<"), ("[", "\\le"), ("(", ">"), ("[", "\\ge")]
    for left, low_sign in ways[:2]:
        for right, high_sign in ways[:2]:
            interval = f"{left}-1,5{')' if right == '(' else ']'}"
            chain = f"-1 {low_sign} x {high_sign} 5"
            assert are_same(interval, chain)
            assert are_same(chain, f"x \\in {interval}")
            for other in ("(-1,5)", "(-1,5]", "[-1,5)", "[-1,5]"):
                assert are_same(interval, other) is (interval == other)
                assert are_same(other, chain) is (interval == other)


@pytest.mark.parametrize(
    "text", ["{", "}", "\\frac{1}", "３", "3\u0301", "\x003", "{" * 50 + "}" * 50, "\\sqrt(2"]
)
def test_what_cannot_be_spelled_is_an_error(text) -> None:
    with pytest.raises(UnreadableError):
        clean(text)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("5 square inches", "5", "in^2"),
        ("5 \\text{ cubic feet}", "5", "ft^3"),
        ("5 \\text{ feet squared}", "5", "ft^2"),
        ("60 kilometers per hour", "60", "km/h"),
        ("3 \\text{ kg} \\cdot", "3 \\text{ kg} \\cdot", None),
        ("-\\dollar 5", "-5", "\\dollar"),
        ("7 \\text{ miles/hour}", "7", "mi/h"),
        ("3abc", "3abc", None),
        ("5 m", "5 m", None),
    ],
)
def test_units_have_one_spelling(text, value, unit) -> None:
    assert split_unit(text) == (value, unit)
