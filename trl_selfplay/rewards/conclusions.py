r"""Find the answer of a text that has no marker: in its last sentence, or before an explanation.

In: a text without thoughts. Out: the answer, or None if there is not exactly one that it can be. In
"So she has 40 + 32 = 72 clips." that is `72 clips`. Texts that break off, that hedge and that deny have
none.
"""

import re

from trl_selfplay.rewards.quantities import NUMBER_WORDS, in_digits, read_quantity
from trl_selfplay.rewards.statements import RETHINK, clean, cut

_MOST_CHARACTERS = 1000
_SHORT = 60
_SENTENCE_START = re.compile(r"(?<=[.!?])[*_]{0,2}\s+(?=[A-Z*$\\∴`])")
_LIST_ITEM = re.compile(r"(?:[>#•-]|\d{1,2}[.)]|\*(?!\*))\s+")
_CHATTER = re.compile(
    r"[*_]{0,2}(?:I hope|Hope|Let me know|Feel free|If you|Please|Good luck|Happy|Thank|Does this|Is there|Would you|Great|Have a)\b"
)
_HEDGES = re.compile(
    r"\b(?:or|maybe|perhaps|might|could|may\s+(?:be|have)|if|not|never|at\s+least|at\s+most|more\s+than|less\s+than"
    r"|between|either|neither|nor|unless|possibly|let\s+us|let['’]s|first|cannot|wrong|incorrect|suppose|assume"
    r"|says|thinks|claims?|(?:some|people|many)\s+(?:say|think)|false\s+that|answer\s+[a-z]+|(?:previous|earlier|example|sample|initial|original|[a-z]+['’]s)\s+(?:answer|guess)"
    r"|nicht|kein\w*|pas|não|no\s+es|es\s+no)\b|不是|아니|,\s+no[.!]?$"
    r"|\b(?:nearly|almost|over|under|above|below|twice|double|triple|half)\s+[\\$£€]{0,2}\d"
    r"|n['’]t\b|\?",
    re.IGNORECASE,
)
# What restates the problem, unless the sentence begins with a word such as "so".
_RESTATES = re.compile(
    r"\b(?:asks?|asked|question|guess(?:es)?|sorry|unable|lacks?|unknown|unclear|how\s+(?:many|much)"
    r"|we\s+(?:know|have|start|begin))\b",
    re.IGNORECASE,
)
_CONCLUDES = re.compile(
    r"[*_\s]{0,4}(?:so|therefore|thus|hence|in\s+total|altogether|in\s+conclusion|finally|consequently|overall|as\s+a\s+result)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z]{2,}")
_WHOLE = (".", "!", "*", "$", "\\)", "\\]", "`", ")", '"', "_")
_SPAN = r"(?:\$\$?[^$]{1,300}\$\$?|\\\((?:[^\\]|\\[^)]){1,300}\\\))"
# "is $5$", "we get $x = 1$ and $x = 2$ metres, about 3"
_MATHS = re.compile(
    rf"(?:\b(?:is|are|was|get|gets|gives?|equals?|have|has|obtain|be|so|yields?|therefore|thus|hence|to|as|than|find|where)|[=:,]|^)[:,]?\s*"
    rf"(?P<value>{_SPAN}(?:\s?(?:,\s?and|,\s?or|,|and|or)\s?{_SPAN}){{0,5}})"
    r"(?:\s[A-Za-z]{1,20}){0,3}(?:,?\s(?:or\s|which\sis\s)?(?:about|approximately|roughly)\s[^A-Za-z]{1,40})?[\s.!*]*$",
    re.IGNORECASE,
)
# "x = 1 or x = 2" is an answer with two numbers, and no doubt.
_WITHOUT_LIST = re.compile(rf"({_SPAN}\s)or(?=\s{_SPAN})")
_EMPHASIS = re.compile(
    r"\*\*(?P<bold>[^*\n]{1,80})\*\*|(?<!\*)\*(?P<italic>[^*\n]{1,80})\*(?!\*)|`(?P<code>[^`\n]{1,200})`"
)
_NUMBER = re.compile(
    r"(?<![\w.,/^])(?:(?:minus|negative)\s|[-+])?(?:\\?[$£€¥₹]\s?|(?:USD|EUR|GBP)\s)?-?"
    r"(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?![\d.]))?",
    re.ASCII | re.IGNORECASE,
)
_UNIT = re.compile(
    r"\s?(?:\\?%|°\s?[CF]?|per\s?cent|(?:square|cubic|sq\.?)\s[A-Za-z]+|degrees\s(?:Celsius|Fahrenheit)"
    r"|(?:million|billion|thousand|hundred)\s?[A-Za-z]*|[A-Za-z€£]+)(?:\^[23]|[²³]|\ssquared|\scubed)?(?:\s?(?:/|\sper\s)\s?[A-Za-z]+)?",
)
_CLOCK = re.compile(
    r"(?<![\d:])\d{1,2}:\d{2}(?::\d{2})?(?:\s?[ap]\.?m\b\.?)?(?![\d:])", re.IGNORECASE
)
_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
)
_DATE = re.compile(
    rf"\d{{1,2}}(?:st|nd|rd|th)?\s{_MONTH},?\s\d{{3,4}}|{_MONTH}\s\d{{1,2}}(?:st|nd|rd|th)?,?\s\d{{3,4}}"
)
_NAMED = re.compile(
    r"\b(?:is|are|was|were)\s(?P<value>[A-Z][\w'’.-]{0,30}(?:\s[A-Z][\w'’.-]{0,30}){0,3})(?:\s\([^()]{1,80}\))?[.!]?$"
)
_QUOTED = re.compile(r"\b(?:is|are|was|were)\s[\"“](?P<value>[^\"“”]{1,100})[\"”][.!]?$")
_TRUTH = re.compile(
    r"(?:^|.*\b(?:statement|claim|assertion|proposition|it|this|that)\s(?:is\s)?)(?P<value>yes|no|true|false)[.!]?$",
    re.IGNORECASE,
)
_TRUTH_WORD = re.compile(r"\b(?:true|false|yes|no|hardly|doubt|partly|half)\b", re.IGNORECASE)
# "You might expect 90, but …": what counts is what follows.
_APPEARANCE = re.compile(
    r"[^.]{0,80}\b(?:might|may|could)\s(?:expect|think|guess|say)\b[^.]{0,80}?,\sbut\s|at\sfirst\s(?:glance|sight)[^.]{0,80}?,\sbut\s",
    re.IGNORECASE,
)
_SO_CLAUSE = re.compile(r".*,\s(?:and\s)?so\s")
_TABLE_ROW = re.compile(r"\|.*\|$")
_DOUBTS = re.compile(
    r"\b(?:wrong|incorrect|mistaken?|actually|myth|untrue|false|instead|should\s+be|sorry|wait|oops|correct\w*|however|or|maybe"
    r"|perhaps|might|not\s+sure|unsure|answer|right|real|true)\b|\bno[,.!]|\bbut\s+(?:it|that|this)\b|\?",
    re.IGNORECASE,
)
_BARE_NAME = re.compile(
    r"[*_\"]{0,3}[^\W\d]{2,30}(?:\s[^\W\d]{2,30}){0,3}[*_\"]{0,3}[.!]\s+(?=[A-Z])"
)
_LISTED = re.compile(r"\b(?:is|are|prints|returns|reads|outputs):\s(?P<value>[^:]{1,200})$")
_EXPLANATION = re.compile(
    r"[\s.,;*_#(—–-]{0,10}(?:explanation|reason(?:ing)?|rationale|because|since|justification|why|proof|working|here(?:['’]s|\s+is)"
    r"|is\s+(?:the|my)\s+(?:final\s+|correct\s+)?answer)\b",
    re.IGNORECASE,
)
_OPEN_FENCE = re.compile(
    r"[:.]\s*\n```[\w+-]{0,20}[ \t]*\n((?:(?!```)[^\n]*\n){1,50}?)[ \t]*```\s*\Z"
)
_SPACES = str.maketrans(
    dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f", " ") | dict.fromkeys("−－", "-")
)


def conclude(text: str) -> str | None:
    """Return the answer in the last sentence of a text, or in the code block that it ends with."""
    text = text.rstrip().rstrip("✓✔✅🎉☑\ufe0f \t\n")
    fence = _OPEN_FENCE.search(text, max(0, len(text) - 2 * _MOST_CHARACTERS))
    if fence and (text.count("```") == 2 or _is_corrected(text[: fence.start(1)])):
        return fence[1].strip()
    sentence, is_only = _last_sentence(text)
    stated = sentence
    if appearance := _APPEARANCE.match(sentence):
        stated = sentence[appearance.end() :]
        if clause := _SO_CLAUSE.match(stated):
            stated = stated[clause.end() :]
    claim = cut(stated)
    if claim.count("**") % 2:
        claim += "**"
    if not claim or _HEDGES.search(_WITHOUT_LIST.sub(r"\1", claim)):
        return None
    if _RESTATES.search(claim) and not _CONCLUDES.match(claim):
        return None
    is_whole = sentence.endswith(_WHOLE) or _TABLE_ROW.fullmatch(sentence) is not None
    if not is_whole and not is_only:
        return None
    for find in (_maths, _emphasised, _result, _only_number, _moment, _name):
        if (answer := find(claim if find is not _maths else sentence)) is not None:
            return answer if is_whole or sentence.endswith(answer) else None
    return None


def _is_corrected(text: str) -> bool:
    """Return whether second thoughts follow the code block before the last."""
    between = text.rsplit("```", 2)[1]
    return RETHINK.search(between[-_MOST_CHARACTERS:]) is not None


def _last_sentence(text: str) -> tuple[str, bool]:
    """Return the last sentence that isn't a closing phrase, and whether the text is only that."""
    lines = [line.strip() for line in text[-4 * _MOST_CHARACTERS :].split("\n") if line.strip()]
    while lines:
        sentences = [
            s.strip() for s in _SENTENCE_START.split(lines[-1][-_MOST_CHARACTERS:]) if s.strip()
        ]
        while sentences and _CHATTER.match(sentences[-1]):
            sentences.pop()
        if sentences:
            is_only = len(lines) == len(sentences) == 1 and len(text) <= _MOST_CHARACTERS
            sentence = sentences[-1].translate(_SPACES).replace("{,}", ",")
            if len(sentences) == 1 and (item := _LIST_ITEM.match(sentence)):
                sentence = sentence[item.end() :]
            return sentence, is_only
        lines.pop()
    return "", False


def _maths(sentence: str) -> str | None:
    found = _MATHS.search(sentence)
    if found is None:
        return None
    value = found["value"]
    inner = clean(value.replace("\\(", "$").replace("\\)", "$"))
    left, equals, right = inner.rpartition("=")
    # `x = 5` is an answer; of a calculation it's the right side.
    if equals and "$" not in inner and not re.fullmatch(r"\s*\\?[A-Za-z]+(?:\([a-z]\))?\s*", left):
        return right.strip()
    return inner


def _emphasised(sentence: str) -> str | None:
    spans = [
        m
        for m in _EMPHASIS.finditer(sentence)
        if not m[0].rstrip("*`").endswith(":") and sentence[m.end() : m.end() + 1] != ":"
    ]
    if len(spans) > 1 and spans[-1]["code"]:  # the value of `i` is `2`
        spans = (
            spans[-1:]
            if re.search(r"\b(?:is|prints|returns|be)\s$", sentence[: spans[-1].start()])
            else spans
        )
    if len(spans) != 1:
        return None
    (span,) = spans
    value = (span["bold"] or span["italic"] or span["code"]).strip()
    if re.match(r"[A-Za-z ]{2,30}:\s", value):
        return None
    if read_quantity(value):
        return _with_unit(value, sentence[span.end() :])
    if _NUMBER.search(sentence[: span.start()] + sentence[span.end() :]) or len(value.split()) > 6:
        return None
    return None if value == sentence.strip("*_` ") and value.endswith((".", "!")) else value


def _result(sentence: str) -> str | None:
    if "=" not in sentence:
        return None
    value = clean(cut(sentence.rsplit("=", 1)[1]).strip("$* "))
    value = re.sub(r"\*+|(?<=\d)\$", "", value)
    return value if read_quantity(value) else None


def _only_number(sentence: str) -> str | None:
    numbers = list(_NUMBER.finditer(sentence))
    if _CLOCK.search(sentence) or _DATE.search(sentence):
        return None
    if not numbers:
        numbers = [m for m in NUMBER_WORDS.finditer(sentence) if m[0].lower() != "one"]
    if len(numbers) != 1 or not _WORD.search(sentence):
        return None
    number = re.sub(r"^(?:minus|negative)\s", "-", numbers[0][0].strip(), flags=re.IGNORECASE)
    return _with_unit(in_digits(number), sentence[numbers[0].end() :])


def _with_unit(number: str, rest: str) -> str:
    """Return a number with the unit after it, as far as that is one word, or `square` and `per` with theirs."""
    found = _UNIT.match(rest)
    value = number + found[0].rstrip(". ") if found else number
    return value if read_quantity(value) else number


def _moment(sentence: str) -> str | None:
    moments = [m[0] for pattern in (_DATE, _CLOCK) for m in pattern.finditer(sentence)]
    return moments[0] if len(moments) == 1 else None


def _name(sentence: str) -> str | None:
    found = (
        _NAMED.search(sentence)
        or _LISTED.search(sentence)
        or _QUOTED.search(sentence)
        or _TRUTH.fullmatch(sentence)
    )
    if found and found.re is _TRUTH and _TRUTH_WORD.search(sentence[: found.start("value")]):
        return None
    return clean(found["value"]) if found else None


def before_explanation(text: str) -> str | None:
    """Return what a text begins with if an explanation follows: "72, because …", "Yes. …"."""
    text = text.strip()
    first, _, rest = text.partition("\n")
    first = first.strip(" *_\r")
    if rest.strip():
        explains = _EXPLANATION.match(rest) is not None
        if len(first) <= _SHORT and (explains or (rest[:1] == "\n" and read_quantity(first))):
            return clean(first)
        return None
    if len(text) > 2 * _MOST_CHARACTERS:
        return None
    if (name := _BARE_NAME.match(text)) and not _DOUBTS.search(text, name.end()):
        return clean(name[0])
    shortened = cut(text)
    if len(shortened) <= _SHORT and _EXPLANATION.match(text, len(shortened)):
        value = clean(shortened)
        return _only_number(value) if _only_number(value) else value
    return None
