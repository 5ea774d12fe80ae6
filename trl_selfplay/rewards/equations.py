"""Check the arithmetic in a completion without executing it.

In: completions with equations, marked as in GSM8K (`<<48/2=24>>`) or inline (`48 / 2 = 24`). Out:
the equations, and 1.0 if all of them hold, else 0.0. A small parser reads numbers, + - * / and
parentheses; model text is never evaluated.

Source: RFT, arXiv 2308.01825, section 3.3: paths with a false equation are dropped.
"""

import itertools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from trl_selfplay.rewards.answer import text_of

_MARKED = re.compile(r"<<([^<>\n]{0,400})>>")
# A run of arithmetic around "=": digits, operators, parentheses, currency signs. Lengths are bounded,
# so that a long row of digits takes linear time.
_IN_LINE = re.compile(
    r"[-+$€£(\d][-+*/×÷·xX%$€£().,\d \t]{0,120}(?:=[-+*/×÷·xX%$€£().,\d \t]{1,120}){1,20}"
)
_TOKEN = re.compile(r"(\d+(?:\.\d+)?|\.\d+)|([-+*/()%])")
_SENTENCE_END = re.compile(r"[.,](?=\s)")
_COMPUTES = re.compile(r"[\d)%]\s*[-+*/×÷·xX]")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3})")
_OPERATORS = str.maketrans(
    {"×": "*", "·": "*", "x": "*", "X": "*", "÷": "/", "$": "", "€": "", "£": ""}
)
# The official code's tolerance, because models write 1/3 = 0.333.
_TOLERANCE = Fraction(1, 1000)
_MOST_DEPTH = 50
_MOST_DIGITS = 60


def find_equations(text: str) -> list[str]:
    """Return a text's equations in order: the marked ones if there are any, else the inline ones.

    Inline text that isn't arithmetic, such as "x = 3" or "3, 4 = 7", is left out.

    >>> find_equations("Half is <<48/2=24>>24, together <<48 + 24 = 72>>72.")
    ['48/2=24', '48 + 24 = 72']
    >>> find_equations("She has 40 + 32 = 72 clips.")
    ['40 + 32 = 72']
    >>> find_equations("40 + 32 = 72, 72 - 10 = 60.")
    ['40 + 32 = 72', '72 - 10 = 60']
    """
    if marked := _MARKED.findall(text):
        return [equation for equation in marked if equation.strip()]
    found: list[str] = []
    for match in _IN_LINE.findall(text):
        equation = _trim(match)
        if _is_readable(equation):
            found.append(equation)
        else:  # several equations, or a list of numbers before one
            parts = map(_trim, _SENTENCE_END.split(match))
            found += [p for p in parts if _is_readable(p) and _COMPUTES.search(p)]
    return found


def _trim(equation: str) -> str:
    # A period or comma after the last number ends the sentence, not the number.
    return equation.strip(" \t.,xX")


def _is_readable(equation: str) -> bool:
    try:
        return len([_value(side) for side in equation.split("=")]) > 1
    except ZeroDivisionError:
        return True
    except (ValueError, RecursionError):
        return False


def is_true_equation(equation: str) -> bool:
    """Return whether all sides of an equation are equal to within 0.001; False if one is unreadable.

    >>> is_true_equation("48/2=24"), is_true_equation("2+2=4=5"), is_true_equation("two=2")
    (True, False, False)
    """
    sides = equation.split("=")
    if len(sides) < 2:
        return False
    try:
        values = [_value(side) for side in sides]
    except (ValueError, ZeroDivisionError, RecursionError):
        return False
    return all(abs(a - b) < _TOLERANCE for a, b in itertools.pairwise(values))


def equations_reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Return 1.0 if all equations of a completion hold or it has none, else 0.0.

    A marked equation (`<<…>>`) that can't be read counts as false. To require the right answer as
    well, combine this with an answer reward and `reward_weights=[0.5, 0.5]`, so that only both
    together reach a threshold of 1.0.

    Source: RFT, arXiv 2308.01825, section 3.3; the official code compares only the first two sides
    of an equation, this function all of them.
    """
    return [
        float(all(map(is_true_equation, find_equations(text_of(completion)))))
        for completion in completions
    ]


def _value(text: str) -> Fraction:
    """Return the value of an arithmetic expression.

    Raises:
        ValueError: The text has anything but numbers, + - * / % and parentheses.
    """
    text = _GROUPED.sub("", text.translate(_OPERATORS)).strip()
    tokens: list[str] = []
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        match = _TOKEN.match(text, position)
        if match is None or len(match[0]) > _MOST_DIGITS:
            raise ValueError(f"not arithmetic: {text[position : position + 20]!r}")
        tokens.append(match[0])
        position = match.end()
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.tokens:
        raise ValueError(f"not arithmetic: {parser.tokens[0]!r}")
    return value


class _Parser:
    """A recursive-descent parser: sum = product {± product}; product = factor {×÷ factor}."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self.depth = 0

    def _next_is(self, *choices: str) -> bool:
        return bool(self.tokens) and self.tokens[0] in choices

    def sum(self) -> Fraction:
        value = self.product()
        while self._next_is("+", "-"):
            sign = 1 if self.tokens.pop(0) == "+" else -1
            value += sign * self.product()
        return value

    def product(self) -> Fraction:
        value = self.factor()
        while self._next_is("*", "/"):
            if self.tokens.pop(0) == "*":
                value *= self.factor()
            else:
                value /= self.factor()
        return value

    def factor(self) -> Fraction:
        if not self.tokens:
            raise ValueError("an operand is missing")
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise ValueError("nested too deep")
        token = self.tokens.pop(0)
        if token in "+-":
            value = self.factor() * (1 if token == "+" else -1)
        elif token == "(":
            value = self.sum()
            if not self._next_is(")"):
                raise ValueError("a parenthesis is not closed")
            self.tokens.pop(0)
        else:
            value = Fraction(token)  # ValueError for an operator
        if self._next_is("%"):
            self.tokens.pop(0)
            value /= 100
        self.depth -= 1
        return value
