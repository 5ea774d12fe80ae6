r"""Bring an answer in LaTeX or plain text into one spelling, and separate its unit.

In: a text such as `\dfrac12\text{ cm}`, `**$70,000**` or `x <= 1e-5`. Out: LaTeX with few commands, in
which every argument has braces, such as `\frac{1}{2}`, and a unit such as `cm`. Nothing is evaluated
here. Everything takes linear time, given that an answer is short.
"""

import re
from fractions import Fraction

from trl_selfplay.rewards.values import UnreadableError

_MOST_NESTED = 40
_SURROUNDINGS = "* \t\r\n"
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_UNICODE = {
    **dict.fromkeys("−–—‐‑－", "-"),
    **dict.fromkeys("\u00a0\u2007\u2008\u2009\u202f", "\\,"),
    **dict.fromkeys("⋅·∙", "\\cdot "),
    **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{{{digit}}}" for digit in range(10)), strict=True)),
    **dict(zip("₀₁₂₃₄₅₆₇₈₉", (f"_{{{digit}}}" for digit in range(10)), strict=True)),
    **dict(
        zip(
            "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞",
            (
                f"\\frac{{{fraction[0]}}}{{{fraction[1]}}}"
                for fraction in [
                    "12",
                    "13",
                    "23",
                    "14",
                    "34",
                    "15",
                    "25",
                    "35",
                    "45",
                    "16",
                    "56",
                    "18",
                    "38",
                    "58",
                    "78",
                ]
            ),
            strict=True,
        )
    ),
    **dict(
        zip(
            "αβγδεθλμπρστφωΔΣΩ",
            (
                f"\\{name} "
                for name in [
                    "alpha",
                    "beta",
                    "gamma",
                    "delta",
                    "epsilon",
                    "theta",
                    "lambda",
                    "mu",
                    "pi",
                    "rho",
                    "sigma",
                    "tau",
                    "phi",
                    "omega",
                    "Delta",
                    "Sigma",
                    "Omega",
                ]
            ),
            strict=True,
        )
    ),
    "×": "\\times ",
    "÷": "\\div ",
    "√": "\\sqrt ",
    "∞": "\\infty ",
    "≤": "\\le ",
    "≥": "\\ge ",
    "≠": "\\ne ",
    "≈": "\\approx ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "∅": "\\emptyset ",
    "±": "\\pm ",
    "∓": "\\mp ",
    "∠": "\\angle ",
    "°": "\\degree ",
    "º": "\\degree ",
    "…": "\\ldots ",
    "⟨": "\\langle ",
    "⟩": "\\rangle ",
    "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}",
    "’": "'",
    "£": "\\pounds ",
    "€": "\\euro ",
    "¥": "\\yen ",
    "¢": "\\cent ",
    "₹": "\\rupee ",
}
_UNICODE_TABLE = str.maketrans(_UNICODE)
# Commands that change the look alone, and other names of commands.
_SAME = {
    **dict.fromkeys(
        [
            "left",
            "right",
            "big",
            "Big",
            "bigg",
            "Bigg",
            "bigl",
            "bigr",
            "Bigl",
            "Bigr",
            "biggl",
            "biggr",
            "middle",
        ],
        "",
    ),
    **dict.fromkeys(
        [
            "displaystyle",
            "textstyle",
            "scriptstyle",
            "limits",
            "nolimits",
            "rm",
            "bf",
            "it",
            "sf",
            "mathstrut",
        ],
        "",
    ),
    **dict.fromkeys(["dfrac", "tfrac", "cfrac", "sfrac"], "\\frac"),
    **dict.fromkeys(["dbinom", "tbinom"], "\\binom"),
    **dict.fromkeys(["quad", "qquad", "enspace", "thinspace"], " "),
    **dict.fromkeys(["ldots", "dots", "cdots", "dotsc", "dotsb"], "\\ldots "),
    **dict.fromkeys(["leq", "leqslant", "leqq"], "\\le "),
    **dict.fromkeys(["geq", "geqslant", "geqq"], "\\ge "),
    **dict.fromkeys(["lvert", "rvert", "vert"], "|"),
    **dict.fromkeys(["simeq", "thickapprox"], "\\approx "),
    **dict.fromkeys(["varnothing"], "\\emptyset "),
    **dict.fromkeys(["land", "wedge"], " and "),
    **dict.fromkeys(["lor", "vee"], " or "),
    **dict.fromkeys(["colon"], ":"),
    **dict.fromkeys(["backslash", "smallsetminus"], "\\setminus "),
    **dict.fromkeys(
        ["mathbf", "mathit", "mathsf", "mathcal", "boldsymbol", "bm", "ensuremath"], ""
    ),
    **dict.fromkeys(
        ["mathrm", "textbf", "textit", "textrm", "textsf", "textnormal", "mbox", "textup"], "\\text"
    ),
    **dict.fromkeys(["boxed", "fbox"], ""),
    "implies": " and ",
    "lg": "\\log _{10}",
    "bmod": "\\mod ",
    "neq": "\\ne ",
    "lt": "<",
    "gt": ">",
    "ast": "\\cdot ",
    "lbrace": "\\{",
    "rbrace": "\\}",
    "lbrack": "[",
    "rbrack": "]",
    "varphi": "\\phi ",
    "varepsilon": "\\epsilon ",
    "mid": "|",
}
_SYMBOLS = {"%": "%", ",": "\\,", "!": "", ";": " ", ":": " ", ">": " ", " ": " ", "$": "\\dollar "}
_NO_SPACE_BEHIND = ("begin", "end", "operatorname")
_COMMAND = re.compile(r"\\([A-Za-z]+)\s*|\\([^A-Za-z])")
_NO_SPACE = re.compile(r",?\\!\s*")
_DEGREE = re.compile(r"\^\s*(?:\\circ\s*|\{\s*\\circ\s*\})|\\degree\s*")
_PRIME = re.compile(r"\^\s*(?:\\prime|\{\s*\\prime\s*\})")
_TEXT_THAT_IS_NONE = re.compile(
    r"\\text\s*\{\s*([eid]|[-\d.]+)\s*\}|^\\text\s*\{\s*([A-Za-z])\s*\}$"
)
_TEXT_THEN_CONNECTIVE = re.compile(r"\\text\s*\{([^{}]+?),?\s+(and|or)\s*\}")
_CONNECTIVE = re.compile(
    r"\\text\s*\{\s*(?:,|;)?\s*(and|or)\s*\}|,?\s*(?<![A-Za-z\\])(and|or)(?![A-Za-z])"
)
# Thousands: 1,000 1{,}000 1\,000 1,\!000, but not 1, 000 and not (1,000), a pair.
_GROUPED = re.compile(r"(?<![\d.])[1-9]\d{0,2}(?:(?:\{,\}|\\,|,| )\d{3})+(?![\d/])", re.ASCII)
_PLAIN_NAMES = (
    "arcsin|arccos|arctan|sqrt|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|infinity|infty|inf|pi|"
    "theta|alpha|beta"
)
_PLAIN_NAME = re.compile(rf"(?<![\\A-Za-z])({_PLAIN_NAMES})(?![A-Za-z])")
_PERCENT = re.compile(
    r"\s*(?:\\text\s*\{\s*(?:per ?cent|pct)\.?\s*\}|(?<=[\d })])(?:per ?cent|pct)(?![A-Za-z]))"
)
_CURRENCIES = {
    "USD": "dollar",
    "US\\dollar": "dollar",
    "EUR": "euro",
    "GBP": "pounds",
    "JPY": "yen",
    "INR": "rupee",
    "Rs": "rupee",
}
_CURRENCY = re.compile(r"^(-?)\s*(USD|US\\dollar|EUR|GBP|JPY|INR|Rs\.?)\s*(?=-?\.?\d)")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=[\d}}])\s*(\\text\s*\{{)?\s*({'|'.join(_SCALES)})(?![A-Za-z])")
_DEGREES_INSIDE = re.compile(r"(\d+(?:\.\d+)?)\s*\\degree(?![A-Za-z])\s*")
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![\d.A-Za-z])", re.ASCII)
_TIMES_TEN = re.compile(r"(\d)\s*[xX]\s*(?=10\s*\^)")
_POWER = re.compile(r"([\^_])\s*(-?\d+(?:\.\d+)?)", re.ASCII)
_MIXED_PLAIN = re.compile(r"(?<![\d./^_{])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", re.ASCII)
_MIXED = re.compile(r"(?<![\d./^_{}])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", re.ASCII)
_REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\((\d+)\)|(\d+)\s*(?:\\ldots|\.\.\.)\s*)",
    re.ASCII,
)
_REPEATED = re.compile(r"(\d*?)(\d{1,6}?)\2{2,}(\d*)", re.ASCII)
_ARGUMENTS = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "\\text": 1, "^": 1, "_": 1}
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)


def clean(text: str) -> str:
    r"""Return an answer in one spelling.

    Raises:
        UnreadableError: It has unbalanced braces, is nested deeply or holds foreign characters.

    >>> clean("**$x \\leq \\dfrac12$**.")
    'x \\le \\frac{1}{2}'
    """
    text = _without_delimiters(" ".join(text.translate(_UNICODE_TABLE).split()))
    if not text.isascii() or not text.isprintable():
        raise UnreadableError("foreign characters")
    text = _PRIME.sub("'", _DEGREE.sub(r"\\degree ", text))
    text = _COMMAND.sub(_rename, _NO_SPACE.sub(_close_up, text))
    text = _TEXT_THAT_IS_NONE.sub(r"\1\2", text)
    text = _PERCENT.sub("%", text)
    text = _CURRENCY.sub(lambda found: f"{found[1]}\\{_CURRENCIES[found[2].rstrip('.')]} ", text)
    text = _SCALE.sub(lambda match: f"\\cdot 10^{{{_SCALES[match[2]]}}}{match[1] or ' '}", text)
    if _ANGLE_FUNCTION.search(text):
        text = _DEGREES_INSIDE.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = _TEXT_THEN_CONNECTIVE.sub(r"\\text{\1} \2 ", text)
    text = _CONNECTIVE.sub(lambda match: f" {match[1] or match[2]} ", text)
    text = _plain_to_latex(text)
    text = _GROUPED.sub(_close_group, text)
    text = text.replace("{,}", ",").replace("\\,", " ").replace("~", " ")
    text = brace_arguments(text)
    text = _MIXED_PLAIN.sub(r"(\1+\\frac{\2}{\3})", text)
    text = _MIXED.sub(r"(\1+\\frac{\2}{\3})", text)
    return " ".join(text.split())


def _without_delimiters(text: str) -> str:
    """Remove the delimiters of mathematics and of bold text, and a final period."""
    before = None
    while text != before:
        before = text
        text = text.strip(_SURROUNDINGS)
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip(_SURROUNDINGS)
        for opening, closing in _DELIMITERS:
            if (
                len(text) >= len(opening + closing)
                and text.startswith(opening)
                and text.endswith(closing)
            ):
                inside = text[len(opening) : -len(closing)]
                if opening not in inside and closing not in inside and not inside.endswith("\\"):
                    text = inside
        if text.startswith("\\boxed{") and text.endswith("}"):
            text = text[len("\\boxed{") : -1]
    text = text.replace("\\$", "\\dollar ")
    for mark in ("$$", "\\(", "\\)", "\\[", "\\]"):
        text = text.replace(mark, " ")
    # An odd number of dollar signs: money.
    return text.replace("$", " " if text.count("$") % 2 == 0 else "\\dollar ")


def _rename(match: re.Match[str]) -> str:
    name, symbol = match[1], match[2]
    if name is None:
        return _SYMBOLS.get(symbol, match[0])
    return _SAME.get(name, f"\\{name}" if name in _NO_SPACE_BEHIND else f"\\{name} ")


def _close_group(match: re.Match[str]) -> str:
    """Write 1,000 as 1000, except within brackets, where commas separate."""
    before = match.string[: match.start()]
    is_inside = any(
        before.count(opening) > before.count(closing) for opening, closing in ("()", "[]")
    )
    return (
        match[0]
        if is_inside or before.count("\\{") > before.count("\\}")
        else re.sub(r"\D", "", match[0])
    )


def _close_up(match: re.Match[str]) -> str:
    return "," if match[0].startswith(",") else ""


def _plain_to_latex(text: str) -> str:
    """Write in LaTeX what models write without it: sqrt(2), 2*x**2, 1e-5, <=, x^10."""
    text = (
        text.replace("**", "^").replace("<=", "\\le ").replace(">=", "\\ge ").replace("!=", "\\ne ")
    )
    text = text.replace("*", "\\cdot ")
    text = _PLAIN_NAME.sub(
        lambda match: f"\\{'infty' if match[1][:3] == 'inf' else match[1]} ", text
    )
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = _TIMES_TEN.sub(r"\1\\times ", text)
    text = _POWER.sub(r"\1{\2}", text)
    return _REPEATING.sub(_as_fraction, text)


def _as_fraction(match: re.Match[str]) -> str:
    r"""Write a repeating decimal as a fraction: 0.\overline{3}, 0.(3), and 0.333... if it repeats."""
    whole, fixed, repeating = match[1], match[2], match[3] or match[4]
    if repeating is None:
        found = _REPEATED.fullmatch(match[5] if not fixed else fixed + match[5])
        if found is None or not found[2].startswith(found[3]):
            return f"{whole}.{fixed}{match[5]}"
        fixed, repeating = found[1], found[2]
    scale = 10 ** len(fixed)
    value = Fraction(int((whole + fixed) or "0"), scale) + Fraction(
        int(repeating), scale * (10 ** len(repeating) - 1)
    )
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def brace_arguments(text: str) -> str:
    r"""Put braces around every argument: `\frac12` becomes `\frac{1}{2}`, and `\sqrt(2)` `\sqrt{2}`."""
    tokens = _TOKEN.findall(text)
    parts: list[str] = []
    position = 0
    while position < len(tokens):
        part, position = _read_group(tokens, position, 0)
        parts.append(part)
    return "".join(parts)


def _read_group(tokens: list[str], position: int, depth: int) -> tuple[str, int]:
    """Return the text of a token with its arguments, or of a group in braces, and what follows it."""
    if depth > _MOST_NESTED:
        raise UnreadableError("nested deeply")
    token = tokens[position]
    position += 1
    if token == "}":
        raise UnreadableError("unbalanced braces")
    if token == "{":
        parts = ["{"]
        while position < len(tokens) and tokens[position] != "}":
            part, position = _read_group(tokens, position, depth + 1)
            parts.append(part)
        if position == len(tokens):
            raise UnreadableError("unbalanced braces")
        return "".join(parts) + "}", position + 1
    written = token
    position = _skip_spaces(tokens, position) if token in _ARGUMENTS else position
    if token == "\\sqrt" and position < len(tokens) and tokens[position] == "[":
        end = position
        while end < len(tokens) and tokens[end] != "]":
            end += 1
        written += "".join(tokens[position : end + 1])
        position = end + 1
    for _ in range(_ARGUMENTS.get(token, 0)):
        position = _skip_spaces(tokens, position)
        if position == len(tokens):
            raise UnreadableError("a missing argument")
        if tokens[position] == "(" and token in ("\\sqrt", "^"):
            argument, position = _read_parentheses(tokens, position, depth + 1)
        else:
            argument, position = _read_group(tokens, position, depth + 1)
        written += argument if argument.startswith("{") else f"{{{argument}}}"
    return written, position


def _read_parentheses(tokens: list[str], position: int, depth: int) -> tuple[str, int]:
    parts: list[str] = []
    opened = 0
    while position < len(tokens):
        token = tokens[position]
        opened += (token == "(") - (token == ")")
        part, position = _read_group(tokens, position, depth)
        parts.append(part)
        if opened == 0:
            return f"{{{''.join(parts[1:-1])}}}", position
    raise UnreadableError("unbalanced parentheses")


def _skip_spaces(tokens: list[str], position: int) -> int:
    while position < len(tokens) and tokens[position].isspace():
        position += 1
    return position
