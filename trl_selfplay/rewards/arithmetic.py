r"""Read plain arithmetic in ASCII, Unicode or LaTeX, and compute its exact value.

In: a line of text. Out: its tokens, and the value of a sequence of tokens as a fraction. A small
parser knows numbers, + - * / ^, percent signs, parentheses and `\frac`; text is never evaluated.
All of it takes linear time, and values are bounded.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

_MOST_DEPTH = 50
_MOST_DIGITS = 60
_MOST_TOKENS = 300
_MOST_BITS = 4000
_MOST_EXPONENT = 64

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SIGNS = str.maketrans(
    {
        **{chr(0xFEE0 + code): chr(code) for code in range(ord("!"), ord("~"))},  # full width
        **dict.fromkeys("−‐‑‒–", "-"),
        **dict.fromkeys("×✕✖⋅·∙∗", "*"),
        **dict.fromkeys("∕⁄", "/"),
        **dict.fromkeys("≈≃≅≒", "≈"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u200a\u202f\t\r", " "),
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
    }
)
_POWER = re.compile(r"(?<=[\d)])[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]{1,9}")
# Spellings that are written in another way before the tokens are read.
_SPELLINGS = (
    (re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})"), ","),
    (re.compile(r"\\[dtc]?frac ?(\d) ?(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<=[\d)])( ?)\*\*\1(?=[\d(])"), "^"),
    (re.compile(r"(?<=[A-Za-z])['’′]{1,3}(?=\()"), ""),  # a derivative
    (re.compile(r"(?<=[A-Za-z])['’](?=[a-z]{1,2}\b)"), ""),  # that's
    # Dollar signs around LaTeX, by the rule of pandoc; others are money.
    (re.compile(r"\$\$"), " "),
    (re.compile(r"(?<!\\)\$(?=\S)([^$\n]{1,400})(?<=\S)\$(?!\d)"), r"\\(\1\\)"),
    # Emphasis in Markdown.
    (re.compile(r"\*\*|__"), ""),
    (re.compile(r"(?:^|(?<=[=(,;:>|]))( ?)\*(?=[\d($\\])"), r"\1"),
    (re.compile(r"(?<=[\d)%])\*(?=[.,;:!?)](?!\d)|$| (?! ?[\d($\\]))"), ""),
    # Operators in words, between numbers.
    (re.compile(r"(?<=\d) (?:multiplied by|times) (?=[\d(])", re.IGNORECASE), " * "),
    (re.compile(r"(?<=\d) divided by (?=[\d(])", re.IGNORECASE), " ÷ "),
    (re.compile(r"(?<=\d) plus (?=[\d(])", re.IGNORECASE), " + "),
    (re.compile(r"(?<=\d) minus (?=[\d(])", re.IGNORECASE), " - "),
    (re.compile(r"= ?(?:~|about|approximately|approx\.?|around|roughly|nearly|almost) ?", re.I), "≈ "),
    (re.compile(r"(?<=\d) ?[Rr] ?(?=\d)"), " R "),
    # A rate is a unit, not a quotient.
    (re.compile(r"(?<=\d)/(?=(?:second|sec|minute|min|hour|hr|day|week|month|year|person|item|box|bag|"
                r"mile|km|kg|lb|pound|gallon|liter|litre)\b)"), " per "),
    # A share of something is a product; a remainder by % isn't a percentage.
    (re.compile(r"(%|\d/\d{1,9}|\}) of (?=[$€£¥]? ?[\d(\\])"), r"\1 * "),
    # The times sign in letters.
    (re.compile(r"(?<=[\d)%]) [xX] (?=[$€£¥]?[\d(])|(?<=[\d)])[xX](?=\d)"), " * "),
)  # fmt: skip

_TEXT_COMMAND = r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox)\s?\{(?P<inner>[^{}]{0,80})\}"
_TOKENS = re.compile(
    "|".join(
        (
            r"(?P<space>\s++)",
            r"(?P<link>https?://\S++)",
            _TEXT_COMMAND,
            r"\\(?:begin|end|tag|label)\s?\{[^{}]{0,40}\}",
            r"(?P<command>\\(?:[A-Za-z]++|.))",
            # Times, ratios, versions, addresses and dates aren't numbers.
            r"(?P<date>[0-9]{4}-[0-9][0-9]-[0-9][0-9](?![0-9])|[0-9]{1,4}/[0-9]{1,2}/[0-9]{4}(?![0-9])|[0-9]{4}/[0-9]{1,2}/[0-9]{1,2}(?![0-9])"
            r"|[0-9]++(?::[0-9]++)+|[0-9]++(?:\.[0-9]++){2,})",
            r"(?P<mixed>[0-9]{1,3} [0-9]{1,3}/[0-9]{1,3})(?![0-9/.])",
            r"(?P<grouped>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]++)?(?![0-9,.][0-9])|[0-9]{1,2}(?:,[0-9][0-9]){1,6},[0-9]{3}(?![0-9]))(?![0-9])",
            r"(?P<comma>[0-9]++,[0-9]++)(?!,[0-9])",
            r"(?P<list>[0-9]++(?:,[0-9]++)+)",
            r"(?P<number>[0-9]++(?:\.[0-9]++)?|\.[0-9]++)",
            r"(?P<dots>\.{2,}|…|⋯)",
            r"(?P<relation>[=!:+*/<>%-]?={2,3}|[!:+*/%-]=|//|≡|#[0-9])",
            r"(?P<arrow>=>|[-=]{1,2}>|[→⇒∴∵]|<[-=]{1,2}>?)",
            r"(?P<equals>[=≈])",
            r"(?P<operator>[-+*/÷^])",
            r"(?P<open>[(\[{])",
            r"(?P<close>[)\]}])",
            r"(?P<percent>%)",
            r"(?P<currency>[$€£¥₹])",
            r"(?P<word>[^\W\d_]++(?:/[^\W\d_]++)?(?:\^\{?[23]\}?|[²³])?|[°¢])",
            r"(?P<aside>[&])",
            r"(?P<other>.)",
        )
    ),
    re.DOTALL,
)
_DROPPED = (
    "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle boxed fbox mathbf mathrm "
    "text bf rm , ; : ! ( ) [ ]"
)
_PHRASE_ENDS = (
    "quad qquad implies Rightarrow rightarrow Longrightarrow longrightarrow to iff therefore because "
    "Leftrightarrow newline hline item leq geq le ge lt gt ne neq"
)
_COMMANDS = {
    **dict.fromkeys(("times", "cdot", "ast"), ("operator", "*")),
    "div": ("operator", "÷"),
    **dict.fromkeys(("approx", "simeq", "doteq"), ("equals", "≈")),
    **dict.fromkeys(("frac", "dfrac", "tfrac", "cfrac"), ("fraction", "")),
    **dict.fromkeys(_DROPPED.split(), ("aside", "")),
    " ": ("aside", ""),
    "%": ("percent", "%"),
    "$": ("currency", "$"),
    **dict.fromkeys(("circ", "degree"), ("word", "°")),
    **dict.fromkeys(_PHRASE_ENDS.split(), ("break", "")),
}
# What ends a phrase; `|` is a table's. Other signs, as in "√16" or "3 ⊕ 4", are never skipped.
_STOPS = set(".,;:?!'\"`“”‘’«»„|#<>≤≥≠—―•◦●▪\n")


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a line.

    Attributes:
        kind: number, operator, equals, open, close, percent, currency, fraction, word, break (the
            end of a phrase), or other (what can't stand in plain arithmetic).
        text: Its normal form.
        end: Where it ends in the line.
        is_attached: Whether no white space precedes it.
        is_quoted: Whether it is text inside LaTeX, so that a letter is no variable.
    """

    kind: str
    text: str
    end: int
    is_attached: bool
    is_quoted: bool = False


def normal_line(line: str) -> str:
    """Return a line with one spelling for each sign.

    >>> normal_line("4² ÷ ２ − 5 x 1")
    '4^(2) ÷ 2 - 5 * 1'
    """
    line = _POWER.sub(lambda match: f"^({match[0].translate(_SUPERSCRIPTS)})", line)
    line = line.translate(_SIGNS)
    for pattern, spelling in _SPELLINGS:
        line = pattern.sub(spelling, line)
    return line


def read_tokens(line: str) -> list[Token]:
    """Return the tokens of a line from `normal_line`."""
    tokens: list[Token] = []
    space = True
    behind_command = -1
    for match in _TOKENS.finditer(line):
        group = match.lastgroup or "break"
        if group == "space":
            space = True
            continue
        if group == "inner":
            tokens += _read_inner(match["inner"], match.end(), is_attached=not space)
            space = False
            continue
        if group == "number" and behind_command == match.start():  # 2\times3
            kind, text = group, match[0]
        else:
            kind, text = _classify(group, match[0], line, match.start(), tokens)
        behind_command = match.end() if group == "command" else -1
        if kind != "aside":
            tokens.append(Token(kind, text, match.end(), is_attached=not space))
            space = False
    return tokens


def _read_inner(inner: str, end: int, *, is_attached: bool) -> Iterator[Token]:
    for match in _TOKENS.finditer(inner):
        group = match.lastgroup or "break"
        if group == "number":
            yield Token("number", match[0], end, is_attached)
        elif group == "word":
            yield Token("word", match[0], end, is_attached=False, is_quoted=True)
        elif group == "percent" or match[0] == "\\%":
            yield Token("percent", "%", end, is_attached)
        elif group != "space":
            yield Token("break" if match[0] in _STOPS else "other", match[0], end, is_attached)


def _classify(
    group: str, text: str, line: str, start: int, before: Sequence[Token]
) -> tuple[str, str]:
    """Return kind and normal form of what a group of `_TOKENS` has found."""
    last = before[-1] if before else None
    follower = line[start + len(text) : start + len(text) + 1]
    match group:
        case "mixed" | "grouped" | "comma" | "number":
            if _is_letter(line[start - 1 : start]) or (text[0] == "0" and text[1:2].isdigit()):
                return "other", text  # x_2, 007
            return "number", text.replace(",", "") if group == "grouped" else text
        case "word":
            return _classify_word(text, line, start, follower)
        case "command":
            return _COMMANDS.get(text[1:], ("other", text))
        case "arrow":
            return "break", text
        case "dots":
            # "0.333…" goes on in the same way; "1 + 2 + … + 9" is no plain arithmetic.
            if last and last.kind in ("operator", "equals"):
                return "other", text
            return ("break", "…") if not last or last.kind != "number" else ("dots", "…")
        case "percent":
            following = line[start + 1 : start + 3].lstrip()
            return ("other" if following[:1].isdigit() or following[:1] == "(" else group), text
        case "equals" | "operator" | "open" | "close" | "currency" | "aside":
            return group, {"[": "(", "{": "(", "]": ")", "}": ")"}.get(text, text)
        case "other" if (
            text == ":" and line[start - 1 : start] == " " and last and last.kind == "number"
        ):
            return "other", text  # a ratio, or a division as in 12 : 4
        case "other" if text == "!" and last and last.kind in ("number", "close"):
            following = line[start + 1 : start + 3].lstrip()[:1]
            return ("other" if following and following in "=≈+-*/÷^)" else "break"), text
        case "other":
            is_stop = text in _STOPS or not (
                text.isascii() or text.isalnum() or text in "√∛±∓∑∏∫⊕⊗"
            )
            return ("break" if is_stop else "other"), text
    return ("break" if group == "break" else "other"), text


def _is_letter(character: str) -> bool:
    """Return whether a character can be part of a name; those without case delimit numbers."""
    return character == "_" or character.lower() != character.upper()


def _classify_word(text: str, line: str, start: int, follower: str) -> tuple[str, str]:
    if text.lower() == text.upper() and text not in "°¢":
        return "break", text
    before = line[start - 1 : start]
    is_attached = before.isdigit() or before == ")"
    if follower in ("(", "[", "_", "{") or follower.isdigit():
        return "other", text  # f(2), x2
    if is_attached and len(text) < 2 and text not in "°¢":
        return "other", text  # 2x
    return "word", text


def evaluate(
    tokens: Sequence[Token],
    *,
    percent_is_unit: bool = False,
    dots_group: bool = False,
    slash_binds: bool = False,
) -> Fraction:
    """Return the value of an expression; words and currency signs are skipped.

    Args:
        tokens: The expression.
        percent_is_unit: Read 5% as 5, not as 5/100.
        dots_group: Read 1.500 as 1500.
        slash_binds: Read 6 ÷ 1/2 as 12.

    Raises:
        ValueError: The tokens are no expression, or its value is too large.
        ZeroDivisionError: It divides by zero.
    """
    parts = [token for token in tokens if token.kind not in ("word", "currency", "dots")]
    if len(parts) > _MOST_TOKENS:
        raise ValueError("too long")
    parser = _Parser(parts, percent_is_unit, dots_group, slash_binds)
    value = parser.sum()
    if parser.kind:
        raise ValueError(f"not arithmetic: {parts[parser.position].text!r}")
    return value


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > _MOST_BITS:
        raise ValueError("too large")
    return value


class _Parser:
    """A recursive-descent parser.

    sum = product {± product}; product = ratio {×÷ ratio, or a group beside it}; ratio = signed
    {/ signed}, if a slash binds; signed = {±} power; power = atom [^ power].
    """

    def __init__(
        self, tokens: Sequence[Token], percent_is_unit: bool, dots_group: bool, slash_binds: bool
    ) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.percent_is_unit = percent_is_unit
        self.dots_group = dots_group
        self.slash_binds = slash_binds

    @property
    def kind(self) -> str:
        return self.tokens[self.position].kind if self.position < len(self.tokens) else ""

    def take(self) -> str:
        if not self.kind:
            raise ValueError("an operand is missing")
        self.position += 1
        return self.tokens[self.position - 1].text

    def next_is(self, *operators: str) -> bool:
        return self.kind == "operator" and self.tokens[self.position].text in operators

    def sum(self) -> Fraction:
        value = self.product()
        while self.next_is("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = _bounded(value + sign * self.product())
        return value

    def product(self) -> Fraction:
        value = self.ratio()
        while self.next_is("*", "/", "÷") or self.kind == "open":
            if self.kind == "open" or self.take() == "*":
                value = _bounded(value * self.ratio())
            else:
                value = _bounded(value / self.ratio())
        return value

    def ratio(self) -> Fraction:
        value = self.signed()
        while self.slash_binds and self.next_is("/"):
            self.take()
            value = _bounded(value / self.signed())
        return value

    def signed(self) -> Fraction:
        sign = 1
        while self.next_is("+", "-"):
            sign = sign if self.take() == "+" else -sign
        return sign * self.power()

    def power(self) -> Fraction:
        base = self.atom()
        if not self.next_is("^"):
            return base
        self.take()
        exponent = self.signed_exponent()
        if exponent.denominator != 1 or abs(exponent) > _MOST_EXPONENT:
            raise ValueError("no small integer as exponent")
        if (
            abs(exponent) * (base.numerator.bit_length() + base.denominator.bit_length())
            > _MOST_BITS
        ):
            raise ValueError("too large")
        return base ** int(exponent)

    def signed_exponent(self) -> Fraction:
        sign = -1 if self.next_is("-") and self.take() else 1
        return sign * self.power()

    def atom(self) -> Fraction:
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise ValueError("nested too deep")
        kind = self.kind
        text = self.take()
        if kind == "open":
            value = self.group()
        elif kind == "fraction":
            value = self.fraction()
        elif kind == "number":
            value = number_value(text, dots_group=self.dots_group)
            if self.kind == "fraction" and value.denominator == 1:  # two and a half
                self.take()
                part = self.fraction()
                value = value + part if 0 < part < 1 else value * part
        else:
            raise ValueError(f"not arithmetic: {text!r}")
        if self.kind == "percent":
            self.take()
            value = value if self.percent_is_unit else value / 100
        self.depth -= 1
        return value

    def group(self) -> Fraction:
        value = self.sum()
        if self.kind != "close":
            raise ValueError("a parenthesis is not closed")
        self.take()
        return value

    def fraction(self) -> Fraction:
        numerator, denominator = self.argument(), self.argument()
        return _bounded(numerator / denominator)

    def argument(self) -> Fraction:
        if self.kind == "open":
            self.take()
            return self.group()
        if self.kind != "number":
            raise ValueError("a fraction without numbers")
        return number_value(self.take())


def number_value(text: str, *, dots_group: bool = False) -> Fraction:
    """Return the value of a number token.

    Raises:
        ValueError: It has too many digits.
        ZeroDivisionError: It is mixed, with the denominator 0.

    >>> number_value("2 1/2"), number_value("1.500", dots_group=True)
    (Fraction(5, 2), Fraction(1500, 1))
    """
    if len(text) > _MOST_DIGITS:
        raise ValueError("too many digits")
    whole, _, quotient = text.partition(" ")
    if quotient:
        return int(whole) + Fraction(quotient)
    if dots_group and re.fullmatch(r"\d{1,3}\.\d{3}", text):
        return Fraction(text.replace(".", ""))
    return Fraction(text.replace(",", "."))
