"""Compare the final answer of a completion with the solution.

In: completions as text or chat messages, and solutions, which may include worked steps. Out: 1.0 or
0.0, or None if the solution is unusable. Extraction is strict: a false 1.0 is trained on, but a
false 0.0 only costs a sample. Text inside thoughts is never an answer. Everything here takes linear
time.
"""

import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

_ANSWER_IS = re.compile(r"the\s+(?:final\s+|correct\s+)?answer\s+is\s*:?|answer\s*:", re.IGNORECASE)
_ANSWER_TAG = "<answer>"
_ANSWER_END = "</answer>"
# The tags that close a model's thoughts; the opening tag is often part of the prompt.
_THOUGHTS_END = re.compile(r"</(?:think|thinking|reasoning)>", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+", re.ASCII)
_QUOTIENT = re.compile(r"(\d+)\s*/\s*(\d+)", re.ASCII)
_BRACE = re.compile(r"[{}]")
_CURRENCY = "$€£¥"
# Longer digit strings are compared as text: no answer needs them, and large integers are slow.
_MOST_DIGITS = 60


def text_of(completion: Any) -> str:
    """Return the text of a completion, or of its last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, list):  # content parts, as for multimodal models
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def without_thoughts(text: str) -> str:
    """Return the text after the last `</think>`, `</thinking>` or `</reasoning>`, if there is one.

    >>> without_thoughts("<think>4 or 5?</think> The answer is 5.")
    ' The answer is 5.'
    """
    end = 0
    for match in _THOUGHTS_END.finditer(text):
        end = match.end()
    return text[end:]


def extract_answer(text: str) -> str | None:
    r"""Return the marked final answer of a text, or None if there is no marker.

    Closed thoughts are not searched. The markers are, in order of precedence, `\boxed{…}` with
    balanced braces, `#### …`, `<answer>…</answer>`, and "the answer is …" or "Answer: …" up to the
    end of the line. Of the first kind that occurs, the last occurrence counts; if it is empty or
    never closed, the answer is "".

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
    r"""Return the final answer of a solution, or the solution itself if it has no marker.

    A missing number (NaN) gives "".

    Raises:
        TypeError: The solution is a list, a dict or bytes.

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
    """Return whether a solution can be a single answer: text, a number or None, not a collection."""
    return isinstance(solution, str) or not isinstance(solution, Iterable)


def normalise_answer(text: str, *, percent_is_unit: bool = False) -> str | Fraction:
    """Return a normal form that is equal for equal answers: an exact number if the text is one.

    Case and white space are folded. A trailing period, surrounding `$` and currency signs are
    removed. Commas group thousands only as in 1,000,000. A percent sign is kept, since 5% is not 5,
    unless `percent_is_unit`. Digits other than 0-9 are text.

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
    """Return whether two answers have the same, non-empty normal form."""
    form = normalise_answer(first, percent_is_unit=percent_is_unit)
    return form != "" and form == normalise_answer(second, percent_is_unit=percent_is_unit)


def exact_reward(
    completions: Sequence[Any], solution: Sequence[Any], **kwargs: Any
) -> list[float | None]:
    """Return 1.0 if a completion's final answer is that of the solution, else 0.0.

    A completion without a marker counts only if all of it is the answer. Returns None if the
    solution is empty or None.

    Args:
        completions: Text, or messages, the last of which counts.
        solution: The ground truth; worked steps are allowed, see `final_answer`.
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
