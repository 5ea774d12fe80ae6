"""Grade multiple-choice answers.

In: completions, solutions that are a letter or an option's text, and the options if the dataset has
them. Out: 1.0 or 0.0, or None if the solution is unusable. With A options, guessing passes one
sample in A, and at least one of K samples with probability 1 − (1 − 1/A)^K.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from trl_selfplay.rewards.answer import (
    answers_agree,
    extract_answer,
    final_answer,
    text_of,
    without_thoughts,
)

# "B", "(B)", "B.", "b)"
_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\].:]*")
# Not the call in "f(x)".
_IN_PARENTHESES = re.compile(r"(?<!\w)\(([A-Za-z])\)")
_BOXED = re.compile(r"\\boxed\{\s*(?:\\[a-z]+\{\s*)?\(?([A-Za-z])\)?\s*\}")
# A letter is a choice if what follows can't follow the article "A" or the pronoun "I". The rule is
# the same for every letter, or right answers "A" would be lost. Punctuation and the end of the text
# may follow a letter of either case, these words only a capital letter.
_WORDS_AFTER = (
    r"because|since|as|due\s+to|given\s+that|based\s+on|according\s+to|so|thus|and|or|but|not|nor"
    r"|which|where|whereas|while|if|is|isn['’]t|was|would|should|fits|matches|seems|works|makes"
    r"|the|an?|it|its|this|these|they|we|I|all|from|by|in|on|with"
)
_LETTER = (
    r"(?:[(\[]([A-Za-z])[)\]]"
    r"|([A-Za-z])(?:(?=[).:,;/*\]}!?\"$])|(?=\s+[(\[=–—]|\s+-\s|[ \t]*(?:\n|$)))"
    rf"|([A-Z])(?=\s+(?:{_WORDS_AFTER})\b))"
)
# "answer is (b)", "**Answer**: b.", "the correct option is B" and "answer is B because", but not
# "answer is a dog". One character class instead of `\s*\**\s*`, which takes quadratic time.
_ANSWER_LETTER = re.compile(
    r"(?i:answer|(?:correct|right|best|final|my)\s+(?:option|choice|letter))"
    rf"[\s*]*(?i:is|:)[\s*:]*(?i:(?:option|choice|letter)\s+)?{_LETTER}"
)
# "C is correct", "(C) is the right answer"
_IS_RIGHT = re.compile(
    r"(?<![\w'’])\(?([A-Za-z])\)?\**\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
)
_NAMED_LETTER = re.compile(rf"\b(?i:option|choice)\s+\**{_LETTER}")
_DENIED_LETTER = re.compile(
    r"(?<![\w'’])\(?([A-Za-z])\)?\**\s+"
    r"(?:is\s+(?:not|wrong|incorrect|false)|isn['’]t|cannot\s+be|can['’]t\s+be)\b"
)
# A letter at the start of an answer, and further letters: "B, since …", "option B or C", "A/B".
_LEADING = re.compile(rf"(?i:(?:(?:both|either)\s+)?(?:(?:option|choice|letter)s?\s+)?){_LETTER}")
_LETTERED = re.compile(r"([A-Za-z])[).:]\s")
_FURTHER = re.compile(rf"(?:\b(?:and|or)\s+(?i:option\s+|choice\s+)?|[,/&]\s*)\**{_LETTER}")
# What may separate a letter from its option's text; a sign or decimal point belongs to the text.
_BETWEEN = re.compile(r"(?:[\s*)\]:;–—]|[-.,](?!\d))*")
# In "A dog or (B)", "A" alone would be no choice, but together there are two.
_BARE_LEADING = re.compile(r"([A-Z])(?=\s)")
# What ends an option's text. A period or comma before a digit doesn't.
_ENDS = re.compile(r"[;)\]}$*\n]|[.,](?!\d)|$")
_DENIAL = re.compile(r"(?:not|neither|none)\b", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", re.DOTALL)


def choice_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    choices: Sequence[Sequence[str] | None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Return 1.0 if a completion chooses the right option and no other, else 0.0.

    The choice is the marked final answer (a letter or an option's text); without a marker, a letter
    in parentheses, after "answer is" or "option", or before "is correct"; otherwise the only option
    whose text occurs. Two different letters in the final answer, or in two declared answers, are no
    choice, nor is a letter with another option's text ("(C) Paris" if Paris is A). The same rules
    hold for all letters, so "A", which is also a word, has neither advantage nor disadvantage.
    Returns None if the solution names no option.

    Args:
        completions: Text, or messages, the last of which counts.
        solution: The right letter, with or without parentheses, or the right option's text. If
            options are letters themselves, a letter is read as the letter of the option.
        choices: The options of each row in order, A first; needed if either side gives text.
        **kwargs: Other columns, unused.

    Raises:
        TypeError: A solution is a list, a dict or bytes.
    """
    options = choices if choices is not None else [None] * len(completions)
    scores: list[float | None] = []
    for completion, gold, row_options in zip(completions, solution, options, strict=True):
        named = [str(option) for option in row_options or ()]
        right = None if gold is None else _choice_in(final_answer(gold), named)
        if right is None:
            scores.append(None)
        else:
            scores.append(float(_chosen(text_of(completion), named) == right))
    return scores


def _chosen(text: str, options: Sequence[str]) -> str | None:
    text = without_thoughts(text)
    denied = _letters(_DENIED_LETTER, text, options)
    declared = _letters(_ANSWER_LETTER, text, options) | _letters(_BOXED, text, options)
    declared |= _letters(_IS_RIGHT, text, options)
    marked = extract_answer(text)
    if marked is not None:
        final = _choice_in(marked, options)
        return final if declared <= {final} and final not in denied else None
    letters = declared | _letters(_IN_PARENTHESES, text, options)
    letters |= _letters(_NAMED_LETTER, text, options)
    if letters:
        return letters.pop() if len(letters) == 1 and not letters & denied else None
    text = text.strip("* \t\r\n")
    exact = _exact_choice(text, options)
    lettered = _LETTERED.match(text)
    if exact is None and lettered and len(_letters_of([lettered], options)) > 1:
        return None
    return exact or _named_option(text, options)


def _letters(pattern: re.Pattern[str], text: str, options: Sequence[str]) -> set[str]:
    return _letters_of(pattern.finditer(text), options)


def _letters_of(matches: Iterable[re.Match[str]], options: Sequence[str]) -> set[str]:
    """Return the letters that a pattern found.

    A letter before another option's text ("(C) Paris" if Paris is A) counts as both.
    """
    letters: set[str] = set()
    for match in matches:
        group = next(i for i, letter in enumerate(match.groups(), 1) if letter)
        letter = match[group].upper()
        if _is_option(letter, options):
            letters.add(letter)
            letters |= _option_after(match.string, match.end(group), options)
    return letters


def _option_after(text: str, end: int, options: Sequence[str]) -> set[str]:
    """Return the letter of the option whose text directly follows a letter, if any."""
    if not options:
        return set()
    start = _BETWEEN.match(text, end)
    assert start is not None  # it matches the empty text too
    folded = [option.strip().casefold() for option in options]
    rest = text[start.end() : start.end() + max(map(len, folded)) + 1].casefold()
    found = [
        (len(option), chr(ord("A") + index))
        for index, option in enumerate(folded)
        if option and rest.startswith(option) and _ENDS.match(rest, len(option))
    ]
    return {max(found)[1]} if found else set()


def _is_option(letter: str, options: Sequence[str]) -> bool:
    return not options or ord(letter) - ord("A") < len(options)


def _choice_in(text: str, options: Sequence[str]) -> str | None:
    """Return the letter that a final answer chooses, or None if it chooses none or several."""
    text = text.strip().strip("*").strip("$").strip()
    if wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[1].strip()
    exact = _exact_choice(text, options)
    if exact is not None:
        return exact
    if _DENIAL.match(text):
        return None
    letters = _letters(_IN_PARENTHESES, text, options)
    if leading := _LEADING.match(text):
        letters |= _letters_of([leading], options)
    if letters:
        letters |= _letters(_FURTHER, text, options)
        if bare := _BARE_LEADING.match(text):
            letters |= _letters_of([bare], options)
        return letters.pop() if len(letters) == 1 else None
    return _named_option(text, options)


def _exact_choice(text: str, options: Sequence[str]) -> str | None:
    """Return the letter if a text consists of a letter, an option's text, or both."""
    alone = _ALONE.fullmatch(text)
    if alone is not None and _is_option(alone[1].upper(), options):
        return alone[1].upper()
    for index, option in enumerate(options):
        if answers_agree(text, option):
            return chr(ord("A") + index)
    for index, option in enumerate(options):
        letter = chr(ord("A") + index)
        lettered = text[:1].upper() == letter and text[1:2] in (".", ":", ")", " ")
        if lettered and answers_agree(text[2:], option):
            return letter
    return None


def _named_option(text: str, options: Sequence[str]) -> str | None:
    """Return the letter of the only option whose text occurs as whole words, or None."""
    letter_of = {o.casefold(): chr(ord("A") + i) for i, o in enumerate(options) if o.strip()}
    if not letter_of:
        return None
    # Longest first, because "a dog house" doesn't name "a dog". Nor do -5, 15 or 1.5 name 5.
    longest_first = sorted(letter_of, key=len, reverse=True)
    pattern = re.compile(
        r"(?<![\w\-−])(?<!\d[.,])(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w|[.,]\d)"
    )
    named = {letter_of[match[0]] for match in pattern.finditer(text.casefold())}
    return named.pop() if len(named) == 1 else None
