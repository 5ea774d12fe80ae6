"""Grade multiple-choice answers.

In: completions, solutions that are a letter or an option's text, and the options where the dataset
has them. Out: 1.0 or 0.0, or None where the solution can't be used. Someone who knows nothing
passes one sample in A; of K samples at least one passes with 1 − (1 − 1/A)^K.
"""

import re
from collections.abc import Sequence
from typing import Any

from trl_selfplay.rewards.answer import answers_agree, extract_answer, final_answer, text_of

_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:)]?(?:\s.*)?", re.DOTALL)
_IN_PARENTHESES = re.compile(r"\(([A-Za-z])\)")
_ANSWER_LETTER = re.compile(r"answer\s*(?:is|:)\s*\**\(?([A-Za-z])\b", re.IGNORECASE)


def choice_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    choices: Sequence[Sequence[str]] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Give 1.0 where a completion chooses the right option and no other, else 0.0.

    The choice is the letter of the marked final answer; else the letters in parentheses or after
    "answer is", which must all be the same; else the one option whose text occurs.

    Args:
        completions: Text, or messages whose last one counts.
        solution: The right letter, with or without parentheses, or the right option's text.
        choices: Each row's options in order, A first; needed where either side gives text.
        **kwargs: Other columns, unused.
    """
    options: Sequence[Sequence[str]] = choices if choices is not None else [()] * len(completions)
    scores: list[float | None] = []
    for completion, gold, row_options in zip(completions, solution, options, strict=True):
        right = None if gold is None else _letter_of(final_answer(gold), row_options)
        if right is None:
            scores.append(None)
            continue
        scores.append(float(_chosen(text_of(completion), row_options) == right))
    return scores


def _chosen(text: str, options: Sequence[str]) -> str | None:
    marked = extract_answer(text)
    if marked is not None:
        letters = {letter.upper() for letter in _IN_PARENTHESES.findall(marked)}
        if len(letters) > 1:
            return None
        return letters.pop() if letters else _letter_of(marked, options)
    letters = {
        letter.upper()
        for pattern in (_IN_PARENTHESES, _ANSWER_LETTER)
        for letter in pattern.findall(text)
    }
    if letters:
        return letters.pop() if len(letters) == 1 else None
    if (alone := _letter_of(text, options)) is not None:
        return alone
    folded = text.casefold()
    named = [i for i, option in enumerate(options) if option and option.casefold() in folded]
    return chr(ord("A") + named[0]) if len(named) == 1 else None


def _letter_of(text: str, options: Sequence[str]) -> str | None:
    """Return the letter that a short text is, or that of the option whose text it is."""
    text = text.strip()
    for index, option in enumerate(options):
        if answers_agree(text, option):
            return chr(ord("A") + index)
    match = _LETTER.fullmatch(text)
    if match is None:
        return None
    # "A dog" is no choice of A; "A", "(A)", "A." and "(A) a dog" are.
    if text[:1] != "(" and len(text) > 1 and text[1] not in ".:)":
        return None
    return match[1].upper()
