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

from trl_selfplay.rewards.conclusions import before_explanation, conclude
from trl_selfplay.rewards.quantities import known_units, plain, read_quantity
from trl_selfplay.rewards.statements import (
    STEP,
    Statement,
    find_statements,
    resolve,
    take_back,
)
from trl_selfplay.rewards.transcript import last_turns, without_thoughts

_PLAUSIBLE_LENGTH = 120
_NO_ANSWER = re.compile(
    r"\b(?:let['’]?s|let us|we need|first,? (?:we|let|i)\b|step by step|to find|to solve)\b",
    re.IGNORECASE,
)
# A turn that is one short line is an answer, if the model went on with turns of its own.
_IS_BARE = re.compile(r"\s*(?!Q|Problem|Exercise|Instruct|Human|User)[^\n:?]{1,60}\s*")
_BARE_FENCE = re.compile(r"\s*```[\w+-]{0,20}\n(.*?)\n?```\s*", re.DOTALL)
_ARTICLE = re.compile(r"^(?:the|an?)\s+(?=\S\S)")
_TIGHT = re.compile(r"\s*([,;:()\[\]{}])\s*")
_HALF_DAY = re.compile(r"\b([ap])\.\s?m\b\.?")
_CLOCK = re.compile(r"(?<=\d)\s?([ap]m)\b")
_ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b")
_MONTHS = """january february march april may june july august september october november
    december"""
_DATE_WORD = re.compile(r"[a-z]+|\d{1,4}")
_CURRENCIES = frozenset({"dollar", "euro", "pound", "yen", "rupee", "won"})
_YES_NO = frozenset({"yes", "no", "true", "false"})
_SECOND_THOUGHTS = {"wait", "actually", "but", "can", "cannot", "unable", "sorry", "know", "sure"}
# "Yes, it is not", "No, it is"
_CONTRADICTS = {
    True: re.compile(r"\s*(?!because|since|as\b)[^.;]{0,60}?(?:\bnot\b|\bnever\b|n't\b)"),
    False: re.compile(
        r"\s*(?:it|this|that|they|he|she|there)\s(?:is|are|does|do|can|will|was|has|did)(?:\s(?:true|correct|right))?\s*$"
    ),
}
_RESTATED = re.compile(r",?\s+(?:or|i\.e\.,?|that\s+is,?)\s+", re.IGNORECASE)
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


def text_of(completion: Any) -> str:
    """Return the text of a completion, or of its last message that isn't a tool's."""
    if isinstance(completion, str):
        return completion
    written = [message for message in completion if message.get("role") != "tool"] or completion
    content = written[-1]["content"] if written else ""
    if isinstance(content, list):  # content parts, as for multimodal models
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def extract_answer(text: str) -> str | None:
    r"""Return the final answer of a text, or None if the text doesn't say which it is.

    Thoughts, tokens of chat templates and turns after the model's own are not read. An answer is, from
    the most to the least final:

    - what `\boxed{…}`, `<answer>…</answer>`, the key `answer` of a JSON object or "final answer" hold,
      or `####`, where it is no Markdown heading;
    - what follows "the answer is" or "Answer:", in the sentence or, if nothing does, the next line;
    - what follows "the result is" or "Output:"; a last sentence that begins with "So", "Therefore" or
      the like and has one number; the only bold number of the last line; a number or a word before its
      explanation.

    The last statement counts. If it contradicts one that is at least as final, without a word such as
    "wait" or a calculation between them, the answer is "". So it is if a marker is empty or never
    closed, or if the text takes its answer back. "The answer isn't 5" and "if the answer is 5" state
    none.

    >>> extract_answer("3 + 4 = 7, so the answer is 7.")
    '7'
    """
    parts = last_turns(text)
    for part in parts:
        answer = _marked_answer(part)
        if answer is None:
            answer = conclude(part)
        if answer is None:
            answer = before_explanation(part)
        if answer is None and len(parts) > 1 and _IS_BARE.fullmatch(part):
            answer = part.strip()
        if answer is not None:
            return answer
    return None


def _marked_answer(text: str, least: int = STEP) -> str | None:
    statements = [s for s in find_statements(text) if s.finality >= least]
    plausible = [s for s in statements if _is_plausible(s)]
    standing = resolve(text, plausible, _agree)
    if standing is None or standing.finality == STEP:
        answer = conclude(text) if least == STEP else None
        if answer is not None and (standing is None or text.rfind(answer) >= standing.start):
            return answer
    standing = standing or (statements[-1] if statements else None)
    return None if standing is None else take_back(text, standing, _agree).value


def _is_plausible(statement: Statement) -> bool:
    """Return whether a statement is an answer, and not the beginning of an explanation."""
    return statement.finality > 1 or (
        bool(statement.value)
        and len(statement.value) <= _PLAUSIBLE_LENGTH
        and _NO_ANSWER.search(statement.value) is None
    )


def _agree(first: str, second: str) -> bool | None:
    """Return whether two answers are the same; None if they can't be compared."""
    if first == second or answers_agree(first, second):
        return True
    numbers = read_quantity(first), read_quantity(second)
    if all(numbers):
        return False
    words = normalise_answer(first), normalise_answer(second)
    if not all(isinstance(form, str) for form in words):
        return None
    one, other = str(words[0]), str(words[1])
    if re.search(rf"(?<!\w){re.escape(one)}(?!\w)", other) or re.search(
        rf"(?<!\w){re.escape(other)}(?!\w)", one
    ):
        return True
    return False if re.fullmatch(r"[\w\s'.,-]+", one + other) else None


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
    text = without_thoughts(str(solution).strip()).strip()
    marked = _marked_answer(text, least=STEP + 1)
    return text if marked is None else marked


def is_answer(solution: Any) -> bool:
    """Return whether a solution can be a single answer: text, a number or None, not a collection."""
    return isinstance(solution, str) or not isinstance(solution, Iterable)


def normalise_answer(text: str, *, percent_is_unit: bool = False) -> str | Fraction:
    r"""Return a normal form that is equal for equal answers: an exact number if the text is one.

    Markdown, LaTeX's delimiters, currency signs, quotation marks, a final period and an article at
    the beginning are removed; case and white space are folded. Commas and spaces group thousands only
    as in 1,000,000. A percent sign is kept, since 5% is not 5, unless `percent_is_unit`; so are known
    units after a number, but not other words: `72 clips` is 72. Digits other than 0-9 are text.

    >>> normalise_answer("1,000.0") == normalise_answer("1000")
    True
    """
    quantity = read_quantity(text)
    if quantity is not None:
        units = known_units(quantity.units) - _CURRENCIES - ({"%"} if percent_is_unit else set())
        return f"{quantity.number} {' '.join(sorted(units))}" if units else quantity.number
    folded = _HALF_DAY.sub(r"\1m", plain(text).casefold())
    folded = _TIGHT.sub(r"\1", _CLOCK.sub(r" \1", folded))
    return _as_date(folded) or _ARTICLE.sub("", folded, count=1)


def _as_date(text: str) -> str | None:
    """Return a date with the name of a month as year-month-day, or None."""
    words = _DATE_WORD.findall(_ORDINAL.sub("", text))
    months = [
        i
        for i, m in enumerate(_MONTHS.split(), 1)
        for w in words
        if w == m or (w == m[:3] and len(w) == 3)
    ]
    numbers = [int(word) for word in words if word.isdigit()]
    others = [w for w in words if not w.isdigit() and w not in ("of", "the", "on")]
    if len(months) != 1 or len(others) != 1 or len(numbers) not in (1, 2):
        return None
    return "-".join([str(months[0]), *map(str, sorted(numbers))])


def answers_agree(first: str, second: str, *, percent_is_unit: bool = False) -> bool:
    """Return whether two answers are the same: equal numbers whose units don't differ, or equal text."""
    numbers = read_quantity(first), read_quantity(second)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0].agrees(numbers[1], percent_is_unit=percent_is_unit)
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
    answer = answer_in(completion)
    return float(answers_agree(answer, expected) or _says(answer, expected))


def answer_in(text: str) -> str:
    r"""Return the final answer of a text, or all of what a text without one says.

    >>> answer_in("<think>4 or 5?</think>```\n5\n```<|im_end|>")
    '5'
    """
    answer = extract_answer(text)
    if answer is not None:
        return _said_once(answer)
    parts = last_turns(text)
    text = parts[0].strip() if parts else ""
    fence = _BARE_FENCE.fullmatch(text)
    return fence[1] if fence else text


def _said_once(answer: str) -> str:
    """Return one of two equal quantities: of `1500 dollars, or $1,500.00` the first."""
    parts = _RESTATED.split(answer)
    if len(parts) != 2 or not all(read_quantity(part) for part in parts):
        return answer
    return parts[0] if answers_agree(*parts) else answer


def _says(answer: str, expected: str) -> bool:
    """Return whether an answer begins with the "yes" or "no" that is expected: `Yes, it is prime`."""
    word = plain(expected).casefold()
    if word not in _YES_NO:
        return False
    first, rest = (*re.split(r"[,.;:—–]", plain(answer).casefold(), maxsplit=1), "")[:2]
    # "there is no other" is no "no"
    rest = re.sub(r"\bno\s+(?=[a-z])", "", rest)
    words = set(re.findall(r"\w+", rest))
    return (
        plain(first) == word
        and words.isdisjoint({_OPPOSITE[word], *_SECOND_THOUGHTS})
        and not _CONTRADICTS[word in ("yes", "true")].match(rest)
    )
