r"""Read the objects that answers describe.

In: the text of an answer. Out: a number, expression, list, set, tuple, interval, matrix, equation or
word of `values.py`. The structure is read here; single expressions are read by
latex2sympy2_extended, the parser of math-verify, and aren't evaluated.
"""

import re
from fractions import Fraction
from typing import Any

from trl_selfplay.rewards.equality import same
from trl_selfplay.rewards.latex import clean
from trl_selfplay.rewards.units import split_unit
from trl_selfplay.rewards.values import (
    Based,
    Formula,
    Matrix,
    Named,
    Number,
    Ordered,
    Region,
    Relation,
    Several,
    UnreadableError,
    Words,
    as_sympy,
    intervals_of,
    symbols_of,
)

_MOST_NESTED = 20
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|.", re.DOTALL)
_OPENING = {"{", "(", "[", "\\{", "\\langle", "\\begin", "\\lfloor", "\\lceil"}
_CLOSING = {"}", ")", "]", "\\}", "\\rangle", "\\end", "\\rfloor", "\\rceil"}
_SEPARATORS = {",", ";", "and", "or"}
_LESS = {"<": "<", "\\le": "<="}
_GREATER = {">": "<", "\\ge": "<="}
_RELATIONS = {"=", "\\approx", "\\ne", "\\in", *_LESS, *_GREATER}
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|Delta|angle|triangle"
)
_ONE_NAME = rf"(?:[A-Za-z]+|\\(?:{_GREEK})\s*[A-Z]*)(?:\s*_\{{[^{{}}]*\}})?(?:\^\{{-1\}})?'*"
_NAME = re.compile(
    rf"\\text\{{[^{{}}]*\}}|\\frac\{{d\s*[a-z]\}}\{{d\s*[a-z]\}}|m?\s*\\angle\s*[A-Z]+|\\overline\{{[A-Z]+\}}|\|[A-Z]{{2}}\|"
    rf"|{_ONE_NAME}(?:\([-+A-Za-z0-9, ]*\))?|[A-Za-z](?:\s*[-+]\s*[A-Za-z])+"
)
_VARIABLE = re.compile(rf"(?:[A-Za-z]|\\(?:{_GREEK}))(?:\s*_\{{[^{{}}]*\}})?")
_SHORT_NAME = re.compile(r"[A-Za-z]{2,3}")
# A name, a numeral, a choice, a vector or a product.
_CAPITALS = re.compile(
    r"(?:\\(?:angle|triangle|overline|overrightarrow|vec|widehat|hat)\s*)?"
    r"(\{\s*)?[A-Z](?:\s*[A-Z])+(?(1)\s*\})"
)
_CONSTANTS = {"e", "i", "\\pi"}
_WORDS = re.compile(r"(?:[A-Za-z]?[a-z'-]+|[A-Z]+)(?: (?:[A-Za-z]?[a-z'-]+|[A-Z]+)){0,4}")
_SHORT_WORDS = {"no", "on", "up", "am", "pm"}  # which are no products
# The parser takes several times as long if there are braces.
_SHORT_SCRIPT = re.compile(r"([\^_])\{([A-Za-z]|\d+)\}")
_NUMBER = re.compile(
    r"([-+]?)\s*(\d+(?:\.(\d*))?|\.(\d+))(?:\s*\\(?:times|cdot)\s*10\^\{([-+]?\d{1,3})\})?",
    re.ASCII,
)
_QUOTIENT = re.compile(
    r"([-+]?)\s*(?:\\frac\{\s*([-+]?\d+)\s*\}\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+)|\((\d+)\+\\frac\{(\d+)\}\{(\d+)\}\))",
    re.ASCII,
)
_BASED = re.compile(r"([0-9A-F]+)\s*_\{\s*(?:\\text\{)?\s*([a-z]+|\d+)\s*\}?\s*\}")
_BASES = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_MATRIX = re.compile(
    r"\\begin\{([pbv]?)(?:small)?(matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1(?:small)?\2\}"
)
_ANY_REAL = re.compile(r"[a-z](?:\s*\\in\s*\\mathbb\s*\{R\})?")
_LITERAL_SET = re.compile(r"\\mathbb\s*\{([A-Z])\}|\\emptyset|\\\{\s*\\\}")
# What a question asks for: a result that still has it is no result.
_TASK = re.compile(r"\\(?:int|sum|prod|lim|gcd|max|min|mod|det|operatorname|begin)(?![A-Za-z])")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_UNREADABLE = re.compile(
    r"%|\d\s+[.\d]|['\"@#?`\\]$|['\"@#?`]|\\(?:ldots|text|pm|mp|dollar|pounds|euro|yen|rupee|cent|degree)\b"
    r"|\^\{?\s*(?:T|\\top)\b|(?<![\\A-Za-z])(?![a-z]?matrix\}|lcm|rank)[A-Za-z]{4,}"
)


def read(text: str, expected_unit: str | None = None, *, any_words: bool = True) -> Any:
    """Return the object that an answer describes.

    Args:
        text: The answer, as extracted.
        expected_unit: As for `split_unit`.
        any_words: As for `split_unit`.

    Raises:
        UnreadableError: It describes none.
        ImportError: math-verify is not installed.
    """
    return _Reader(expected_unit, any_words).read(clean(text), 0)


class _Reader:
    def __init__(self, expected_unit: str | None, any_words: bool) -> None:
        self._expected_unit = expected_unit
        self._any_words = any_words

    def read(self, text: str, depth: int) -> Any:
        if depth > _MOST_NESTED:
            raise UnreadableError("nested deeply")
        text = text.strip()
        if not text:
            raise UnreadableError("empty")
        if text.startswith("\\text{") and text.endswith("}") and "}" not in text[6:-1]:
            return _words(text[6:-1])
        if _WORDS.fullmatch(text) and any(
            len(word) > 2 or word.lower() in _SHORT_WORDS for word in text.split()
        ):
            return _words(text)
        if _CAPITALS.fullmatch(text):
            return Words(_squeeze(text).casefold())
        parts, signs = _split(text, _SEPARATORS)
        if len(parts) > 1:
            return self._several(parts, signs, depth)
        parts, signs = _split(text, _RELATIONS)
        if len(parts) > 1:
            return self._relation(parts, signs, depth)
        parts, signs = _split(text, {"\\cup"})
        if len(parts) > 1:
            return _union([self.read(part, depth + 1) for part in parts])
        parts, signs = _split(text, {"\\cap"})
        if len(parts) > 1:
            return _intersection([self.read(part, depth + 1) for part in parts])
        parts, signs = _split(text, {"\\setminus"})
        if len(parts) == 2:
            return _without(*(self.read(part, depth + 1) for part in parts))
        if match := _LITERAL_SET.fullmatch(text):
            if match[1] is None:
                return Several(())
            return _reals() if match[1] == "R" else Words(text)
        if (inside := _inside_of(text)) is not None:
            return self._brackets(*inside, depth)
        if match := _MATRIX.fullmatch(text):
            rows = [row for row in match[3].split("\\\\") if row.strip()]
            value = Matrix(
                tuple(tuple(self.read(cell, depth + 1) for cell in row.split("&")) for row in rows)
            )
            if match[1] != "v":
                return value
        parts, signs = _split(text, {":"})
        if len(parts) > 1:
            return Ordered("::", tuple(self.read(part, depth + 1) for part in parts))
        if len(signs := _PLUS_MINUS.findall(text)) == 1:
            both = (_PLUS_MINUS.sub(sign, text) for sign in "+-")
            return Several(tuple(self.read(part.removeprefix("+"), depth + 1) for part in both))
        if match := _BASED.fullmatch(text):
            return Based(match[1].lstrip("0") or "0", _BASES.get(match[2], match[2]))
        return self._single(text)

    def _single(self, text: str) -> Number | Formula | Matrix:
        text, unit = split_unit(text, self._expected_unit, any_words=self._any_words)
        hundredths = text.endswith("%")
        text = text.removesuffix("%").strip()
        while (inside := _inside_of(text)) is not None and inside[0] in ("{}", "()"):
            if number := _number(text):  # a mixed number
                break
            text = inside[1].strip()
        number = _number(text)
        if number is None:
            formula = _formula(text)
            if isinstance(formula, Matrix):
                return formula
            value = formula / 100 if hundredths else formula
            return Formula(value, unit, _TASK.search(text) is not None)
        exact, places = number
        if hundredths:
            exact, places = exact / 100, None if places is None else places + 2
        return Number(exact, places, unit)

    def _several(self, parts: list[str], signs: list[str], depth: int) -> Any:
        items: list[Any] = []
        for part in parts:
            if part.strip():
                item = self.read(part, depth + 1)
                items += item.items if isinstance(item, Several) else [item]
        if not items:
            raise UnreadableError("empty")
        names = {item.name for item in items if isinstance(item, Region)}
        if len(names) == 1:
            return _combine(items, "or" in signs)
        return items[0] if len(items) == 1 else Several(tuple(items))

    def _relation(self, parts: list[str], signs: list[str], depth: int) -> Any:
        parts = [part.strip() for part in parts]
        if not parts[0] and signs[0] in ("=", "\\approx"):  # "= 5"
            parts, signs = parts[1:], signs[1:]
        if any(not part for part in parts):
            raise UnreadableError("a relation without a side")
        if set(signs) <= {"=", "\\approx"}:
            return self._equation(parts, signs, depth)
        if signs == ["\\in"] and _is_name(parts[0]):
            value = self.read(parts[1], depth + 1)
            regions = intervals_of(value)
            return Named(parts[0], value) if regions is None else Region(parts[0], regions)
        if signs == ["\\ne"]:
            left, right = (self._expression(part) for part in parts)
            if _VARIABLE.fullmatch(parts[0]) and not symbols_of(right):
                value = self.read(parts[1], depth + 1)
                return Region(parts[0], (_below(value, ")"), _above(value, "(")))
            return Relation("!=", left - right)
        for table in (_LESS, _GREATER):
            if set(signs) <= table.keys():
                ends = parts if table is _LESS else parts[::-1]
                order = [table[sign] for sign in (signs if table is _LESS else signs[::-1])]
                return self._inequality(ends, order, depth)
        raise UnreadableError("a mixed chain")

    def _equation(self, parts: list[str], signs: list[str], depth: int) -> Any:
        if len(parts) == 2 and _VARIABLE.fullmatch(parts[1]) and not _is_name(parts[0]):
            parts = parts[::-1]  # 3 = x
        name = parts[0] if signs and _is_name(parts[0]) else None
        if name is not None:
            parts, signs = parts[1:], signs[1:]
        if "\\approx" in signs:  # what is exact counts
            parts = parts[: signs.index("\\approx") + 1]
        values = [
            self._single(part) if _CAPITALS.fullmatch(part) else self.read(part, depth + 1)
            for part in parts
        ]
        numbers = [v for v in values if not isinstance(v, Formula) or not symbols_of(v.value)]
        if len(values) > 1 and (name is not None or len(numbers) == len(values)):
            # 2 + 3 = 5 is 5, and 2 + 3 = 6 is nothing.
            if not all(same(numbers[0], other) for other in numbers[1:]):
                raise UnreadableError("a false equation")
            values = values[-1:]
        if len(values) == 1:
            value = values[0]
            if name is None:
                return value
            if (pair := _inside_of(name)) is not None and isinstance(value, Ordered):
                names = [part.strip() for part in pair[1].split(",")]
                if len(names) == len(value.items):
                    named = zip(names, value.items, strict=True)
                    return Named(_squeeze(name), Several(tuple(Named(n, v) for n, v in named)))
            return Named(_squeeze(name), value, self._variable(name, value))
        if len(parts) == 2:
            left, right = (self._expression(part) for part in parts)
            return Relation("=", left - right)
        raise UnreadableError("a chain of equations")

    def _variable(self, name: str, value: Any) -> Any:
        """Return the symbol of `y` in `y = 2x`, and None in `y = 2`."""
        is_short = _VARIABLE.fullmatch(name) or _SHORT_NAME.fullmatch(name)
        if is_short and isinstance(value, Formula) and symbols_of(value.value):
            return self._expression(name)
        return None

    def _inequality(self, ends: list[str], order: list[str], depth: int) -> Any:
        """Read a chain of `<` and `<=`."""
        variable = [index for index, end in enumerate(ends) if _VARIABLE.fullmatch(end)]
        variable = [index for index in variable if ends[index] not in _CONSTANTS]
        if len(variable) == 1:
            at = variable[0]
            values = [None if i == at else self.read(end, depth + 1) for i, end in enumerate(ends)]
            others = [value for value in values if value is not None]
            if all(
                isinstance(v, Number) or (isinstance(v, Formula) and not symbols_of(v.value))
                for v in others
            ):
                name = ends[at]
                left = "(" if at > 0 and order[at - 1] == "<" else "["
                right = ")" if at < len(order) and order[at] == "<" else "]"
                if at == 0 and len(ends) == 2:
                    return Region(name, (_below(values[1], right),))
                if at == 1 and len(ends) == 2:
                    return Region(name, (_above(values[0], left),))
                if at == 1 and len(ends) == 3:
                    return Region(name, (Ordered(left + right, (values[0], values[2])),))
        if len(ends) == 2:
            left_side, right_side = (self._expression(end) for end in ends)
            return Relation(order[0], left_side - right_side)
        raise UnreadableError("a chain of inequalities")

    def _brackets(self, brackets: str, inside: str, depth: int) -> Any:
        if brackets == "\\{\\}":
            for bar in ("|", ":"):
                parts, _ = _split(inside, {bar})
                if len(parts) == 2:  # all x with a property
                    if not _ANY_REAL.fullmatch(parts[0].strip()):
                        raise UnreadableError("a set of other things than real numbers")
                    value = self.read(parts[1], depth + 1)
                    if isinstance(value, Region):
                        return Region(None, value.intervals)
                    raise UnreadableError("a set with a condition")
            value = self.read(inside, depth + 1)
            return value if isinstance(value, Several) else Several((value,))
        parts, signs = _split(inside, {",", ";"})
        if len(parts) == 1:
            if brackets in ("()", "{}", "[]"):
                return self.read(inside, depth + 1)
            raise UnreadableError("a single element")
        if brackets == "{}" or set(signs) & {"and", "or"}:
            return self._several(parts, signs, depth)
        return Ordered(brackets, tuple(self.read(part, depth + 1) for part in parts))

    def _expression(self, text: str) -> Any:
        """Return one side of a relation as an expression of sympy."""
        value = self._single(text)
        if isinstance(value, Matrix):
            raise UnreadableError("a relation between matrices")
        return as_sympy(value)


def _formula(text: str) -> Any:
    """Parse one expression; return it as sympy reads it, without evaluating it."""
    if _UNREADABLE.search(text):
        raise UnreadableError("no mathematics")
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy.core.function import AppliedUndef

    try:
        value = latex2sympy(
            _SHORT_SCRIPT.sub(r"\1\2 ", text),
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception as error:  # parsers may fail in any way
        raise UnreadableError("no mathematics") from error
    if isinstance(value, (sympy.MatrixBase, sympy.MatrixExpr)):
        value = sympy.Matrix(value.doit())
        rows = value.tolist()
        return Matrix(tuple(tuple(_element(cell) for cell in row) for row in rows))
    if not isinstance(value, sympy.Expr):
        raise UnreadableError("no expression")
    if value.has(sympy.Derivative):  # sympy takes y for constant in dy/dx
        raise UnreadableError("a derivative")
    if value.has(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Mod):
        value = value.doit()
    value = value.xreplace({u: u.args[0] for u in value.atoms(sympy.UnevaluatedExpr)})
    value = value.xreplace({f: sympy.Symbol(str(f), real=True) for f in value.atoms(AppliedUndef)})
    if value.has(sympy.zoo, sympy.nan):
        raise UnreadableError("undefined")
    return value


def _element(value: Any) -> Number | Formula:
    if value.is_Rational:
        return Number(Fraction(int(value.p), int(value.q)))
    return Formula(value)


def _number(text: str) -> tuple[Fraction, int | None] | None:
    """Return the value and the decimal places of a plain number, fraction or mixed number."""
    if match := _NUMBER.fullmatch(text):
        decimals = match[3] if match[4] is None else match[4]
        value = Fraction(match[2].rstrip(".") if match[4] is None else f"0{match[2]}")
        exponent = int(match[5] or 0)
        value *= Fraction(10) ** exponent * (-1 if match[1] == "-" else 1)
        return value, len(decimals) - exponent if decimals else None
    if match := _QUOTIENT.fullmatch(text):
        whole = Fraction(int(match[6] or 0))
        above, below = match[2] or match[4] or match[7], match[3] or match[5] or match[8]
        if int(below) == 0:
            raise UnreadableError("undefined")
        value = whole + Fraction(int(above), int(below))
        return (-value if match[1] == "-" else value), None
    return None


def _words(text: str) -> Any:
    text = " ".join(text.split()).strip(".")
    if not text:
        raise UnreadableError("empty")
    if letter := re.fullmatch(r"\(?([A-Za-z])\)?", text):
        return Formula(_formula(letter[1]))
    return Words(text.casefold())


def _split(text: str, signs: set[str]) -> tuple[list[str], list[str]]:
    """Split a text at signs that are in no brackets; return its parts and the signs."""
    parts, found, depth = [""], [], 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0 and token in signs:
            parts.append("")
            found.append(token)
        else:
            parts[-1] += token
    return parts, found


def _inside_of(text: str) -> tuple[str, str] | None:
    """Return the brackets around all of a text, and what is in them; None if there are none."""
    tokens = _TOKEN.findall(text)
    if len(tokens) < 2 or tokens[0] not in _OPENING or tokens[0] == "\\begin":
        return None
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            is_all = (
                index == len(tokens) - 1 and not token.startswith(("\\r", "\\e"))
            ) or token == "\\rangle"
            return (
                (tokens[0] + token, "".join(tokens[1:-1]))
                if is_all and index == len(tokens) - 1
                else None
            )
    return None


def _squeeze(name: str) -> str:
    return name.replace(" ", "")


def _is_name(text: str) -> bool:
    if text in _CONSTANTS:
        return False
    inside = _inside_of(text)
    if inside is not None and inside[0] == "()":
        return all(_VARIABLE.fullmatch(part.strip()) for part in inside[1].split(","))
    return _NAME.fullmatch(text) is not None


def _below(value: Any, bracket: str) -> Ordered:
    return Ordered("(" + bracket, (_infinity(-1), value))


def _above(value: Any, bracket: str) -> Ordered:
    return Ordered(bracket + ")", (value, _infinity(1)))


def _infinity(sign: int) -> Formula:
    import sympy

    return Formula(sign * sympy.oo)


def _union(values: list[Any]) -> Any:
    if all(isinstance(value, Several) for value in values):
        return Several(tuple(item for value in values for item in value.items))
    intervals: list[Ordered] = []
    for value in values:
        regions = intervals_of(value)
        if regions is None:
            raise UnreadableError("a union of other things than intervals")
        intervals += regions
    return Region(None, tuple(sorted(intervals, key=_start)))


def _intersection(values: list[Any]) -> Region:
    regions = [intervals_of(value) for value in values]
    if any(region is None for region in regions):
        raise UnreadableError("an intersection of other things than intervals")
    common = regions[0] or ()
    for region in regions[1:]:
        pairs = [(one, other) for one in common for other in region or ()]
        ends = [
            (
                max(pair, key=lambda i: (_start(i), i.brackets[0] == "(")),
                min(pair, key=lambda i: (_end(i), i.brackets[1] == "]")),
            )
            for pair in pairs
        ]
        common = tuple(
            Ordered(first.brackets[0] + last.brackets[1], (first.items[0], last.items[1]))
            for first, last in ends
            if _start(first) < _end(last)
        )
    if not common:
        raise UnreadableError("an empty intersection")
    return Region(None, tuple(sorted(common, key=_start)))


def _reals() -> Ordered:
    return Ordered("()", (_infinity(-1), _infinity(1)))


def _without(whole: Any, left_out: Any) -> Region:
    """Return the real numbers without some."""
    numbers = left_out.items if isinstance(left_out, Several) else (left_out,)
    if whole != _reals() or not all(isinstance(number, Number) for number in numbers):
        raise UnreadableError("a difference of sets")
    ends = sorted(numbers, key=lambda number: number.value)
    starts = [_infinity(-1), *ends]
    pairs = zip(starts, [*ends, _infinity(1)], strict=True)
    return Region(None, tuple(Ordered("()", pair) for pair in pairs))


def _start(interval: Ordered) -> float:
    return float(as_sympy(interval.items[0]))


def _end(interval: Ordered) -> float:
    return float(as_sympy(interval.items[1]))


def _combine(items: list[Any], is_union: bool) -> Region:
    """Combine inequalities that are joined by "and", "or" or a comma."""
    regions = [item for item in items if isinstance(item, Region)]
    names = {region.name for region in regions}
    if len(regions) != len(items):
        raise UnreadableError("inequalities beside other things")
    if is_union:
        return Region(names.pop(), _union(regions).intervals)
    return Region(names.pop(), _intersection(regions).intervals)
