"""Grade mathematical answers by value, with math-verify, in a process that can be killed.

In: completions and gold answers. Out: 1.0 or 0.0, or None where the gold answer can't be parsed or
the comparison hung or died. math-verify's own deadlines work in the main thread alone, so they are
off and the parent's deadline counts. Only the final answer is parsed, as one LaTeX expression: left
to search whole texts, math-verify finds the 72 of `It isn't 72` and the 2 of `2x + 1`.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

from trl_selfplay.rewards.answer import extract_answer, final_answer, text_of
from trl_selfplay.rewards.worker import WorkerPool

logger = logging.getLogger(__name__)

DEADLINE_S = 5.0
# Longer texts are no answers, and parsing takes more than linear time.
_MOST_CHARACTERS = 1000
_SURROUNDINGS = "* \t\r\n"
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"))
_PERCENT = re.compile(r"([\d.,]+)\s*\\?%", re.ASCII)
_MIXED_NUMBER = re.compile(r"(\d+)\s+(\d+)/(\d+)", re.ASCII)
# math-verify makes a sum or a product of them.
_TWO_NUMBERS = re.compile(r"\d\s+\d", re.ASCII)
# Read as a product of letters, so that every anagram would be right.
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")
_COMMAND_WITH_TEXT = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|operatorname|begin|end)\{[^{}]*\}|\\[A-Za-z]+"
)

_pool = WorkerPool(__name__, "verdict")


def math_reward(
    completions: Sequence[Any], solution: Sequence[Any], **kwargs: Any
) -> list[float | None]:
    r"""Give 1.0 where a completion's final answer equals the solution in value, else 0.0.

    The final answer is what `extract_answer` finds; a completion without a marker counts only if
    all of it is one expression. None, with one warning that counts them, where the gold answer
    can't be parsed as mathematics, or where the comparison gave no verdict within 5 seconds.

    Args:
        completions: Text, or messages whose last one counts.
        solution: The ground truth in LaTeX, with or without `$` or `\boxed{}`, or a plain number
            or expression; of one with worked steps the final answer.
        **kwargs: Other columns, unused.

    Raises:
        ImportError: math-verify is not installed.
    """
    verdicts, reasons = _pool.call_each(
        [
            (None if gold is None else _expression(final_answer(gold)), _answer_in(completion))
            for completion, gold in zip(completions, solution, strict=True)
        ],
        DEADLINE_S,
    )
    if unparsed := sum(v is None for v in verdicts) - reasons.total():
        reasons["the solution can't be parsed; for words use exact_reward"] = unparsed
    for reason, count in reasons.items():
        logger.warning(
            "math_reward: no verdict for %d of %d completions: %s", count, len(verdicts), reason
        )
    return [None if v is None else float(v) for v in verdicts]


math_reward.abstains_without_solution = True  # type: ignore[attr-defined]


def _answer_in(completion: Any) -> str:
    text = text_of(completion)
    marked = extract_answer(text)
    return _expression(text if marked is None else marked)


def _expression(text: str) -> str:
    """Return an answer without what surrounds the mathematics; "" if it is too long for one."""
    if len(text) > _MOST_CHARACTERS:
        return ""
    text = text.strip(_SURROUNDINGS).removesuffix(".").strip(_SURROUNDINGS)
    for opening, closing in _DELIMITERS:
        if (
            len(text) >= len(opening + closing)
            and text.startswith(opening)
            and text.endswith(closing)
        ):
            text = text[len(opening) : -len(closing)].strip()
    return _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text.removesuffix(".").strip())


def verdict(gold: str | None, answer: str) -> bool | None:
    """Compare two expressions in this process, without a deadline; None if `gold` isn't one.

    Raises:
        ImportError: math-verify is not installed.
    """
    prepare()
    from math_verify import verify

    if gold is None or _TWO_NUMBERS.search(gold) or _WORD.search(_COMMAND_WITH_TEXT.sub("", gold)):
        return None
    # math-verify takes 5% for 5 as well as for 0.05.
    gold, answer = (_PERCENT.sub(r"\\frac{\1}{100}", text) for text in (gold, answer))
    parsed_gold = _parse(gold)
    # What could not be parsed comes back as text.
    if all(isinstance(value, str) for value in parsed_gold):
        return None
    if "$" in answer or _TWO_NUMBERS.search(answer):
        return False
    # Not symmetric: the gold answer comes first.
    return bool(verify(parsed_gold, _parse(answer), timeout_seconds=None))


def _parse(expression: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # "first_match": an expression that can't be parsed is not rescued by a part of it.
    return parse(
        f"${expression}$",
        [LatexExtractionConfig()],
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def prepare() -> None:
    """Import math-verify, or say how to install it."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'Grading maths needs math-verify: pip install "trl-selfplay[math]".'
        ) from error
