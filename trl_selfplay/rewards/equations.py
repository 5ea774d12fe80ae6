r"""Check the arithmetic in a completion without executing it.

In: completions with equations, marked as in GSM8K (`<<48/2=24>>`) or in the text, in plain signs or
LaTeX (`48 / 2 = 24`, `$48 \div 2 = 24$`). Out: the equations, and 1.0 if all of them hold, else 0.0.
An equation in the text is called false only if all of it is plain arithmetic: what stands before
and behind it, its units and its signs are looked at, and where they leave a doubt it is left out.

Source: RFT, arXiv 2308.01825, section 3.3: paths with a false equation are dropped.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from trl_selfplay.rewards.answer import text_of
from trl_selfplay.rewards.arithmetic import Token, evaluate, normal_line, number_value, read_tokens
from trl_selfplay.rewards.equation_sides import Side, prefix, suffix

_MARKED = re.compile(r"<<(?=[^<>\n]{0,400}[\d])([^<>=\n]{1,200}=[^<>\n]{0,400})>>")
_EQUALS = re.compile(r"[=＝≈≃≅≒]|\\approx|\\simeq")
# Where LaTeX is written in JSON, its backslashes come in pairs; elsewhere a pair ends a line.
_ESCAPED = re.compile(r"\\\\(?=(?:[dtc]?frac|times|cdot|div|text|left|right|approx|boxed)\b)")
_LINE_END = re.compile(r"\n|\\\\(?:\[[^\]\n]{0,20}\])?")
_CONTINUES = re.compile(r"[\s&$]{0,40}(?:[=＝≈]|\\approx|\\simeq)(?![=>])")
_CONTINUES_IN_LATEX = re.compile(
    r"[\s&]{0,40}(?:\\quad|\\qquad)?\s?(?:[-+=＝≈]|\\times|\\cdot|\\div|\\approx)"
)
_ITEM = re.compile(
    r"[ \t>]{0,40}(?:[*•◦●▪][ \t]+|(?:[-*•][ \t]+)?(?:\(?[0-9a-zA-Z]{1,3}[.):]{1,2}|\[\d{1,3}\])[ \t]+)"
)
# Numbers in another base or modulus, and what is said of roundings and remainders.
_OTHER_ARITHMETIC = re.compile(
    r"\bbase[- ]?(?:\d|two|eight|sixteen)|_\{?\d|\bbinary\b|\boctal\b|\bhexadecimal\b|\bmodul|\bmod\b|\\[pb]?mod\b"
    r"|\bo'clock\b", re.IGNORECASE
)  # fmt: skip
_WHOLE_NUMBERS = re.compile(
    r"\bround|\bfloor|\bceil|\binteger|\bwhole\b|\bremain|\bleft ?over|(?<!\\)\bleft\b|\bquotient|\bcomplete|\bfull\b|⌊|⌈|//",
    re.IGNORECASE,
)
_REMAINDER = re.compile(
    r"[\s,;({]{0,3}(?:\\text\{\s?)?(?:(?:with|and)\s)?(?:(?:a|an|the)\s)?(?:R|r|rem\.?|remainder)(?:\s?\})?(?![a-z])"
    r"(?:\s(?:of|is|was))?[\s:=]{0,3}(\d{1,12})(?![\d.])"
    r"|[\s,;(]{0,3}(?:with|and)\s(\d{1,12})\s(?:\w{1,20}\s)?(?:left|remaining|extra|over)\b"
)
_DENIED = re.compile(
    r"[\s,;(–—-]{0,4}(?:(?:but|and|so)\s)?(?:which|that|this|it)?(?:'s|’s)?\s?(?:is|was|would be|are)?\s?"
    r"(?:not|isn|wasn|doesn|wrong|false|incorrect|untrue|impossible|no\b|an? contradiction|a mistake|an error"
    r"|\(mod|mod\b|≠|\?|[✗✘❌])",
    re.IGNORECASE,
)  # fmt: skip
_NUMBER_WORDS = (
    "dozen hundred thousand million billion trillion pair score gross half third fourth quarter tenth "
    "hundredth thousandth ten one k couple degree percent"
)
_DIMENSIONS = (
    "second sec s minute min hour hr h day week month year decade century",
    "mm cm dm m metre meter km kilometre kilometer millimetre millimeter centimetre centimeter inch foot feet ft yard yd "
    "mile mi inche",
    "mg g gram kg kilogram milligram ounce oz pound lb ton tonne",
    "ml cl dl l litre liter millilitre milliliter cup pint quart gallon tablespoon teaspoon tbsp tsp",
    "$ € £ ¥ ₹ dollar euro cent ¢ penny pennie nickel dime quarter yen rupee buck usd eur",
    "byte kb mb gb tb bit",
)
_CURRENCIES = "$€£¥₹"
_DIMENSION_OF = {unit: group for group in _DIMENSIONS for unit in group.split()}
_SAME_UNIT = {
    "dollar": "$",
    "buck": "$",
    "usd": "$",
    "euro": "€",
    "eur": "€",
    "feet": "foot",
    "ft": "foot",
}
_GROUPED_NUMBER = re.compile(r"(?<![0-9)])\(([0-9.]{1,60})\)")
# "≈" holds to within 5 %, or if the number shown is a rounding.
_ROUGHLY = Fraction(1, 20)
# Floats printed with all their digits aren't exact.
_FLOAT_DIGITS, _FLOAT_NOISE = 12, Fraction(1, 10**14)


def find_equations(text: str) -> list[str]:
    r"""Return a text's equations in order: the marked ones if there are any, else those in the text.

    They have a normal form, with ASCII signs and without blanks, units and currencies. Text that
    isn't arithmetic, such as "x = 3" or "2x + 3 = 7", is left out.

    >>> find_equations("Half is <<48/2=24>>24, together <<48 + 24 = 72>>72.")
    ['48/2=24', '48+24=72']
    >>> find_equations(r"She has $40 \times 2 = 80$ clips. 80 apples − 8 apples = 72 apples.")
    ['40*2=80', '80-8=72']
    """
    return [found.form for found in _marked(text) or _in_text(text)]


def is_true_equation(equation: str) -> bool:
    """Return whether all sides of an equation are equal; False if one is unreadable.

    A number with decimals stands for all that round to it. One without is exact, except beside "≈",
    which also allows 5 %.

    >>> is_true_equation("48/2=24"), is_true_equation("2+2=4=5"), is_true_equation("two=2")
    (True, False, False)
    >>> is_true_equation("100/3 = 33.33"), is_true_equation("100/3 = 33.4")
    (True, False)
    """
    return _whole_equation(equation).is_true


def equations_reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Return 1.0 if all equations of a completion hold or it has none, else 0.0.

    Both the marked equations (`<<…>>`) and those in the text count. A marked one that can't be read
    counts as false. To require the right answer as well, combine this with an answer reward and
    `reward_weights=[0.5, 0.5]`, so that only both together reach a threshold of 1.0.

    Source: RFT, arXiv 2308.01825, section 3.3; the official code compares only the first two sides
    of marked equations.
    """
    return [float(_all_hold(text_of(completion))) for completion in completions]


def _all_hold(text: str) -> bool:
    unmarked = _MARKED.sub("", text)
    return all(each.is_true for each in itertools.chain(_marked(text), _in_text(unmarked)))


@dataclass(frozen=True, slots=True)
class _Equation:
    form: str
    is_true: bool


@dataclass(slots=True)
class _Chain:
    """Sides of one equation so far, and the signs between them."""

    sides: list[Side] = field(default_factory=list)
    signs: list[str] = field(default_factory=list)


def _marked(text: str) -> list[_Equation]:
    return [_whole_equation(found) for found in _MARKED.findall(text)]


def _whole_equation(text: str) -> _Equation:
    """Read all of a text as one equation; it is false if that can't be done."""
    tokens = read_tokens(normal_line(text))
    pieces, signs = _split(tokens)
    sides = [prefix(piece) for piece in pieces]
    whole = [
        side for side, piece in zip(sides, pieces, strict=True) if side and side[1] == len(piece)
    ]
    if not signs or len(whole) < len(pieces):
        return _Equation("".join(text.split()), is_true=False)
    chain = _Chain([side for side, _ in whole], signs)
    return _Equation(_form(chain), _holds(chain))


def _in_text(text: str) -> Iterator[_Equation]:
    if not _EQUALS.search(text):
        return
    can_accuse = not _OTHER_ARITHMETIC.search(text)
    is_whole = bool(_WHOLE_NUMBERS.search(text))
    for line, starts_line in _lines(text):
        if not _EQUALS.search(line):
            continue
        normal = normal_line(line)
        for chain, end in _chains(read_tokens(normal), starts_line):
            equation = _judge(chain, normal, end, can_accuse=can_accuse, is_whole=is_whole)
            if equation is not None:
                yield equation


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """Yield lines, joined where an equation goes on in the next, and whether a bullet may start it."""
    parts: list[str] = []
    position = 0
    text = _ESCAPED.sub(r"\\", text)
    ends = [(match.start(), match.end(), match[0]) for match in _LINE_END.finditer(text)]
    separator = "\n"
    for start, end, this in [*ends, (len(text), len(text), "")]:
        line, position = text[position:start], end
        pattern = _CONTINUES if separator == "\n" else _CONTINUES_IN_LATEX
        if parts and pattern.match(line):
            parts.append(line)
        elif line.strip():
            if parts:
                yield _without_marker(" ".join(parts))
            parts = [line]
        separator = this if line.strip() else separator
    if parts:
        yield _without_marker(" ".join(parts))


def _without_marker(line: str) -> tuple[str, bool]:
    match = _ITEM.match(line)
    return (line, True) if match is None else (line[match.end() :], False)


def _split(tokens: Sequence[Token]) -> tuple[list[list[Token]], list[str]]:
    """Split tokens at the equals signs."""
    pieces: list[list[Token]] = [[]]
    signs = []
    for token in tokens:
        if token.kind == "equals":
            pieces.append([])
            signs.append(token.text)
        else:
            pieces[-1].append(token)
    return pieces, signs


def _chains(tokens: Sequence[Token], starts_line: bool) -> Iterator[tuple[_Chain, int]]:
    """Yield the equations among the tokens of a line, and where each ends."""
    for is_break, group in itertools.groupby(tokens, lambda token: token.kind == "break"):
        if not is_break:
            yield from _chains_of_phrase(list(group), starts_line)
        starts_line = False


def _chains_of_phrase(tokens: list[Token], starts_line: bool) -> Iterator[tuple[_Chain, int]]:
    pieces, signs = _split(tokens)
    if not signs:
        return
    chain = _Chain()
    if first := suffix(pieces[0], starts_line=starts_line):
        chain.sides.append(first)
    for sign, piece in zip(signs, pieces[1:], strict=True):
        if (read := prefix(piece)) is None:
            if len(chain.sides) > 1:
                yield chain, chain.sides[-1].tokens[-1].end
            side, end = None, 0
        else:
            side, end = read
            if chain.sides:
                chain.signs.append(sign)
            chain.sides.append(side)
            if end == len(piece):
                continue
            yield chain, side.tokens[-1].end
        chain = _Chain()
        if following := suffix(piece[end:], starts_line=False):
            chain.sides.append(following)
    if len(chain.sides) > 1:
        yield chain, chain.sides[-1].tokens[-1].end


def _judge(
    chain: _Chain, line: str, end: int, *, can_accuse: bool, is_whole: bool
) -> _Equation | None:
    """Return an equation with its verdict, or None if it is none or its verdict is in doubt."""
    if len(chain.sides) < 2 or not any(side.computes for side in chain.sides):
        return None
    form = _form(chain)
    remainder = _REMAINDER.match(line, end)
    if remainder is not None:
        return _with_remainder(chain, form, int(remainder[1] or remainder[2]))
    first = chain.sides[0]
    if first.may_be_bullet:
        bulleted = _Chain([Side(first.tokens[1:]), *chain.sides[1:]], chain.signs)
        if _holds(bulleted):
            return _Equation(_form(bulleted), is_true=True)
    if _holds(chain):
        return _Equation(form, is_true=True)
    if (
        not can_accuse
        or any(side.in_doubt for side in chain.sides)
        or _DENIED.match(line, end)
        or not _is_plain(chain)
        or (is_whole and _holds(chain, last_digits=Fraction(1)))
    ):
        return None
    try:
        for side in chain.sides:
            evaluate(side.tokens)
    except ValueError:
        return None
    except ZeroDivisionError:
        pass  # no number is that
    return _Equation(form, is_true=False)


def _with_remainder(chain: _Chain, form: str, remainder: int) -> _Equation | None:
    """Judge `17 / 5 = 3 R 2`, where the last number is a whole quotient."""
    *_, dividing, quotient = chain.sides
    signs = [i for i, token in enumerate(dividing.tokens) if token.text in ("/", "÷")]
    if len(signs) != 1:
        return None
    try:
        dividend, divisor = (
            evaluate(part)
            for part in (dividing.tokens[: signs[0]], dividing.tokens[signs[0] + 1 :])
        )
        is_true = dividend == divisor * evaluate(quotient.tokens) + remainder
    except (ValueError, ZeroDivisionError):
        return None
    return _Equation(f"{form}R{remainder}", is_true)


def _holds(chain: _Chain, last_digits: Fraction = Fraction(1, 2)) -> bool:
    """Return whether all neighbours of a chain are equal under one reading of its signs.

    Args:
        chain: The equation.
        last_digits: By how much of its last digit a rounded number may differ.
    """
    texts = [token.text for side in chain.sides for token in side.tokens]
    readings: list[dict[str, bool]] = [{}]
    if "%" in texts:
        readings.append({"percent_is_unit": True})
    if any(re.fullmatch(r"\d{1,3}\.\d{3}", text) for text in texts):
        readings.append({"dots_group": True})
    if "÷" in texts and "/" in texts:
        readings.append({"slash_binds": True})
    return any(_holds_as(chain, reading, last_digits) for reading in readings)


def _holds_as(chain: _Chain, reading: dict[str, bool], last_digits: Fraction) -> bool:
    try:
        values = [evaluate(side.tokens, **reading) for side in chain.sides]
    except (ValueError, ZeroDivisionError):
        return False
    return all(
        _are_equal(first, second, sides, sign, "percent_is_unit" in reading, last_digits)
        for first, second, sides, sign in zip(
            values, values[1:], itertools.pairwise(chain.sides), chain.signs, strict=False
        )
    )


def _are_equal(
    first: Fraction, second: Fraction, sides: tuple[Side, Side], sign: str, percent: bool,
    last_digits: Fraction,
) -> bool:  # fmt: skip
    difference = abs(first - second)
    if difference == 0:
        return True
    is_rough = sign == "≈"
    if is_rough and difference <= _ROUGHLY * max(abs(first), abs(second)):
        return True
    for side in sides:
        if (number := side.number) is None:
            continue
        decimals = len(number.text.partition(".")[2])
        step = Fraction(1, 10 ** min(decimals, 60))
        if not percent and any(token.kind == "percent" for token in side.tokens):
            step /= 100
        if decimals or is_rough or last_digits == 1:
            goes_on = any(token.kind == "dots" for token in side.tokens)
            if difference < step if goes_on or last_digits == 1 else difference <= step / 2:
                return True
    digits = (len(t.text.partition(".")[2]) for side in sides for t in side.tokens)
    return max(digits, default=0) >= _FLOAT_DIGITS and difference <= _FLOAT_NOISE * abs(first)


def _is_plain(chain: _Chain) -> bool:
    """Return whether an equation that doesn't hold can't be right in another sense.

    Its signs may be ambiguous (a decimal comma, 6 / 2(1 + 2)), its units may convert (1 hour + 30
    minutes = 90 minutes), words may stand for numbers or prices (2 apples + 3 apples = 10), and a
    share may be taken of what precedes it (200 + 10% = 220).
    """
    tokens = [token for side in chain.sides for token in side.tokens]
    if any(token.kind == "number" and "," in token.text for token in tokens):
        return False
    if any(map(_divides_by_product, chain.sides)):
        return False
    units = [_units(side) for side in chain.sides]
    phrases = {phrase for side in units for phrase in side}
    words = {word for phrase in phrases for word in phrase}
    if not words.isdisjoint(_NUMBER_WORDS.split()) or any(map(_is_variable, tokens)):
        return False
    dimensions = [_DIMENSION_OF[word] for word in words if word in _DIMENSION_OF]
    if len(dimensions) > len(set(dimensions)):
        return False
    if not any(token.kind == "operator" and token.text in "+-" for token in tokens):
        return True
    percents = sum(token.kind == "percent" for token in tokens)
    if 0 < percents < sum(token.kind == "number" for token in tokens) or _is_range(chain):
        return False
    if len(phrases) > 1 and _opens_maths(chain):
        phrases -= {("$",)}
    if len(phrases) > 1:
        return False
    counts_things = any(phrase[0] not in _CURRENCIES for phrase in phrases)
    return bool(units[-1]) or not counts_things or not any(units[:-1])


def _divides_by_product(side: Side) -> bool:
    kinds = [token.kind for token in side.tokens]
    is_implied = any(a in ("number", "close") and b == "open" for a, b in itertools.pairwise(kinds))
    divides = any(token.text in ("/", "÷") for token in side.tokens)
    return is_implied and divides and "fraction" not in kinds


def _is_variable(token: Token) -> bool:
    """Return whether a word may be a variable, such as the m of "2 m + 3 = 7"."""
    is_letter = token.kind == "word" and len(token.text) == 1 and token.text not in "°¢"
    return is_letter and not token.is_quoted


def _opens_maths(chain: _Chain) -> bool:
    """Return whether the only dollar sign is in front, where it may open LaTeX."""
    signs = [token for side in chain.sides for token in side.tokens if token.text == "$"]
    return len(signs) == 1 and chain.sides[0].tokens[0] is signs[0]


def _is_range(chain: _Chain) -> bool:
    """Return whether the first side may be a range, as in "pages 5-10 = 6 pages"."""
    numbers = [token for token in chain.sides[0].tokens if token.kind == "number"]
    dashes = [token for token in chain.sides[0].tokens if token.text == "-"]
    if (
        len(numbers) != 2
        or len(dashes) != 1
        or not dashes[0].is_attached
        or not numbers[1].is_attached
    ):
        return False
    try:
        is_rising = number_value(numbers[0].text) < number_value(numbers[1].text)
    except (ValueError, ZeroDivisionError):
        return True
    return is_rising and not chain.sides[1].tokens[0].is_attached


def _units(side: Side) -> list[tuple[str, ...]]:
    """Return the units of a side: currency signs, and the words behind its numbers."""
    found: list[tuple[str, ...]] = []
    phrase: list[str] = []
    for token in [*side.tokens, None]:
        if token is not None and token.kind == "word":
            phrase += map(_singular, token.text.lower().split("/"))
            continue
        if phrase:
            found.append(tuple(phrase))
            phrase = []
        if token is not None and token.kind == "currency":
            found.append((token.text,))
    return found


def _singular(word: str) -> str:
    word = re.sub(r"\^\{?[23]\}?$|[²³]$", "", word)
    if word.endswith(("xes", "ches", "shes", "sses")):
        word = word[:-2]
    elif word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith("s") and not word.endswith("ss") and len(word) > 2:
        word = word[:-1]
    return _SAME_UNIT.get(word, word)


def _form(chain: _Chain) -> str:
    """Return the normal form of an equation."""
    parts = ["".join(_spell(side.tokens)) for side in chain.sides]
    signs = ["", *chain.signs]
    form = "".join(sign + part for sign, part in zip(signs, parts, strict=True))
    return _GROUPED_NUMBER.sub(r"\1", form)


def _spell(tokens: Sequence[Token]) -> Iterator[str]:
    kept = [token for token in tokens if token.kind not in ("word", "currency")]
    in_fraction = 0  # 1: behind the sign, 2: behind its first argument
    depth = 0
    for index, token in enumerate(kept):
        if token.kind == "fraction":
            in_fraction, depth = 1, 0
            continue
        yield token.text.replace("÷", "/")
        depth += (token.kind == "open") - (token.kind == "close")
        if in_fraction == 1 and token.kind == "close" and depth == 0:
            in_fraction = 2
            if index + 1 < len(kept):
                yield "/"
