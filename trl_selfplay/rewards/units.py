r"""Separate the unit of an answer from its value.

In: an answer in the spelling of `latex.clean`. Out: what is left of it, and the unit in a normal
form: `cm^2` for square centimetres, `$` for dollars, None without a unit. Single letters are units
only within `\text{}`, because `5 m` may be a product.
"""

import re

from trl_selfplay.rewards.values import UnreadableError

# Words that say nothing: "10 units" is 10, and so is "10 square units".
_EMPTY = {"unit", "integer", "number", "total", "each", "about", "approximately", "exactly", "only"}
_KNOWN = {
    "\\dollar": "$ dollar usd",
    "\\euro": "euro eur",
    "\\yen": "yen jpy",
    "\\pounds": "gbp",
    "\\rupee": "rupee inr",
    "\\cent": "cent",
    "\\degree": "degree deg",
    "C": "celsius",
    "F": "fahrenheit",
    "m": "meter metre",
    "cm": "cm centimeter centimetre",
    "mm": "mm millimeter millimetre",
    "km": "km kilometer kilometre",
    "in": "inch in",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mile mi",
    "g": "gram gramme",
    "mg": "mg milligram",
    "kg": "kg kilogram kilo",
    "lb": "lb pound",
    "oz": "oz ounce",
    "L": "liter litre",
    "mL": "ml mL milliliter millilitre",
    "gal": "gal gallon",
    "cup": "cup",
    "tbsp": "tbsp tablespoon",
    "tsp": "tsp teaspoon",
    "acre": "acre",
    "t": "ton tonne",
    "s": "second sec",
    "min": "minute min",
    "h": "hour hr",
    "am": "am",
    "pm": "pm",
    "day": "day",
    "week": "week",
    "month": "month",
    "yr": "year yr",
    "rad": "radian rad",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "V": "volt",
    "Hz": "Hz hertz",
    "mi/h": "mph",
    "km/h": "kmh kph",
}
_CANONICAL = {word: unit for unit, words in _KNOWN.items() for word in words.split()}
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3}
_NEEDS_SPACE = {"in", "mi", "oz"}  # 5in may be a product


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Other abbreviations of units, and nouns whose plural has no -s.
_ABBREVIATIONS = _set(
    """m g L s h N J W V C F ms ns nm ha kW kWh Wh Pa kPa mol cal kcal MB GB KB TB dB rpm mpg psi
    pt qt cc hrs yrs mins secs"""
)
_IRREGULAR = _set(
    """people men women children fish sheep deer geese mice teeth feet oxen cattle police salmon
    trout shrimp aircraft spacecraft series species dice data"""
)
# Words with the ending of a plural that count nothing, or change the number.
_NO_PLURALS = _set(
    """is was has does goes equals remains means plus minus times less unless versus thus this its his
    always perhaps besides makes gives fails exceeds doubles triples halves squares cubes roots hundreds
    thousands millions billions trillions quadrillions lakhs crores tens ones dozens scores tenths
    hundredths thousandths millionths billionths percents percentages percentiles basis bps mns bns ks
    thirds fourths fifths sixths eighths quarters factorials powers exponents decimals logs hers ours yours theirs as us yes across
    afterwards towards backwards downwards upwards sometimes multiples logarithms"""
)
# Words that nowhere belong to a unit.
_NEVER = _set(
    """bn mn mln mil k thousand million billion trillion quadrillion hundred lakh crore grand googol
    doubled tripled quadrupled halved percent percentage pct permille mille promille ppm ppb basis bps
    raised multiplied negative positive modulo"""
) | (_NO_PLURALS - {"times", "plus", "squares", "ones", "roots", "multiples", "cubes", "decimals"})
# Words behind a unit that say nothing.
_BEHIND_UNITS = _set(
    """left remain remaining survive altogether total each in all overall long tall high wide deep
    old"""
)
_PREPOSITIONS = frozenset(("of", "per", "/", "in", "for", "at", "on", "from", "every", "each"))
_NO_SINGULAR = re.compile(
    r".*(?:ed|ing|ly|er|est|al|ic|ous|ive|able|less|ful|own|n't)|off|short|up|down"
)
# Words that change what the number means.
_OTHER_WORDS = """sin cos tan log ln mod or and if for when where squared cubed factorial half halves third
    thirds fourth fourths quarter quarters fifth fifths sixth sixths seventh eighth eighths ninth
    tenth tenths hundredth hundredths thousandth thousandths dozen more less fewer than plus minus
    times not is are was wrong incorrect base remainder choose over divided by no k"""
_NO_UNITS = frozenset(_OTHER_WORDS.split())
_MOST_WORDS = 5
_SIGN = re.compile(r"(-?)\s*\\(dollar|pounds|euro|yen|rupee|cent)\b\s*(-?)\s*")
_SIGN_BEHIND = re.compile(r"\s*\\(dollar|pounds|euro|yen|rupee|cent|degree)\s*([CF]?)$")
_POWER = r"(?:\^\{-?\d\})?"
_TEXT = rf"\\text\{{(?:[^{{}}]|\{{-?\d\}})*\}}\s*{_POWER}"
_TEXT_BEHIND = re.compile(rf"\s*({_TEXT}(?:\s*/?\s*{_TEXT})*)$")
_WORDS_BEHIND = re.compile(
    rf"(?:(?<=[\d}})!%])|(?<=\\pi))(\s*)((?:[A-Za-z]+{_POWER}[ ./]*)*[A-Za-z]+{_POWER})\.?$"
)
_WORD = re.compile(r"[A-Za-z]+|/|\^-?\d")


def split_unit(
    text: str, expected: str | None = None, *, any_words: bool = True
) -> tuple[str, str | None]:
    r"""Return an answer without its unit, and the unit.

    Args:
        text: The answer, clean.
        expected: A unit in normal form that is looked for even where it would be a variable, as in
            `5 m`.
        any_words: Take all words behind a number for a unit; else, only known units, `expected`
            and plurals.

    Raises:
        UnreadableError: The words behind a number are no unit.

    >>> split_unit("5 \\text{ square centimeters}")
    ('5', 'cm^2')
    """
    money = None
    if match := _SIGN.match(text):
        text, money = match[1] + match[3] + text[match.end() :], f"\\{match[2]}"
    words = None
    if match := _TEXT_BEHIND.search(text):
        words = match[1].replace("\\text", " ")
    elif (match := _WORDS_BEHIND.search(text)) and _are_unit(match[1], match[2], expected):
        words = match[2]
    if match is not None and words is not None and text[: match.start()].strip():
        text = text[: match.start()].strip()
        written, words = words, _normalise(words)
        is_expected = expected is not None and words == expected
        if not any_words and not is_expected and not _are_countable(written, text):
            raise UnreadableError("a number with words that are no unit")
    else:
        words = None
    if match := _SIGN_BEHIND.search(text):
        text, money = text[: match.start()], f"\\{match[1]}{match[2]}"
    if money is None or words is None or words == money:
        return text, money or words
    return text, money + words


def _are_unit(space: str, words: str, expected: str | None) -> bool:
    """Return whether words behind a number are a unit, and not variables."""
    first = words.split()[0].rstrip(".").split("/")[0].split("^")[0]
    if expected is not None and _normalise(words) == expected:
        return True
    if _singular(first) in _CANONICAL or first in _POWERS or first == "per":
        return space != "" or first not in _NEEDS_SPACE
    return space != "" and len(first) >= 4


def _are_countable(words: str, number: str) -> bool:
    """Return whether words behind a number are known units, or can be what is counted."""
    found = [word for word in _WORD.findall(words) if not word.startswith("^")]
    if not found:
        return True
    if any(word.lower() in _NEVER for word in found):
        return False
    head = [word for word in found if word.lower() not in _POWERS]
    for index, word in enumerate(head[1:], 1):
        if word in _PREPOSITIONS:
            head = head[:index]
            break
    while len(head) > 1 and head[-1].lower() in _BEHIND_UNITS:
        head.pop()
    noun = head[-1] if head else ""
    lower = noun.lower()
    if _singular(noun) in _CANONICAL or noun in _ABBREVIATIONS or lower in _IRREGULAR:
        return True
    if _singular(noun) in _EMPTY or lower in (
        "left",
        "remaining",
        "each",
        "every",
        "altogether",
        "total",
    ):
        return True
    if len(lower) < 4 or lower in _NO_PLURALS:
        return False
    is_plural = lower.endswith("s") and not lower.endswith(("ss", "us", "is", "ous"))
    return is_plural or (number == "1" and not _NO_SINGULAR.fullmatch(lower))


def _normalise(words: str) -> str | None:
    """Return the normal form of a unit's words, such as m/s^2; None if they say nothing."""
    units: list[str] = []
    power, separator = "", ""
    found = _WORD.findall(words.replace("{", " ").replace("}", " ").replace("^ ", "^"))
    if len(found) > _MOST_WORDS or (found and found[0].lower() in _NO_UNITS):
        raise UnreadableError("a number with words that are no unit")
    for word in found:
        singular = _singular(word)
        if word in ("/", "per"):
            separator = "/"
        elif word.startswith("^"):
            units.append(word)
        elif singular in _POWERS and word.endswith("ed"):
            units.append(f"^{_POWERS[singular]}")
        elif word.lower() in _NO_UNITS:
            raise UnreadableError("a number with words that are no unit")
        elif singular in _POWERS:
            power = f"^{_POWERS[singular]}"
        elif singular in _EMPTY:
            return None
        elif singular not in ("of", "the", "a", "an"):
            joint = separator or ("." if units and units[-1] != "\\degree" else "")
            units += [part for part in (joint, _CANONICAL.get(singular, singular), power) if part]
            power, separator = "", ""
    return "".join(units) or None


def _singular(word: str) -> str:
    """Return a word without the ending of a plural; a short one as it is: mL and ML differ."""
    lower = word.lower()
    if len(word) <= 2 or lower in _CANONICAL:
        return lower if lower in _CANONICAL and len(word) > 2 else word
    stem = lower.removesuffix("es")
    return stem if stem in _CANONICAL else lower.removesuffix("s")
