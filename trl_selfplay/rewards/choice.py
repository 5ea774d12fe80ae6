"""Grade multiple-choice answers.

In: completions, solutions that are a letter or an option's text, and the options where the dataset
has them. Out: 1.0 or 0.0, or None where the solution can't be used. Someone who knows nothing
passes one sample in A; of K samples at least one passes with 1 − (1 − 1/A)^K.
"""

import re
from collections.abc import Sequence
from typing import Any

from trl_selfplay.rewards.answer import answers_agree, extract_answer, final_answer, text_of

# "B", "(B)", "B.", "b)"
_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\].:]*")
# Not the call in "f(x)".
_IN_PARENTHESES = re.compile(r"(?<!\w)\(([A-Za-z])\)")
_BOXED = re.compile(r"\\boxed\{\s*(?:\\[a-z]+\{\s*)?\(?([A-Za-z])\)?\s*\}")
# "answer is (b)", "Answer: b." and "answer is B because", but not "answer is a dog".
_ANSWER_LETTER = re.compile(
    r"(?i:answer\s*(?:is|:))\s*\**\s*"
    r"(?:\(([A-Za-z])\)|([A-Za-z])(?=[.,;:*)]|[ \t]*(?:\n|$))|([B-HJ-Z])(?=\s))"
)
# A letter that begins an answer, with what follows it: "B, since …", "A dog".
_LEADING = re.compile(r"([A-Za-z])([).:,;]|\s)")
_DENIAL = re.compile(r"(?:not|neither|none)\b", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", re.DOTALL)


def choice_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    choices: Sequence[Sequence[str] | None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Give 1.0 where a completion chooses the right option and no other, else 0.0.

    The choice is the marked final answer, a letter or an option's text; else the letters in
    parentheses or after "answer is"; else the one option whose text occurs. Two different letters,
    in the final answer or in two declared ones, are no choice.

    Args:
        completions: Text, or messages whose last one counts.
        solution: The right letter, with or without parentheses, or the right option's text. Where
            options are letters themselves, a letter is taken as the option's letter.
        choices: Each row's options in order, A first; needed where either side gives text.
        **kwargs: Other columns, unused.
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
    declared = _letters(_ANSWER_LETTER, text, options) | _letters(_BOXED, text, options)
    marked = extract_answer(text)
    if marked is not None:
        final = _choice_in(marked, options)
        return final if declared <= {final} else None
    letters = declared | _letters(_IN_PARENTHESES, text, options)
    if letters:
        return letters.pop() if len(letters) == 1 else None
    return _exact_choice(text.strip(), options) or _named_option(text, options)


def _letters(pattern: re.Pattern[str], text: str, options: Sequence[str]) -> set[str]:
    letters = {
        group.upper() for match in pattern.finditer(text) for group in match.groups() if group
    }
    return {letter for letter in letters if _is_option(letter, options)}


def _is_option(letter: str, options: Sequence[str]) -> bool:
    return not options or ord(letter) - ord("A") < len(options)


def _choice_in(text: str, options: Sequence[str]) -> str | None:
    """Return the letter that a final answer chooses, None if it chooses none or several."""
    text = text.strip().strip("*").strip("$").strip()
    if wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[1].strip()
    exact = _exact_choice(text, options)
    if exact is not None:
        return exact
    if _DENIAL.match(text):
        return None
    letters = _letters(_IN_PARENTHESES, text, options)
    leading = _LEADING.match(text)
    if leading is not None and _is_option(leading[1].upper(), options):
        # "A" and "I" are words too: with nothing but a space after them they choose nothing, but
        # they do contradict another letter.
        is_choice = not leading[2].isspace() or leading[1] in "BCDEFGH"
        if is_choice or letters:
            letters.add(leading[1].upper())
    if letters:
        return letters.pop() if len(letters) == 1 else None
    return _named_option(text, options)


def _exact_choice(text: str, options: Sequence[str]) -> str | None:
    """Return the letter if a text is nothing but a letter, an option's text, or both."""
    alone = _ALONE.fullmatch(text)
    if alone is not None and _is_option(alone[1].upper(), options):
        return alone[1].upper()
    for index, option in enumerate(options):
        letter = chr(ord("A") + index)
        lettered = text[:1].upper() == letter and text[1:2] in (".", ":", ")")
        if answers_agree(text, option) or (lettered and answers_agree(text[2:], option)):
            return letter
    return None


def _named_option(text: str, options: Sequence[str]) -> str | None:
    """Return the letter of the one option whose text occurs as whole words."""
    letter_of = {o.casefold(): chr(ord("A") + i) for i, o in enumerate(options) if o.strip()}
    if not letter_of:
        return None
    # The longest first: "a dog house" names no "a dog". Nor is 5 named by -5, 15 or 1.5.
    longest_first = sorted(letter_of, key=len, reverse=True)
    pattern = re.compile(
        r"(?<![\w\-−])(?<!\d[.,])(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w|[.,]\d)"
    )
    named = {letter_of[match[0]] for match in pattern.finditer(text.casefold())}
    return named.pop() if len(named) == 1 else None
