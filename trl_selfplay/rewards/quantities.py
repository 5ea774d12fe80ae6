r"""Read short answers as exact numbers with a unit.

In: an answer in plain text or simple LaTeX, such as `**$1,000.50**`, `x = \frac{1}{2}` or
`5 sq. cm`. Out: a `Quantity`, or None if the text is anything else. Nothing is evaluated.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

# Longer digit strings are compared as text: no answer needs them, and large integers are slow.
_MOST_DIGITS = 60
_MOST_CHARACTERS = 200
_MOST_UNIT_WORDS = 6
_MOST_LAYERS = 6
# Decimals agree with a number that has none of finite length if they have as many right digits.
_SIGNIFICANT_DIGITS = 6

_PLAIN = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width forms
        **dict.fromkeys("−–‐‑﹣－", "-"),
        **dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u2060\ufeff✅✔✓☑🎉👍\ufe0f", ""),
        **dict.fromkeys("‘’", "'"),
        **dict.fromkeys("“”", '"'),
        "²": "^2",
        "³": "^3",
        "×": "*",
        "·": "*",
        "⋅": "*",
        "°": " degree ",
        "½": " 1/2",
        "¼": " 1/4",
        "¾": " 3/4",
        "⅓": " 1/3",
        "⅔": " 2/3",
    }
)
# A quoted line of Markdown, but not an inequality.
_QUOTE = re.compile(r"^(?:>\s+)+(?![-\d$\\])")
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mbox|boxed|fbox|underline|emph|rm|bf)\s?"
    r"\{([^{}]*)\}"
)
_LATEX = (
    (re.compile(r"\\(?:left|right|displaystyle|!)(?![A-Za-z])"), ""),
    (re.compile(r"\\[,;: ]|~|\\quad(?![A-Za-z])"), " "),
    (re.compile(r"\bper cent\b"), "percent"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\^\{?\\circ\}?|\\degree(?![A-Za-z])"), " degree "),
    (re.compile(r"\\[dtc]?frac\s?\{(-?\d{1,30})\}\s?\{(\d{1,30})\}", re.ASCII), r" \1/\2 "),
    (re.compile(r"\\[dtc]?frac\s?(\d)\s?(\d)(?!\d)", re.ASCII), r" \1/\2 "),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\^\{([-+]?\d{1,3})\}", re.ASCII), r"^\1"),
    (re.compile(r"\\([%$#&])"), r"\1"),
    (re.compile(r"\\(?:euro|EUR)(?![A-Za-z])"), "€"),
    (re.compile(r"\\pounds?(?![A-Za-z])"), "£"),
)
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "₩": "won"}
_PREFIX = re.compile(r"(?:US|A|C|AU|CA)?([$€£¥₹₩])|(USD|EUR|GBP|JPY|INR|Rs\.?)(?=\s?[\d.-])\s?")
_SIGN = re.compile(r"([-+])\s?|(?:minus|negative)\s", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?P<whole>\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?![\d/])|\d+)?(?:(?P<point>\.)(?P<decimals>\d*))?",
    re.ASCII,
)
_FRACTION = re.compile(r"\s?/\s?(\d{1,60})(?![\d.])", re.ASCII)
_MIXED = re.compile(r"(?:\s|\s?(?:and|&|\+)\s|-)(\d{1,9})\s?/\s?(\d{1,9})(?![\d.])", re.ASCII)
_POWER = re.compile(
    r"(?:\s?[*x]\s?10\s?(?:\^|\*\*)\s?\(?([-+]?\d{1,3})\)?|[eE]([-+]?\d{1,3}))(?![\d.])", re.ASCII
)
_SCALE = re.compile(
    r"\s?(hundred|thousand|million|billion|trillion|mln|bn|(?-i:k))(?![A-Za-z])", re.IGNORECASE
)
_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORD_VALUES = {word: value for value, word in enumerate(_ONES.split())}
_WORD_VALUES |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
NUMBER_WORDS = re.compile(
    rf"(?<![\w-])(?:{'|'.join(_WORD_VALUES)})(?:(?:[\s-]|\sand\s)(?:{'|'.join(_WORD_VALUES)}|hundred|thousand)){{0,8}}(?![\w-])"
    r"|(?:hundred|thousand)(?!\w)",
    re.IGNORECASE,
)
_SCALES = {
    "hundred": 2,
    "thousand": 3,
    "k": 3,
    "million": 6,
    "mln": 6,
    "billion": 9,
    "bn": 9,
    "trillion": 12,
}
# What stands before a number and an equals sign: a variable or a few words.
_NAMED = re.compile(
    r"(?:[A-Za-z][A-Za-z' ]{0,40}|[A-Za-z](?:_\{?\w{1,8}\}?|\([A-Za-z0-9]\)))\s?[=≈]\s?"
)
# A calculation before its result.
_CALCULATION = re.compile(r"[$(-]?\d[\d\s.,+*/()x÷$%=-]{0,80}=\s?(?=[^=]+$)", re.ASCII)
_ABOUT = re.compile(
    r"(?:(?:approximately|approx\.?|about|around|roughly|exactly|equal to|a total of|only|just|is|≈|=|~"
    r"|\\approx|a|an|the)(?![A-Za-z])\s?)+",
    re.IGNORECASE,
)
_UNIT = re.compile(r"[A-Za-zµ%$€£¥₹'’]+\.?(?:\^-?\d)?|/")
_ONLY_UNITS = re.compile(r"(?:[A-Za-zµ%$€£¥₹'’./() -]|\^-?\d)*")
# A number before one of these words is not all of the answer.
_OTHER_WORDS = """is are was were be or and not but because if to than then minus plus times divided
    over versus vs from since so either neither nor maybe perhaps possibly unless except isn't aren't"""
_NO_UNIT = frozenset(_OTHER_WORDS.split())
# As a last word these say what is done to a number, or that it isn't the answer.
_ALTERED = """doubled tripled halved squared cubed unknown wrong incorrect false undefined tenth tenths
    hundredths thousandths half halves thirds quarters factorial choose mod modulo remainder lakh crore
    off short inverted negated reversed"""
_CHANGES = frozenset(_ALTERED.split())
# Words that say nothing about the kind of thing.
_FILLERS = """of in the a an unit units total altogether left remaining each more all only about exactly
    there here now overall combined respectively long tall wide he she it they has have had"""
_EMPTY = frozenset(_FILLERS.split())
_KNOWN = {
    "%": "percent pct",
    "dollar": "$ usd dollars buck bucks",
    "euro": "€ eur",
    "pound": "£ gbp lb lbs quid",
    "yen": "¥ jpy",
    "rupee": "₹ inr rs",
    "cent": "penny pennies pence ¢",
    "degree": "deg",
    "celsius": "c",
    "fahrenheit": "f",
    "m": "meter metre",
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "km": "kilometer kilometre",
    "inch": "in inches",
    "foot": "ft feet",
    "yard": "yd",
    "mile": "mi",
    "g": "gram gramme gm",
    "mg": "milligram",
    "kg": "kilogram kilo",
    "ounce": "oz",
    "ton": "tonne",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "gallon": "gal",
    "second": "s sec",
    "minute": "min",
    "hour": "h hr",
    "day": "",
    "week": "wk",
    "month": "",
    "year": "yr",
    "mile/hour": "mph",
    "km/hour": "kmh kph kmph",
    "newton": "n",
    "joule": "j",
    "watt": "w",
    "volt": "v",
    "hertz": "hz",
    "radian": "rad",
    "dozen": "",
    "pair": "",
    "am": "",
    "pm": "",
}
_CANONICAL = {word: unit for unit, words in _KNOWN.items() for word in [unit, *words.split()]}
_CURRENCY_UNITS = frozenset({*_CURRENCIES.values(), "cent"})
_EXPONENTS = {"square": "^2", "squared": "^2", "sq": "^2", "cubic": "^3", "cubed": "^3", "cu": "^3"}


@dataclass(frozen=True, slots=True)
class Quantity:
    """An exact number and its unit.

    Attributes:
        number: The value, including words such as `million`.
        units: Units and other words after the number, or currency signs before it, in a normal
            form; empty if there are none. A percent sign is one: 5 % is 5 with the unit `%`.
        decimals: The number of digits after the decimal point; None for fractions.
    """

    number: Fraction
    units: frozenset[str] = frozenset()
    decimals: int | None = 0

    def agrees(self, other: "Quantity", *, percent_is_unit: bool = False) -> bool:
        """Return whether both may be the same answer.

        A unit may be missing on one side, except percent unless `percent_is_unit`. Where both have
        one, known units such as cm have to be the same, and other words must share one: `72 clips`
        is `72 paper clips`, and isn't `72 apples`.
        """
        if not (self.number == other.number or self._rounds(other) or other._rounds(self)):
            return False
        mine, others = self.units, other.units
        if ("%" in mine) != ("%" in others) and not percent_is_unit:
            return False
        if not mine or not others:
            return True
        known, others_known = known_units(mine), known_units(others)
        if known and others_known:
            return known <= others_known or others_known <= known
        return bool(mine & others)

    def _rounds(self, other: "Quantity") -> bool:
        """Return whether this is another number's decimals: 0.333333 for 1/3, but not 0.33."""
        if self.decimals is None or other.decimals is not None or self.decimals == 0:
            return False
        digits = len(str(abs(self.number.numerator * 10**self.decimals // self.number.denominator)))
        if digits < _SIGNIFICANT_DIGITS or self.decimals > _MOST_DIGITS:
            return False
        return abs(self.number - other.number) < Fraction(1, 10**self.decimals)


_UNITS_KNOWN = frozenset(_KNOWN)


def known_units(units: frozenset[str]) -> frozenset[str]:
    """Return those of a quantity's units that aren't any words."""
    return frozenset(u for u in units if u.partition("/")[0].partition("^")[0] in _UNITS_KNOWN)


def plain(text: str) -> str:
    r"""Return a short answer without markup: markdown, LaTeX's delimiters and text commands.

    >>> plain("**$\\text{Paris}$**.")
    'Paris'
    """
    text = " ".join(text.translate(_PLAIN).split())
    for _ in range(_MOST_LAYERS):
        text = _QUOTE.sub("", text.strip(" *`\t"))
        text = text.strip(" *`\t").strip("_").strip()
        text = _strip_period(text)
        for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"),
                                 ('"', '"'), ("'", "'"), ("\\textbf{", "}"), ("\\text{", "}"),
                                 ("\\boxed{", "}"), ("\\mathrm{", "}"), ("\\mathbf{", "}")):  # fmt: skip
            inside = text[len(opening) : -len(closing)]
            if (
                len(text) >= len(opening + closing)
                and text.startswith(opening)
                and text.endswith(closing)
                and opening not in inside.replace("\\$", "")
                and closing not in inside.replace("\\$", "")
                and not inside.endswith("\\")
            ):
                text = inside.strip()
    return text


def _strip_period(text: str) -> str:
    if text.endswith((".", "!", ";", ",")) and not text.endswith("..") and not text.endswith("n!"):
        return text[:-1].rstrip()
    return text


def read_quantity(text: str) -> Quantity | None:
    r"""Read an answer as a number with a unit; return None if any other text is in it.

    >>> read_quantity("\\$1{,}000.50 per month").number
    Fraction(2001, 2)
    """
    if len(text) > _MOST_CHARACTERS:
        return None
    text = plain(text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    for _ in range(3):
        text = _WRAPPER.sub(r"\1", text)
    if "$" in text and _PREFIX.match(text.lstrip("-+ ")) is None:
        text = text.replace("$", " ").strip() if text.count("$") % 2 == 0 else text
    text = " ".join(text.replace("**", " ").replace("{", "").replace("}", "").split())
    if named := _NAMED.match(text):
        text = text[named.end() :].strip("$ ")
    if calculation := _CALCULATION.match(text):
        text = text[calculation.end() :]
    if about := _ABOUT.match(text):
        text = text[about.end() :]
    text = in_digits(text)
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    return _read(text)


def in_digits(text: str) -> str:
    """Return a text with the number words that it begins with in digits.

    >>> in_digits("twenty-one clips")
    '21 clips'
    """
    match = NUMBER_WORDS.match(text)
    if match is None:
        return text
    total = part = 0
    for word in re.findall(r"[a-z]+", match[0].lower()):
        if word in _WORD_VALUES:
            part += _WORD_VALUES[word]
        elif word == "hundred":
            part = max(part, 1) * 100
        elif word == "thousand":
            total, part = total + max(part, 1) * 1000, 0
    return f"{total + part}{text[match.end() :]}"


def _read(text: str) -> Quantity | None:
    sign, currency = 1, None
    for _ in range(2):  # -$5 and $-5
        if match := _SIGN.match(text):
            sign = sign if match[1] == "+" else -sign
            text = text[match.end() :]
            if text[:1] in ("-", "+", "−"):
                return None
        if currency is None and (match := _PREFIX.match(text)):
            currency = _CURRENCIES.get(match[1] or "") or _CANONICAL[match[2].lower().strip(".")]
            text = text[match.end() :].lstrip()
    match = _NUMBER.match(text)
    if match is None or not (match["whole"] or match["decimals"]) or len(match[0]) > _MOST_DIGITS:
        return None
    whole = (match["whole"] or "0").replace(",", "").replace(" ", "")
    number = Fraction(f"{whole}.{match['decimals'] or '0'}")
    decimals: int | None = len(match["decimals"] or "")
    rest = text[match.end() :]
    if match["point"] is None and (quotient := _FRACTION.match(rest)):
        if int(quotient[1]) == 0:
            return None
        number, decimals = number / int(quotient[1]), None
        rest = rest[quotient.end() :]
    elif match["point"] is None and (mixed := _MIXED.match(rest)):
        if int(mixed[2]) == 0 or int(mixed[1]) >= int(mixed[2]):
            return None
        number, decimals = number + Fraction(int(mixed[1]), int(mixed[2])), None
        rest = rest[mixed.end() :]
    elif power := _POWER.match(rest):
        number *= Fraction(10) ** int(power[1] or power[2])
        rest, decimals = rest[power.end() :], 0
    if scale := _SCALE.match(rest):
        number *= 10 ** _SCALES[scale[1].lower()]
        rest, decimals = rest[scale.end() :], 0
    units = _read_units(rest)
    if units is None:
        return None
    if decimals is not None and _is_finite(number) is False:
        decimals = None
    return Quantity(sign * number, units | ({currency} if currency else frozenset()), decimals)


def _is_finite(number: Fraction) -> bool:
    denominator = number.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _read_units(text: str) -> frozenset[str] | None:
    """Return the words after a number in a normal form; None if they aren't a unit."""
    text = text.strip()
    if not text:
        return frozenset()
    if text[0] in ",;:-" or not _ONLY_UNITS.fullmatch(text):
        return None
    if "(" in text or ")" in text:
        if text.count("(") != text.count(")"):
            return None
        if re.search(r"\b(?:wrong|incorrect|false|not)\b", text, re.IGNORECASE):
            return None
        text = re.sub(r"\([^()]{3,}\)", " ", text)
        if "(" in text:
            return None
    words = _UNIT.findall(text)
    if len(words) > _MOST_UNIT_WORDS or any(word.lower().strip(".") in _NO_UNIT for word in words):
        return None
    last = words[-1].lower().strip(".") if words else ""
    if last in _CHANGES and (len(words) == 1 or last not in _EXPONENTS):
        return None
    units: list[str] = []
    exponent, per = "", False
    for word in words:
        name = word.lower().replace(".", "")
        if word == "/" or (name in ("per", "a", "an") and units):
            per = True
            continue
        if name in _EXPONENTS:
            if name.endswith("ed") and units:
                units[-1] += _EXPONENTS[name]
            else:
                exponent = _EXPONENTS[name]
            continue
        if name in _EMPTY and not (name == "in" and word is words[-1]):
            continue
        base, _, power = name.partition("^")
        unit = _singular(base) + (f"^{power}" if power else exponent)
        exponent = ""
        if per and units and units[-1] in _UNITS_KNOWN and units[-1] not in _CURRENCY_UNITS:
            units[-1] += f"/{unit}"
        elif per:
            units.append(f"per {unit}")
        else:
            units.append(unit)
        per = False
    return frozenset(units)


def _singular(word: str) -> str:
    if word in _CANONICAL:
        return _CANONICAL[word]
    for ending, replacement in (
        ("ies", "y"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("xes", "x"),
        ("s", ""),
    ):
        if word.endswith(ending) and len(word) > len(ending) + 1 and not word.endswith("ss"):
            stem = word[: -len(ending)] + replacement
            return _CANONICAL.get(stem, stem)
    return word
