r"""Compare the objects that two answers describe.

In: a gold answer and an answer, as `expressions.py` reads them. Out: whether they are the same.
Exact numbers must be exactly equal. Decimals may be rounded, if the relative difference is small and
every digit shown is right. Expressions with variables are compared at several points, which is
faster than simplifying, and can't hang on what sympy can't simplify. The points are drawn from a
hash of both expressions, so that no answer can be made to agree there alone, and rational
functions are evaluated exactly.
"""

import random
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from trl_selfplay.rewards.values import (
    DIGITS,
    Formula,
    Matrix,
    Named,
    Number,
    Ordered,
    Region,
    Relation,
    Several,
    as_sympy,
    imaginary,
    intervals_of,
    symbols_of,
)

# Largest relative difference of a rounded number: 0.142857 is 1/7, and 0.143 isn't.
_ROUNDING = Fraction(1, 10_000)
# Of values of expressions that contain decimals, and of those that contain none.
_ROUNDED_FORMULA = 1e-6
_EXACT = 1e-18
# Digits to which exact numbers are told apart.
_MOST_DIGITS = 600
# Ranges from which the values of variables are drawn, as multiples of 1 or 2 plus 0 or 1, or as
# fractions: both signs, whole numbers of both parities, and small and large ones.
_EVEN, _ODD, _WHOLE, _FRACTION = (2, 0), (2, 1), (1, 0), None
_RANGES = (
    (_EVEN, 1, 12), (_ODD, 1, 12), (_FRACTION, 1, 5), (_FRACTION, -3, -1), (_ODD, 2, 20),
    (_WHOLE, -25, -2), (_FRACTION, 0, 1), (_FRACTION, -1, 0), (_FRACTION, 0, 1),
    (_FRACTION, 30, 90), (_FRACTION, -30, -3), (_EVEN, 2, 20),
)  # fmt: skip
_FEWEST_POINTS = 3
# Of powers that are computed exactly.
_MOST_EXPONENT, _MOST_BITS = 2000, 20_000


def same(gold: Any, answer: Any) -> bool:
    """Return whether two objects that were read are the same answer."""
    gold, answer = _alone(gold), _alone(answer)
    if isinstance(gold, Named) or isinstance(answer, Named):
        return _same_named(gold, answer)
    if isinstance(gold, (Number, Formula)) and isinstance(answer, (Number, Formula)):
        if gold.unit is not None and answer.unit is not None and gold.unit != answer.unit:
            return False
        if isinstance(answer, Formula) and answer.is_task and not getattr(gold, "is_task", False):
            return False
        return _same_value(gold, answer)
    gold_region, region = intervals_of(gold), intervals_of(answer)
    if gold_region is not None and region is not None and not isinstance(gold, Ordered):
        names = {gold.name, getattr(answer, "name", None)} - {None}
        return len(names) < 2 and _all_same(gold_region, region)
    if isinstance(gold, Ordered) and isinstance(answer, Region):
        return region is not None and _all_same(gold_region or (), region)
    if type(gold) is not type(answer):
        return False
    if isinstance(gold, Several):
        return _same_in_any_order(gold.items, answer.items)
    if isinstance(gold, Ordered):
        return gold.brackets == answer.brackets and _all_same(gold.items, answer.items)
    if isinstance(gold, Matrix):
        return len(gold.rows) == len(answer.rows) and all(map(_all_same, gold.rows, answer.rows))
    if isinstance(gold, Relation):
        return _same_relation(gold, answer)
    return bool(gold == answer)


def has_value(gold: Any) -> bool:
    """Return whether an answer is equal to itself, and can be computed if it is a number."""
    import sympy

    value = gold.value if isinstance(gold, Named) else gold
    if (
        isinstance(value, Formula)
        and not symbols_of(value.value)
        and not value.value.has(sympy.oo, -sympy.oo)
    ):
        return _value_at(value.value, {}) is not None
    return same(gold, gold)


def _same_named(gold: Any, answer: Any) -> bool:
    """Compare where at least one side says of which variable it is the value."""
    if isinstance(gold, Relation):
        return _same_relation(gold, _as_relation(answer))
    if isinstance(answer, Relation):
        return _same_relation(_as_relation(gold), answer)
    for named, other in ((gold, answer), (answer, gold)):
        if not isinstance(other, Named):
            if isinstance(other, Region) and isinstance(named.value, Several):
                return False  # (x, y) = (1, 2) is a point
            has_names = isinstance(other, Several) and _has_names(other)
            value = named.value if has_names else _ordered_values(named)
            return same(value, other) if named is gold else same(other, value)
    if gold.name == answer.name:
        return same(gold.value, answer.value)
    left, right = _as_relation(gold), _as_relation(answer)
    if left is None or right is None or len(symbols_of(left.difference)) < 2:
        return False
    return _same_relation(left, right)


def _ordered_values(named: Named) -> Any:
    """Return the value of `x = 3`, or (1, 2) of `(x, y) = (1, 2)`."""
    value = named.value
    if isinstance(value, Several) and _has_names(value):
        return Ordered("()", tuple(item.value for item in value.items))
    return value


def _has_names(several: Several) -> bool:
    return bool(several.items) and all(isinstance(item, Named) for item in several.items)


def _as_relation(named: Named) -> Relation | None:
    return None if named.variable is None else Relation("=", named.variable - as_sympy(named.value))


def _alone(value: Any) -> Any:
    if isinstance(value, Several) and len(value.items) == 1:
        return value.items[0]
    if isinstance(value, Ordered) and value.brackets == "\\langle\\rangle":
        return Ordered("()", value.items)
    return value


def _all_same(golds: Sequence[Any], answers: Sequence[Any]) -> bool:
    return len(golds) == len(answers) and all(map(same, golds, answers))


def _same_in_any_order(golds: Sequence[Any], answers: Sequence[Any]) -> bool:
    if len(golds) != len(answers):
        return False
    for these, others in ((golds, answers), (answers, golds)):
        names = {item.name.split("_")[0] for item in these if isinstance(item, Named)}
        if len(names) > 1 and not all(isinstance(item, Named) for item in others):
            return False  # x = 1, y = 2 aren't two values of one unknown
    left = list(answers)
    for gold in golds:
        index = next((i for i, answer in enumerate(left) if same(gold, answer)), None)
        if index is None:
            return False
        del left[index]
    return True


def _same_value(gold: Number | Formula, answer: Number | Formula) -> bool:
    if isinstance(gold, Number) and isinstance(answer, Number):
        if gold.value == answer.value:
            return True
        difference = abs(gold.value - answer.value)
        is_small = difference <= _ROUNDING * max(abs(gold.value), abs(answer.value))
        return is_small and _is_hidden(difference, gold, answer)
    import sympy

    first, second = as_sympy(gold), as_sympy(answer)
    if first == second:
        return True
    if first.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) or second.has(
        sympy.oo, -sympy.oo, sympy.zoo, sympy.nan
    ):
        return False
    is_rounded = first.has(sympy.Float) or second.has(sympy.Float)
    symbols = symbols_of(first) | symbols_of(second)
    if symbols:
        return _same_at_points(first, second, symbols, is_rounded)
    if not is_rounded:
        return _are_near(_value_at(first, {}), _value_at(second, {})) and _is_zero(
            first - second, {}
        )
    if isinstance(gold, Number) or isinstance(answer, Number):
        difference = _value_at(first - second, {})
        is_near = _are_near(_value_at(first, {}), _value_at(second, {}), float(_ROUNDING))
        return is_near and _is_hidden(abs(difference), gold, answer)
    return _are_near(_value_at(first, {}), _value_at(second, {}), _ROUNDED_FORMULA)


def _is_hidden(difference: Any, *values: Number | Formula) -> bool:
    """Return whether a difference is less than one unit of the last digit that both sides show."""
    places = [v.places for v in values if isinstance(v, Number) and v.places is not None]
    return bool(places) and bool(difference * Fraction(10) ** min(places) < 1)


def _is_zero(difference: Any, at: dict[Any, Any]) -> bool:
    """Return whether an exact number is zero, or smaller than can be computed."""
    from sympy.core.evalf import PrecisionExhausted

    try:
        return bool(
            difference.evalf(15, maxn=_MOST_DIGITS, strict=True, subs={**at, imaginary(): _i()})
            == 0
        )
    except PrecisionExhausted:
        return True


def _same_at_points(first: Any, second: Any, symbols: Iterable[Any], is_rounded: bool) -> bool:
    import sympy

    compared = 0
    is_slow = first.has(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit) or second.has(
        sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit
    )
    for at in _points(symbols, first, second):
        values = [_value_at(expression, at) for expression in (first, second)]
        if any(value is None for value in values):
            continue
        if not _has_imaginary(first, second) and not all(_is_real(value) for value in values):
            continue  # outside the domain of real functions
        if not _are_near(values[0], values[1], _ROUNDED_FORMULA if is_rounded else _EXACT):
            return False
        is_settled = is_rounded or is_slow or all(value.is_Rational for value in values)
        if not is_settled and compared < _FEWEST_POINTS and not _is_zero(first - second, at):
            return False
        compared += 1
    return compared >= _FEWEST_POINTS


def _same_relation(gold: Relation | None, answer: Relation | None) -> bool:
    """Return whether the differences are constant multiples, positive ones for inequalities."""
    import sympy

    if gold is None or answer is None or gold.sign != answer.sign:
        return False
    symbols = symbols_of(gold.difference) | symbols_of(answer.difference)
    if not symbols:
        return False
    ratios = []
    for at in _points(symbols, gold.difference, answer.difference):
        values = [_value_at(side.difference, at) for side in (gold, answer)]
        if None not in values and values[1] != 0:
            ratios.append(values[0] / values[1])
    if len(ratios) < _FEWEST_POINTS or not ratios[0].is_real or ratios[0] == 0:
        return False
    if gold.sign.startswith("<") and ratios[0] < 0:
        return False
    is_rounded = gold.difference.has(sympy.Float) or answer.difference.has(sympy.Float)
    tolerance = _ROUNDED_FORMULA if is_rounded else _EXACT
    return all(_are_near(ratios[0], other, tolerance) for other in ratios[1:])


def _points(symbols: Iterable[Any], *expressions: Any) -> list[dict[Any, Any]]:
    """Return points at which no two variables have the same value, by a hash of the expressions."""
    import sympy

    ordered = sorted(symbols, key=lambda symbol: symbol.name)
    draw = random.Random(" ".join(map(sympy.srepr, expressions)))
    points = []
    for start in range(len(_RANGES)):
        at: dict[Any, Any] = {}
        for index, symbol in enumerate(ordered):
            turn, place = divmod(start + 3 * index, len(_RANGES))
            kind, low, high = _RANGES[place]
            while symbol not in at or list(at.values()).count(at[symbol]) > 1:
                if kind is None:
                    scale = draw.randint(500, 999)
                    value = Fraction(draw.randint(low * scale + 1, high * scale - 1), scale)
                else:
                    value = Fraction(draw.randint(low, high) * kind[0] + kind[1])
                value += 2 * turn * (index + 1)
                at[symbol] = sympy.Rational(value.numerator, value.denominator)
        points.append(at)
    return points


def _rational_at(expression: Any, at: dict[Any, Any]) -> Fraction | None:
    """Return the exact value of a rational function at a point; None if it is none, or too large."""
    if expression.is_Symbol:
        expression = at.get(expression, expression)
    if expression.is_Rational:
        return Fraction(int(expression.p), int(expression.q))
    if not (expression.is_Add or expression.is_Mul or expression.is_Pow):
        return None
    parts = []
    for part in expression.args:
        value = _rational_at(part, at)
        if value is None:
            return None
        parts.append(value)
    result = parts[0]
    for part in parts[1:]:
        if expression.is_Add:
            result += part
        elif expression.is_Mul:
            result *= part
        else:
            bits = result.numerator.bit_length() + result.denominator.bit_length()
            is_small = abs(part) <= _MOST_EXPONENT and bits * abs(part) <= _MOST_BITS
            if part.denominator != 1 or not is_small or (result == 0 and part <= 0):
                return None
            result **= int(part)
        if result.numerator.bit_length() + result.denominator.bit_length() > _MOST_BITS:
            return None
    return result


def _value_at(expression: Any, at: dict[Any, Any]) -> Any:
    """Return the value of an expression at a point, exact or to 30 digits; None if it has none."""
    import sympy
    from sympy.core.evalf import PrecisionExhausted

    if (exact := _rational_at(expression, at)) is not None:
        return sympy.Rational(exact.numerator, exact.denominator)
    try:
        value = expression.evalf(DIGITS, subs={**at, imaginary(): _i()})
    except PrecisionExhausted:
        return None
    if not value.is_number or not value.is_finite:
        return None
    # Terms that cancel exactly evaluate to noise with a precision of one bit.
    return value * 0 if getattr(value, "_prec", 0) == 1 else value


def _are_near(first: Any, second: Any, tolerance: float = _EXACT) -> bool:
    if first is None or second is None:
        return False
    if first.is_Rational and second.is_Rational and tolerance == _EXACT:
        return bool(first == second)
    return bool(abs(first - second) <= tolerance * max(abs(first), abs(second)))


def _is_real(value: Any) -> bool:
    real, imaginary = value.as_real_imag()
    return bool(abs(imaginary) <= _EXACT * abs(real)) or imaginary == 0


def _has_imaginary(*expressions: Any) -> bool:
    return any(imaginary() in expression.free_symbols for expression in expressions)


def _i() -> Any:
    import sympy

    return sympy.I
