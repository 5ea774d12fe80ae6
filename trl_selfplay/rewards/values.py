"""The objects that answers to mathematical questions describe.

In: parts of an answer, as `expressions.py` reads them. Out: records that `equality.py` compares.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

# Digits to which expressions are evaluated.
DIGITS = 30


class UnreadableError(ValueError):
    """A text isn't mathematics that can be read."""


@dataclass(frozen=True, slots=True)
class Number:
    """A rational number, with the decimal places that it was written with (None: exact)."""

    value: Fraction
    places: int | None = None
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Formula:
    """An expression of sympy, which isn't evaluated; `is_task` if it asks for a computation."""

    value: Any
    unit: str | None = None
    is_task: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """Text that is no mathematics."""

    text: str


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a base."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True)
class Several:
    """Answers in any order: a list or a set."""

    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Ordered:
    """Elements in an order: a point, tuple, vector, interval or ratio, by its two brackets."""

    brackets: str
    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Real numbers, as intervals with two ends each; of a variable where one was named."""

    name: str | None
    intervals: tuple[Ordered, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of elements."""

    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Named:
    """The value of a variable, `x = 3`; the variable, where the value depends on others."""

    name: str
    value: Any
    variable: Any = None


@dataclass(frozen=True, slots=True)
class Relation:
    """An equation or inequality between expressions, as their difference to zero."""

    sign: str
    difference: Any


def unit_of(value: Any) -> str | None:
    """Return the unit of an answer that is one quantity."""
    value = value.value if isinstance(value, Named) else value
    return value.unit if isinstance(value, (Number, Formula)) else None


def intervals_of(value: Any) -> tuple[Ordered, ...] | None:
    """Return the intervals of a region or of a single interval; None for anything else."""
    if isinstance(value, Region):
        return value.intervals
    is_interval = (
        isinstance(value, Ordered)
        and len(value.items) == 2
        and value.brackets in ("()", "[]", "(]", "[)")
        and all(isinstance(item, (Number, Formula)) for item in value.items)
    )
    return (value,) if is_interval else None


def as_sympy(value: Number | Formula) -> Any:
    """Return a quantity as an expression of sympy; decimals are floating-point numbers."""
    import sympy

    if isinstance(value, Formula):
        return value.value
    exact = sympy.Rational(value.value.numerator, value.value.denominator)
    return exact if value.places is None else sympy.Float(exact, DIGITS)


def imaginary() -> Any:
    """Return the symbol that the parser makes of i."""
    import sympy

    return sympy.Symbol("i", real=True)


def symbols_of(expression: Any) -> set[Any]:
    """Return the variables of an expression of sympy."""
    return set(expression.free_symbols) - {imaginary()}
