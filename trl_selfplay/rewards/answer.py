"""Compare the final answer of a completion with the solution.

In: completions as text or chat messages, solutions that may hold worked steps. Out: 1.0 or 0.0, or
None where the solution can't be used. The extractor is strict: a false 1.0 is trained on, a false
0.0 only costs a sample. What stands in thoughts is no answer. Everything here takes linear time.
"""

import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

_ANSWER_IS = re.compile(r"the\s+(?:final\s+|correct\s+)?answer\s+is\s*:?|answer\s*:", re.IGNORECASE)
_ANSWER_TAG = "<answer>"
_ANSWER_END = "</answer>"
# What closes a model's thoughts; what opens them often stands in the prompt.
_THOUGHTS_END = re.compile(r"</(?:think|thinking|reasoning)>", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+", re.ASCII)
_QUOTIENT = re.compile(r"(\d+)\s*/\s*(\d+)", re.ASCII)
_BRACE = re.compile(r"[{}]")
_CURRENCY = "$€£¥"
# Longer digit strings are compared as text: no answer needs them and big integers cost time.
_MOST_DIGITS = 60


def text_of(completion: Any) -> str:
    """Return a completion's text: itself, or the text of its last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, list):  # parts, as of models that also see images
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def without_thoughts(text: str) -> str:
    """Return what follows the last `</think>`, `</thinking>` or `</reasoning>`; all of it without.

    >>> without_thoughts("<think>4 or 5?</think> The answer is 5.")
    ' The answer is 5.'
    """
    end = 0
    for match in _THOUGHTS_END.finditer(text):
        end = match.end()
    return text[end:]


def extract_answer(text: str) -> str | None:
    r"""Return what a text marks as its final answer; None without a marker.

    Thoughts that were closed are not searched. The kinds of markers in order: `\boxed{…}` with balanced braces, `#### …`, `<answer>…</answer>`,
    "the answer is …" or "Answer: …" up to the end of the line. The first kind that occurs counts,
    and of it the last one; if that one is empty or never closed, the answer is "".

    >>> extract_answer("3 + 4 = 7, so the answer is 7.")
    '7'
    """
    text = without_thoughts(text)
    if "\\boxed{" in text:
        return _last_boxed(text)
    if matches := _HASHES.findall(text):
        return matches[-1].strip()
    if _ANSWER_TAG in text:
        inside = text.rsplit(_ANSWER_TAG, 1)[1]
        return inside.split(_ANSWER_END, 1)[0].strip() if _ANSWER_END in inside else ""
    end = None
    for match in _ANSWER_IS.finditer(text):
        end = match.end()
    if end is None:
        return None
    # Models write "**Answer:** 7" and "The answer is **7**."
    line = text[end:].lstrip(" \t*").split("\n", 1)[0].rstrip(" \t\r*")
    return line.removesuffix(".").rstrip(" \t*")


def _last_boxed(text: str) -> str:
    start = text.rindex("\\boxed{") + len("\\boxed{")
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()].strip()
    return ""


def final_answer(solution: Any) -> str:
    r"""Return the final answer of a solution that may hold worked steps; without a marker, itself.

    A missing number (NaN) has none: "".

    Raises:
        TypeError: A list, a dict or bytes: something that holds an answer and is none.

    >>> final_answer("She has 40 + 32 = 72 clips.\n#### 72")
    '72'
    """
    if not is_answer(solution):
        raise TypeError(
            f"a solution is {solution!r:.100}, of type {type(solution).__name__}; give one answer, "
            "as text or as a number."
        )
    if isinstance(solution, float) and math.isnan(solution):
        return ""
    text = str(solution).strip()
    marked = extract_answer(text)
    return without_thoughts(text).strip() if marked is None else marked


def is_answer(solution: Any) -> bool:
    """Return whether a solution can be one answer: text, a number or None, but no collection."""
    return isinstance(solution, str) or not isinstance(solution, Iterable)


def normalise_answer(text: str, *, percent_is_unit: bool = False) -> str | Fraction:
    """Return a form that is equal for equal answers: an exact number where the text is one.

    Case is folded, white space too; a trailing period, surrounding `$` and currency signs go;
    commas group thousands only as in 1,000,000. A percent sign stays, since 5% is not 5, unless
    `percent_is_unit`. Digits other than 0-9 are text.

    >>> normalise_answer("1,000.0") == normalise_answer("1000")
    True
    """
    text = " ".join(text.split()).removesuffix(".").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    folded, percent = text.casefold(), ""
    if text.endswith("%"):
        text = text.removesuffix("%").removesuffix("\\").strip()
        percent = "" if percent_is_unit else "%"
    number = _as_number(text)
    if number is None:
        return folded
    return f"{number}%" if percent else number


def _as_number(text: str) -> Fraction | None:
    digits = text.replace("\\$", "$").strip(_CURRENCY).strip()
    sign = 1
    if digits[:1] in ("-", "−", "+"):
        sign = 1 if digits[0] == "+" else -1
        digits = digits[1:].lstrip(_CURRENCY)
    if len(digits) > _MOST_DIGITS:
        return None
    if _GROUPED.fullmatch(digits):
        digits = digits.replace(",", "")
    if _NUMBER.fullmatch(digits):
        return sign * Fraction(digits.rstrip("."))
    match = _QUOTIENT.fullmatch(digits)
    if match is None or int(match[2]) == 0:
        return None
    return sign * Fraction(int(match[1]), int(match[2]))


def answers_agree(first: str, second: str, *, percent_is_unit: bool = False) -> bool:
    """Say whether two answers have the same normal form, and that isn't empty."""
    form = normalise_answer(first, percent_is_unit=percent_is_unit)
    return form != "" and form == normalise_answer(second, percent_is_unit=percent_is_unit)


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

    Raises:
        TypeError: A solution is a list, a dict or bytes.
    """
    return [
        _exact_score(text_of(completion), gold)
        for completion, gold in zip(completions, solution, strict=True)
    ]


exact_reward.abstains_without_solution = True  # type: ignore[attr-defined]


def _exact_score(completion: str, gold: Any) -> float | None:
    if gold is None or not (expected := final_answer(gold)).strip():
        return None
    answer = extract_answer(completion)
    if answer is None:
        answer = without_thoughts(completion)
    return float(answers_agree(answer, expected))
