"""Grade multiple-choice answers.

In: completions, solutions that are a letter or an option's text, and the options if the dataset has
them. Out: 1.0 or 0.0, or None if the solution is unusable. With A options, guessing passes one
sample in A, and at least one of K samples with probability 1 − (1 − 1/A)^K.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_selfplay.rewards.answer import answers_agree, final_answer, text_of
from trl_selfplay.rewards.scores import Scores
from trl_selfplay.rewards.statements import (
    ANSWER,
    CALLED_WRONG,
    FINAL,
    NOT_MEANT,
    STEP,
    Statement,
    find_statements,
    is_confirmed,
    resolve,
)
from trl_selfplay.rewards.transcript import last_turns

_NO_OPTION = "the solution names no option"
_AMBIGUOUS = "?"  # the value of a statement that names two options
# "B", "(B)", "B.", "b)"
_ALONE = re.compile(r"[(\[{<]?([A-Za-z])[)\]}>.:,]*")
# Not the call in "f(x)".
_IN_PARENTHESES = re.compile(r"(?<!\w)\(([A-Za-z])\)(?!\s?\?)")
# A letter is a choice if what follows can't follow the article "A" or the pronoun "I". The rule is
# the same for every letter, or right answers "A" would be lost. Punctuation and the end of the text
# may follow a letter of either case, these words only a capital letter.
_WORDS_AFTER = (
    r"because|since|as|due\s+to|given\s+that|based\s+on|according\s+to|so|thus|and|or|but|not|nor"
    r"|which|where|whereas|while|if|is|isn['’]t|was|would|should|fits|matches|seems|works|makes"
    r"|the|an?|it|its|this|these|they|we|I|all|from|by|in|on|with|here|for|over|rather|instead|only"
)
_LETTER = (
    r"(?:[(\[]([A-Za-z])[)\]]"
    r"|([A-Za-z])(?:(?=[).:,;/*\]}!\"'$<]|\?(?!\w))(?!['’]\w)|(?=\s+[(\[=–—]|\s+-\s|[ \t]*(?:\n|$)))"
    rf"|([A-Z])(?=\s+(?:{_WORDS_AFTER})\b))"
)
_MARKS = r"[\s*_\"'$`]{0,6}"
_NAME = r"(?i:(?:option|choice|letter|answer|statement|alternative)\s{1,3})?"
_CHOOSES = (
    # "the correct option is B", "Final choice: B"
    re.compile(
        r"\b(?i:(?:correct|right|best|final|my|selected|chosen|only|odd)\s{1,3}(?:answer\s{1,3})?"
        rf"(?:option|choice|letter|one(?:\s{{1,3}}out)?|alternative|statement))(?:{_MARKS}(?i:is|would\s+be|must\s+be|:|=)[\s*:]{{0,4}})"
        rf"{_MARKS}{_NAME}{_MARKS}{_LETTER}"
    ),
    # "Option: B" on a line of its own
    re.compile(
        rf"(?:^|\n)[ \t>*_#-]{{0,8}}(?i:option|choice|letter|correct|selection|selected|verdict){_MARKS}[:=]{_MARKS}{_NAME}{_LETTER}"
    ),
    # "I choose B", "go with B", "that leaves B"
    re.compile(
        r"\b(?i:choose|say|pick|select|go(?:ing)?\s{1,3}with|went\s{1,3}with|choosing|selecting|picking|chose|picked|selected"
        r"|leaves(?:\s{1,3}us\s{1,3}with)?|leaving|left\s{1,3}with|settle\s{1,3}on|answer\s{1,3}with)"
        rf"(?i:\s{{1,3}}only)?\s{{0,3}}:?{_MARKS}{_NAME}{_MARKS}{_LETTER}"
    ),
    # "it's B", "it must be B"
    re.compile(
        r"\b(?i:it(?:['’]s|\s{1,3}(?:is|must\s+be|should\s+be|has\s+to\s+be))|this\s{1,3}is|(?:should|must)\s{1,3}be|i\s{1,3}mean|make\s{1,3}that"
        rf"|points?\s{{1,3}}to|corresponds\s{{1,3}}to|matches)\s{{1,3}}{_MARKS}{_NAME}{_MARKS}{_LETTER}"
    ),
    # "Therefore, (B)."; "So B."
    re.compile(
        rf"\b(?i:so|therefore|thus|hence|no|wait|actually|rather){_MARKS}[,:]?{_MARKS}{_NAME}{_MARKS}"
        r"(?:[(\[]([A-Za-z])[)\]]|([A-Z]))(?=[\s*_\"'$]{0,4}(?:[.!]|\n|$))"
    ),
)
# "C is correct", "(C) is the right answer"
_IS_RIGHT = re.compile(
    r"(?<![\w'’])(?:[(\[]([A-Za-z])[)\]]|([A-Z]))[*_`\"]{0,3}(?:\)|:)?\s{1,3}"
    r"(?:is|must\s{1,3}be|would\s{1,3}be|seems|has\s{1,3}to\s{1,3}be|should\s{1,3}be|appears\s{1,3}to\s{1,3}be)\s{1,3}"
    r"(?:(?:therefore|thus|clearly|definitely|the|indeed|most|likely|obviously|hence)\s{1,3}){0,3}[*_]{0,2}(?:only\s{1,3})?"
    r"(?:correct|right|best|answer|one|(?:consistent|valid|possible|true|remaining)\s{1,3}(?:option|choice|answer|one))\b",
)
_NAMED_LETTER = re.compile(rf"\b(?i:option|choice)\s+\**{_LETTER}")
_DENIED_LETTER = re.compile(
    r"(?<![\w'’])\(?([A-Za-z])\)?\**\s+"
    r"(?:is\s+(?:not|wrong|incorrect|false|never|ruled|eliminated|excluded|impossible|out\b)|isn['’]t|cannot\s+be|can['’]t\s+be)\b"
)
_REFUSED_LETTER = re.compile(
    rf"(?i:\b(?:not|neither|nor|never|except|eliminated?|rules?\s+out|reject|exclude)|n['’]t)\s{{1,3}}(?:be\s{{1,3}})?{_NAME}{_LETTER}"
)
_FIRST = re.compile(
    rf"{_NAME}(?:[(\[]([A-Za-z])[)\]](?!\s?\?)|([A-Za-z])(?=[).:,;]|\s+[—–-]\s|[ \t]*$)(?!['’]\w)|([A-Z])(?=\s+(?:because|since|as)\b))"
)
_PLAUSIBLE_LENGTH = 120
_MOST_WORDS = 8
_BOLD_LETTER = re.compile(r"\*\*\s?\(?([A-Z])[).:]?(?:\s[^*\n]{0,200})?\*\*")
# A letter at the start of an answer, and further letters: "B, since …", "option B or C", "A/B".
_LEADING = re.compile(
    rf"(?i:(?:(?:both|either)\s+)?(?:(?:option|choice|letter|answer)s?:?\s+)?){_LETTER}"
)
_LETTERED = re.compile(r"\(?([A-Z])[).:](?=\s|$)")
_LETTER_AND_TEXT = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:]+\s?|\s)")
_LETTERED_LINE = re.compile(r"^[ \t>*_-]{0,6}\(?([A-Z])[).:]\s", re.MULTILINE)
_FURTHER = re.compile(
    rf"(?:\b(?:and|or|but|maybe)\s+(?:also\s+|maybe\s+|possibly\s+)?(?i:option\s+|choice\s+)?|[,/&]\s*)\**{_LETTER}"
)
# What may separate a letter from its option's text; a sign or decimal point belongs to the text.
_BETWEEN = re.compile(r"(?:[\s*)\]:;–—_`\"]|[-.,](?!\d))*")
# In "A dog or (B)", "A" alone would be no choice, but together there are two.
_BARE_LEADING = re.compile(r"([A-Z])(?=\s)")
# What ends an option's text. A period or comma before a digit doesn't.
_ENDS = re.compile(r"[\"`;:!?)\]}$*_\n]|[.,](?!\d)|\s[-–—(]|$|\s(?:because|since|is|as|so|which)\b")
_DENIAL = re.compile(r"(?:not|neither|none\s+of\s+(?:these|them)\s+is)\b", re.IGNORECASE)
_MOST_NAMED = 20
_DENIES_NAME = re.compile(
    r"\b(?:not|never|neither|nor|cannot|except|excludes?|excluding|reject|rejects|eliminates?|ruled?s?\s+out|unlike|instead\s+of|rather\s+than"
    r"|other\s+than|(?:anything|everything|all)\s+but|far\s+from|wrong|incorrect|false|untrue|doubt|if|unless)\b|n['’]t\b"
)
_SAYS_WRONG = re.compile(
    r"\((?:(?:this|it)\s+is\s+)?(?:wrong|incorrect|not)\b|[❌✗✘]", re.IGNORECASE
)
_CLAUSES = re.compile(r"[.!?;\n]|,\s|(?<!anything )(?<!everything )(?<!all )\bbut\b")
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|boxed|fbox)\s?\{([^{}]*)\}"
)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_LATEX_SPACE = re.compile(r"\\[ ,;:!]|~|\\q?quad(?![A-Za-z])|\\(?=\()|\\(?=\))")
_TAKEN_BACK = re.compile(
    r"(?:^|[.!?\n—–(*)]|\bbut)[\s*_]{0,4}(?:but\s|oh,?\s)?(?:wait|hold\s+on|oops|correction|on\s+second\s+thoughts?"
    r"|scratch\s+that|sorry|i\s+made\s+a\s+mistake|actually|no[,.!—–\s]|that(?:['’]s|\s+is)\s+(?:wrong|not\s+right|incorrect))",
    re.IGNORECASE,
)


def choice_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    choices: Sequence[Sequence[str] | None] | None = None,
    **kwargs: Any,
) -> Scores:
    """Return 1.0 if a completion chooses the right option and no other, else 0.0.

    Choices are found where `extract_answer` finds answers, and in sentences such as "the correct
    option is B", "B is correct", "I choose B" or "so it is B". The last one counts, as there: two
    different ones without a word such as "wait" between them are no choice. Without any, the choice is
    a letter that the text begins or ends with, the only letter in parentheses or after "option", or
    the only option whose text occurs.

    Two letters in one statement are no choice, nor is a letter with another option's text ("(C) Paris"
    if Paris is A) or a letter that the text calls wrong. The same rules hold for all letters, so "A",
    which is also a word, has neither advantage nor disadvantage. Returns None if the solution names no
    option.

    Args:
        completions: Text, or messages, the last of which counts.
        solution: The right letter, with or without parentheses, the right option's text, or both. If
            options are letters themselves, a letter is read as the letter of the option.
        choices: The options of each row in order, A first, with or without their letters; needed if
            either side gives text.
        **kwargs: Other columns, unused.

    Raises:
        TypeError: A solution is a list, a dict or bytes, or the options of a row are no list.
    """
    columns = choices if choices is not None else [None] * len(completions)
    scores: list[float | None] = []
    for completion, gold, row_options in zip(completions, solution, columns, strict=True):
        options = _read_options(row_options)
        right = None if gold is None else _right_letter(final_answer(gold), options)
        if right is None:
            scores.append(None)
        else:
            scores.append(float(_chosen(text_of(completion), options) == right))
    return Scores(scores, {i: _NO_OPTION for i, score in enumerate(scores) if score is None})


def _find_data_errors(
    solution: Sequence[Any],
    choices: Sequence[Sequence[str] | None] | None = None,
    **kwargs: Any,
) -> dict[int, str]:
    """Return the rows whose solution names no option; an index isn't one."""
    graded = choice_reward([""] * len(solution), solution, choices)
    return {
        index: f"the solution {solution[index]!r:.80} names no option; give its letter or its text"
        for index in graded.causes
    }


choice_reward.find_data_errors = _find_data_errors  # type: ignore[attr-defined]


def _read_options(row_options: Sequence[str] | None) -> dict[str, str]:
    """Return options by letter, without letters in their texts."""
    if isinstance(row_options, (str, Mapping)):
        raise TypeError(
            f"the choices of a row are {row_options!r:.100}; give a list of texts, in order."
        )
    texts = [str(option).strip() for option in row_options or ()]
    options = {chr(ord("A") + index): text for index, text in enumerate(texts)}
    prefixes = [_LETTERED.match(text) for text in texts]
    if all(m and m[1] == letter for m, letter in zip(prefixes, options, strict=True)):
        return {
            letter: text[m.end() :].strip()
            for (letter, text), m in zip(options.items(), prefixes, strict=True)
            if m
        }
    return options


def _right_letter(gold: str, options: dict[str, str]) -> str | None:
    """Return the letter of a solution; one with a text adds it to options that aren't known."""
    if not options and (lettered := _LETTERED.match(gold)) and gold[lettered.end() :].strip():
        options[lettered[1]] = gold[lettered.end() :].strip()
        return lettered[1]
    letter = _choice_in(gold, options)
    return None if letter == _AMBIGUOUS else letter


def _chosen(text: str, options: Mapping[str, str]) -> str | None:
    for part in last_turns(text):
        denied = _letters(_DENIED_LETTER, part, options) | _letters(_REFUSED_LETTER, part, options)
        chosen = _stated(part, options)
        if chosen is None:
            chosen = _unmarked(part, options)
        if chosen is not None:
            return None if chosen in denied else chosen
    return None


def _stated(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the statement that stands; None if there is no statement."""
    statements, is_unreadable = [], False
    for statement in find_statements(text):
        letter = _choice_in(statement.value, options)
        if letter is not None:
            statements.append(_choosing(statement, letter))
        elif statement.finality == FINAL and not statement.value:
            statements.append(_choosing(statement, _AMBIGUOUS))
        elif statement.finality != STEP and len(statement.value) <= _PLAUSIBLE_LENGTH:
            is_unreadable = True
    for pattern in (*_CHOOSES, _IS_RIGHT):
        for match in pattern.finditer(text):
            if NOT_MEANT.search(text[max(0, match.start() - 80) : match.start()]):
                continue
            letters = _letters_of([match], options)
            if letters and (further := _FURTHER.match(text, match.end())):
                letters |= _letters_of([further], options)
            if letters:
                letter = letters.pop() if len(letters) == 1 else _AMBIGUOUS
                statements.append(
                    Statement(match.start(), match.end(), match.end(), letter, ANSWER)
                )
    statements.sort(key=lambda statement: (statement.start, statement.end))
    standing = resolve(text, statements[-100:], lambda one, other: one == other)
    if standing is None:
        return _AMBIGUOUS if is_unreadable else None
    tail = text[standing.end : standing.end + 2000]
    if CALLED_WRONG.match(tail):
        return _AMBIGUOUS
    if (change := _TAKEN_BACK.search(tail)) and not is_confirmed(tail[change.start() :]):
        return _AMBIGUOUS
    return standing.value or _AMBIGUOUS


def _choosing(statement: Statement, letter: str) -> Statement:
    return Statement(
        statement.start, statement.value_start, statement.end, letter,
        max(statement.finality, ANSWER) if statement.finality != STEP else STEP,
    )  # fmt: skip


def _unmarked(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that a text without a statement chooses, or None."""
    text = _without_marks(text)
    exact = _exact_choice(text, options)
    if exact is not None:
        return exact
    lines = [line for line in text.split("\n") if line.strip()]
    lists = {match[1] for match in _LETTERED_LINE.finditer(text)}
    if lines and len(lists) < 2:
        last = _exact_choice(_without_marks(lines[-1]), options)
        first = _leading(_without_marks(lines[0]), options)
        if last is not None or first is not None:
            return last if first is None else first if last in (None, first) else _AMBIGUOUS
    bold = _letters(_BOLD_LETTER, text, options)
    letters = (
        _letters(_IN_PARENTHESES, text, options) | _letters(_NAMED_LETTER, text, options) | bold
    )
    if letters:
        return letters.pop() if len(letters) == 1 else _AMBIGUOUS
    # A text that breaks off may have named an option on the way.
    is_whole = text.endswith((".", "!", ")", '"')) or len(text.split()) <= _MOST_WORDS
    return None if len(lists) > 1 or not is_whole else _named_option(text, options)


def _leading(line: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that a line begins with: "B. Paris", "(B), because …" or "B because …"."""
    leading = _FIRST.match(line)
    if leading is None:
        return None
    letters = _letters_of([leading], options)
    if letters and (further := _FURTHER.search(line, leading.end(), leading.end() + 20)):
        letters |= _letters_of([further], options)
    letters |= _letters(_IN_PARENTHESES, line, options) - _letters(_DENIED_LETTER, line, options)
    if not letters:
        return None
    return letters.pop() if len(letters) == 1 else _AMBIGUOUS


def _without_marks(text: str) -> str:
    r"""Return an answer without markdown, quotation marks and LaTeX's text commands around it."""
    for _ in range(3):
        text = _WRAPPER.sub(r"\1", text)
    text = text.translate(_FULL_WIDTH)
    text = _LATEX_SPACE.sub(" ", text).strip("*_`\"'# \t\r\n>")
    return text.strip("$").strip("*_` \t\r\n")


def _letters(pattern: re.Pattern[str], text: str, options: Mapping[str, str]) -> set[str]:
    return _letters_of(pattern.finditer(text), options)


def _letters_of(matches: Iterable[re.Match[str]], options: Mapping[str, str]) -> set[str]:
    """Return the letters that a pattern found.

    A letter before another option's text ("(C) Paris" if Paris is A) counts as both.
    """
    letters: set[str] = set()
    for match in matches:
        group = next((i for i, letter in enumerate(match.groups(), 1) if letter), 0)
        letter = match[group].upper()
        if _is_option(letter, options):
            letters.add(letter)
            found = _option_after(match.string, match.end(group), options)
            letters |= {found[0]} if found else set()
    return letters


def _option_after(text: str, end: int, options: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the letter of the option whose text directly follows a letter, and where it ends."""
    if not options:
        return None
    start = _BETWEEN.match(text, end)
    assert start is not None  # it matches the empty text too
    longest = max(map(len, options.values()))
    rest = text[start.end() : start.end() + longest + 12].casefold()
    found = [
        (len(option), letter)
        for letter, option in options.items()
        if option and rest.startswith(option.casefold()) and _ENDS.match(rest, len(option))
    ]
    if not found:
        return None
    length, letter = max(found)
    return letter, start.end() + length


def _is_option(letter: str, options: Mapping[str, str]) -> bool:
    return letter in options or len(options) < 2


def _choice_in(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that a final answer chooses, `_AMBIGUOUS` for several, None for none."""
    text = _without_marks(text)
    exact = _exact_choice(text, options)
    if exact is not None:
        return exact
    if _DENIAL.match(text) or _SAYS_WRONG.search(text):
        return None
    letters = _letters(_IN_PARENTHESES, text, options)
    start = 0
    if leading := _LEADING.match(text):
        letters |= _letters_of([leading], options)
        start = leading.end()
        rest = _LETTER_AND_TEXT.match(text)
        if rest and (named := _exact_choice(text[rest.end() :], options)):
            letters.add(named)
        if after := _option_after(text, leading.end(), options):
            start = after[1]
            letters &= {after[0], *_letters_of([leading], options)}
    if letters:
        letters |= _letters_of(_FURTHER.finditer(text, start), options)
        if bare := _BARE_LEADING.match(text):
            letters |= _letters_of([bare], options)
        return letters.pop() if len(letters) == 1 else _AMBIGUOUS
    return _named_option(text, options)


def _exact_choice(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter if a text consists of a letter, an option's text, or both."""
    alone = _ALONE.fullmatch(text)
    if alone is not None and _is_option(alone[1].upper(), options):
        return alone[1].upper()
    if len(text) > 2000:
        return None
    agreeing = [letter for letter, option in options.items() if answers_agree(text, option)]
    if len(agreeing) > 1:
        same = [letter for letter in agreeing if options[letter].casefold() == text.casefold()]
        agreeing = same or agreeing
    if agreeing:
        return agreeing[0] if len(agreeing) == 1 else _AMBIGUOUS
    lettered = _LETTER_AND_TEXT.match(text)
    if lettered and answers_agree(text[lettered.end() :], options.get(lettered[1].upper(), "")):
        return lettered[1].upper()
    return None


def _named_option(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the only option whose text occurs as whole words, or None.

    An option that its sentence denies, as in "London is wrong", isn't chosen.
    """
    letter_of = {option.casefold(): letter for letter, option in options.items() if option}
    if not letter_of:
        return None
    # Longest first, because "a dog house" doesn't name "a dog". Nor do -5, 15 or 1.5 name 5.
    longest_first = sorted(letter_of, key=len, reverse=True)
    pattern = re.compile(
        r"(?<![\w\-−])(?<!\d[.,])(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w|[.,]\d)"
    )
    folded = text.casefold()
    matches = list(pattern.finditer(folded))
    named: set[str] = set()
    denied: set[str] = set()
    for match in matches[-_MOST_NAMED:]:
        before = _CLAUSES.split(folded[max(0, match.start() - 200) : match.start()])[-1]
        behind = folded[match.end() : match.end() + 100]
        is_denied = (
            _DENIES_NAME.search(before)
            or CALLED_WRONG.match(behind)
            or re.match(r"\?|,\s*no\b", behind)
        )
        (denied if is_denied else named).add(letter_of[match[0]])
    named -= denied
    if len(named) > 1:
        return _AMBIGUOUS
    return named.pop() if named else None
