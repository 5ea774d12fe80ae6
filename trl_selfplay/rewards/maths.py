"""Grade mathematical answers by value, with math-verify, in a process that can be killed.

In: completions and gold answers. Out: 1.0 or 0.0, or None if the gold answer can't be parsed or the
comparison hung or crashed. Only the final answer is parsed, as one LaTeX expression: searching whole
texts, math-verify would find the 72 in `It isn't 72` and the 2 in `2x + 1`. It compares numbers to
six decimals, which makes all tiny numbers equal, so the relative difference must be small as well.
"""

import pickle
import re
from collections.abc import Sequence
from typing import Any

from trl_selfplay.rewards.answer import extract_answer, final_answer, text_of, without_thoughts
from trl_selfplay.rewards.scores import Scores
from trl_selfplay.rewards.worker import WorkerPool

DEADLINE_S = 5.0
# Maximum difference of equal numbers, relative to the larger one: 0.142857 is 1/7.
_RELATIVE_TOLERANCE = 1e-4
_DIGITS = 20
# Longer texts aren't answers, and parsing them takes more than linear time.
_MOST_CHARACTERS = 1000
_SURROUNDINGS = "* \t\r\n"
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"))
_PERCENT = re.compile(r"([\d.,]+)\s*\\?%", re.ASCII)
_MIXED_NUMBER = re.compile(r"(\d+)\s+(\d+)/(\d+)", re.ASCII)
# math-verify reads two numbers as a sum or a product.
_TWO_NUMBERS = re.compile(r"\d\s+\d", re.ASCII)
# math-verify reads words as products of letters, so that every anagram would be right.
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")
_COMMAND_WITH_TEXT = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|operatorname|begin|end)\{[^{}]*\}|\\[A-Za-z]+"
)

_pool = WorkerPool(__name__, "verdict")


def math_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    **kwargs: Any,
) -> Scores:
    r"""Return 1.0 if a completion's final answer has the value of the solution, else 0.0.

    The final answer is found by `extract_answer`; a completion without a marker counts only if all
    of it is one expression. Returns None, and logs a count, if the gold answer isn't mathematics or
    the comparison gives no verdict within 5 seconds. After four such timeouts on one prompt, its
    other completions aren't compared.

    Args:
        completions: Text, or messages, the last of which counts.
        solution: The ground truth in LaTeX, with or without `$` or `\boxed{}`, or a plain number
            or expression; worked steps before a marked final answer are allowed.
        prompts: The prompt of each completion, which groups completions; by default the solution does.
        **kwargs: Other columns, unused.

    Raises:
        ImportError: math-verify is not installed.
        TypeError: A solution is a list, a dict or bytes.
    """
    verdicts, failures = _pool.call_each(
        [
            (None if gold is None else _expression(final_answer(gold)), _answer_in(completion))
            for completion, gold in zip(completions, solution, strict=True)
        ],
        DEADLINE_S,
        groups=list(map(pickle.dumps, solution if prompts is None else prompts)),
    )
    causes = {index: failure.cause for index, failure in failures.items()}
    for index, value in enumerate(verdicts):
        if value is None:
            causes.setdefault(index, "the solution can't be parsed; for words use exact_reward")
    scores = Scores((None if v is None else float(v) for v in verdicts), causes)
    scores.log_causes("math_reward")
    return scores


math_reward.abstains_without_solution = True  # type: ignore[attr-defined]


def _answer_in(completion: Any) -> str:
    text = text_of(completion)
    marked = extract_answer(text)
    return _expression(without_thoughts(text) if marked is None else marked)


def _expression(text: str) -> str:
    """Return an answer without the delimiters around it, or "" if it is too long for an answer."""
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
    # math-verify accepts both 5 and 0.05 for 5%.
    gold, answer = (_PERCENT.sub(r"\\frac{\1}{100}", text) for text in (gold, answer))
    parsed_gold = _parse(gold)
    # math-verify returns what it can't parse as text.
    if all(isinstance(value, str) for value in parsed_gold):
        return None
    if "$" in answer or _TWO_NUMBERS.search(answer):
        return False
    parsed = _parse(answer)
    # `verify` isn't symmetric: the gold answer comes first. Its timeout uses signals, which only work
    # in the main thread (https://github.com/huggingface/Math-Verify/issues/55), so it is off here and
    # below; the pool's deadline replaces it. Remove when math-verify has a timeout without signals.
    if not verify(parsed_gold, parsed, timeout_seconds=None):
        return False
    first, second = (
        next((value for value in values if not isinstance(value, str)), None)
        for values in (parsed_gold, parsed)
    )
    return gold == answer or first == second or _are_close(first, second)


def _are_close(first: Any, second: Any) -> bool:
    """Return whether two expressions are close relative to their size; True if they aren't numbers.

    For equations and inequalities with equal left sides, and for `x = 3` against `3`, the right
    sides are compared.
    """
    from sympy.core.relational import Relational

    if isinstance(first, Relational) and isinstance(second, Relational) and first.lhs != second.lhs:
        return True
    first, second = (e.rhs if isinstance(e, Relational) else e for e in (first, second))
    numbers, others = _numbers(first), _numbers(second)
    if numbers is None or others is None or len(numbers) != len(others):
        return True
    return all(
        bool(abs(a - b) <= _RELATIVE_TOLERANCE * max(abs(a), abs(b)))
        for a, b in zip(numbers, others, strict=True)
    )


def _numbers(expression: Any) -> list[Any] | None:
    """Return a number, or the numbers of a set, tuple or interval; None for anything else."""
    import sympy

    if isinstance(expression, sympy.Interval):
        elements = [expression.start, expression.end]
    elif isinstance(expression, (sympy.FiniteSet, sympy.Tuple)):
        elements = list(expression.args)
    elif isinstance(expression, sympy.Expr) and not expression.free_symbols:
        number = expression.evalf(_DIGITS)
        if not number.is_number or not number.is_finite:
            return None
        # Terms that cancel exactly evaluate to noise with a precision of one bit.
        return [sympy.Integer(0) if getattr(number, "_prec", 0) == 1 else number]
    else:
        return None
    found = [_numbers(element) for element in elements]
    if any(numbers is None for numbers in found):
        return None
    numbers = [number for numbers in found for number in numbers or ()]
    if isinstance(expression, sympy.FiniteSet):
        numbers.sort(key=sympy.default_sort_key)
    return numbers


def _parse(expression: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # "first_match": don't fall back to a part of an expression that can't be parsed.
    return parse(
        f"${expression}$",
        [LatexExtractionConfig()],
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def prepare() -> None:
    """Import math-verify, or raise an error that says how to install it."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'Grading maths needs math-verify: pip install "trl-selfplay[math]".'
        ) from error
