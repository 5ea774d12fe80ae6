"""Compare the final answer of a completion with the solution.

In: completions as text or chat messages, solutions that may hold worked steps. Out: 1.0 or 0.0, or
None where the solution can't be used. The extractor is strict: a false 1.0 is trained on, a false
0.0 only costs a sample. Everything here takes linear time.
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

_ANSWER_IS = re.compile(r"the\s+(?:final\s+|correct\s+)?answer\s+is\s*:?|answer\s*:", re.IGNORECASE)
_ANSWER_TAG = "<answer>"
_ANSWER_END = "</answer>"
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)", re.ASCII)
_QUOTIENT = re.compile(r"([+-]?\d+)\s*/\s*(\d+)", re.ASCII)
_CURRENCY = "$€£¥"
# Longer digit strings are compared as text: no answer needs them and big integers cost time.
_MOST_DIGITS = 60


def text_of(completion: Any) -> str:
    """Return a completion's text: itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"])


def extract_answer(text: str) -> str | None:
    r"""Return what a text marks as its final answer, or None without a marker.

    The kinds of markers in order: `\boxed{…}` with balanced braces, `#### …`, `<answer>…</answer>`,
    "the answer is …" or "Answer: …". The first kind that occurs counts, and of it the last one.

    >>> extract_answer("3 + 4 = 7, so the answer is 7.")
    '7'
    """
    if "\\boxed{" in text:
        return _last_boxed(text)
    if matches := _HASHES.findall(text):
        return matches[-1].strip()
    if _ANSWER_TAG in text:
        inside = text.rsplit(_ANSWER_TAG, 1)[1]
        return inside.split(_ANSWER_END, 1)[0].strip() if _ANSWER_END in inside else None
    end = None
    for match in _ANSWER_IS.finditer(text):
        end = match.end()
    if end is None:
        return None
    return text[end:].lstrip(" \t").split("\n", 1)[0].strip().rstrip("*").removesuffix(".").strip()


def _last_boxed(text: str) -> str | None:
    start = text.rindex("\\boxed{") + len("\\boxed{")
    depth = 1
    for index in range(start, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return text[start:index].strip()
    return None


def final_answer(solution: Any) -> str:
    r"""Return the final answer of a solution that may hold worked steps; without a marker, itself.

    >>> final_answer("She has 40 + 32 = 72 clips.\n#### 72")
    '72'
    """
    text = str(solution).strip()
    marked = extract_answer(text)
    return text if marked is None else marked


def normalise_answer(text: str) -> str | Fraction:
    """Return a form that is equal for equal answers: an exact number where the text is one.

    Case is folded and white space with it; a trailing period, surrounding `$` and currency signs
    go; commas group thousands only as in 1,000,000. A percent sign stays: 5% is not 5.

    >>> normalise_answer("1,000.0") == normalise_answer("1000")
    True
    """
    text = " ".join(text.split()).strip().removesuffix(".").strip()
    number = text.strip(_CURRENCY).strip()
    sign, digits = ("-", number[1:]) if number[:1] in ("-", "−") else ("", number)
    digits = digits.lstrip(_CURRENCY)
    if len(digits) <= _MOST_DIGITS:
        if _GROUPED.fullmatch(digits):
            digits = digits.replace(",", "")
        if _NUMBER.fullmatch(digits):
            try:
                return Fraction(Decimal(sign + digits.rstrip(".")))
            except InvalidOperation:
                return text.casefold()
        if match := _QUOTIENT.fullmatch(digits):
            numerator, denominator = int(match[1]), int(match[2])
            if denominator:
                return Fraction(numerator, denominator) * (-1 if sign else 1)
    return text.casefold()


def answers_agree(first: str, second: str) -> bool:
    """Say whether two answers have the same normal form and are not empty."""
    if not first.strip() or not second.strip():
        return False
    return normalise_answer(first) == normalise_answer(second)


def exact_reward(
    completions: Sequence[Any], solution: Sequence[Any], **kwargs: Any
) -> list[float | None]:
    """Give 1.0 where a completion's final answer is the solution's, else 0.0.

    A completion without a marker counts only if all of it is the answer. None where the solution
    is empty or None.

    Args:
        completions: Text, or messages whose last one counts.
        solution: The ground truth; of one with worked steps the final answer, see `final_answer`.
        **kwargs: Other columns, unused.
    """
    return [
        _exact_score(text_of(completion), gold)
        for completion, gold in zip(completions, solution, strict=True)
    ]


def _exact_score(completion: str, gold: Any) -> float | None:
    if gold is None or not (expected := final_answer(gold)).strip():
        return None
    answer = extract_answer(completion)
    return float(answers_agree(completion if answer is None else answer, expected))
