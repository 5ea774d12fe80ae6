r"""Grade mathematical answers by value, in processes that can be killed.

In: completions and gold answers. Out: 1.0 or 0.0, or None if the gold answer can't be read or the
comparison hung or crashed. Only the final answer is read, as a whole: searching whole texts would
find the 72 in `It isn't 72`. `expressions.py` reads both, and `equality.py`
compares them.
"""

import functools
import pickle
from collections.abc import Sequence
from typing import Any

from trl_selfplay.rewards.answer import answer_in, final_answer, text_of
from trl_selfplay.rewards.equality import has_value, same
from trl_selfplay.rewards.expressions import read
from trl_selfplay.rewards.scores import Scores
from trl_selfplay.rewards.values import UnreadableError, unit_of
from trl_selfplay.rewards.worker import WorkerPool

DEADLINE_S = 5.0
# Longer texts aren't answers, and reading them takes more than linear time.
_MOST_CHARACTERS = 1000
_UNREADABLE = "the solution can't be read as mathematics"

_pool = WorkerPool(__name__, "verdict")


def math_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    **kwargs: Any,
) -> Scores:
    r"""Return 1.0 if a completion's final answer has the value of the solution, else 0.0.

    The final answer is found by `extract_answer`; a completion in which it
    finds none counts only if all of it is one answer. Returns None, with a cause and one warning per cause, if the solution can't
    be read as mathematics, isn't equal to itself (`1/0`), or if the comparison gives no verdict within
    5 seconds. After four such timeouts on one prompt, its longer completions aren't compared.

    What is compared:

    - Exact numbers must be equal. Decimals may be rounded: the relative difference is at most 1e-4,
      and less than one unit of the last digit shown. `0.142857` is 1/7, and `0.143` isn't.
    - `5%` and `5 per cent` are 0.05, and not 5. `1,000`, `1{,}000` and `1 000` are 1000; `(1,000)` is a pair.
      `2\frac{1}{2}` and `2 1/2` are mixed numbers. `0.(3)` and `0.333...` repeat.
    - A unit may be missing on either side. Two units must be the same: there is no conversion, so
      neither `50 mm` nor `5 m` is `5 cm`. Currencies and degrees are units. Where the solution has
      none, an answer may have a known unit or a plural, such as `5 apples`; other words (`5 bn`,
      `5 tripled`) make it wrong.
    - `40+32` and `2^{10}` are results. A sum, product, integral, limit, greatest divisor, maximum or
      determinant is none, unless the solution has one, since it may be the question.
    - Expressions with variables are equal if their values are, at several points that a hash of both
      determines: exactly for rational functions. Upper and lower case differ. `\log` without a base
      has base 10.
    - Capital letters alone, such as `AB` or `\angle ABC`, are compared in order, since they may be a name, a numeral
      or a product of matrices: `BA` is wrong, also for a segment. `ba` is `ab`.
    - Lists and sets are equal in any order: `x=2 or x=3`, `2, 3`, `\{3, 2\}`, `\pm`. Tuples, vectors and
      matrices have an order and a shape; `(3,4)` is neither `\{3,4\}` nor `3, 4`.
    - Brackets of intervals count. `1<x\le 2` is `(1,2]`, and `(1,2)` is an interval or a point alike.
    - `x=3` is 3, and isn't `y=3`. `7=8` is nothing; `2x=6` isn't 3. Equations are equal if they differ
      by a factor, inequalities if by a positive one.
    - `10_2` is only `10_2`, `12:00` only `12:00` and `2:4` only `2:4`.
    - Words, in `\text{}` or alone, are compared letter by letter, without case.

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
    golds = [None if gold is None else _shortened(final_answer(gold)) for gold in solution]
    verdicts, failures = _pool.call_each(
        [
            (gold, _shortened(answer_in(text_of(completion))))
            for gold, completion in zip(golds, completions, strict=True)
        ],
        DEADLINE_S,
        groups=list(map(pickle.dumps, solution if prompts is None else prompts)),
    )
    causes = {index: failure.cause for index, failure in failures.items()}
    for index, value in enumerate(verdicts):
        if value is None:
            causes.setdefault(index, _UNREADABLE)
    scores = Scores((None if v is None else float(v) for v in verdicts), causes)
    scores.log_causes("math_reward")
    return scores


math_reward.abstains_without_solution = True  # type: ignore[attr-defined]


def _shortened(text: str) -> str:
    """Return an answer, or "" if it is too long for one."""
    return "" if len(text) > _MOST_CHARACTERS else text


def verdict(gold: str | None, answer: str) -> bool | None:
    """Compare two answers in this process, without a deadline; None if `gold` can't be read.

    Raises:
        ImportError: math-verify is not installed.
    """
    expected = None if gold is None else _read_gold(gold)
    if expected is None:
        return None
    try:
        return same(expected, read(answer, unit_of(expected), any_words=False))
    except UnreadableError:
        return False


@functools.lru_cache(maxsize=256)
def _read_gold(gold: str) -> Any:
    """Return what a solution describes; None if it can't be read or has no value."""
    try:
        expected = read(gold)
        return expected if has_value(expected) else None
    except UnreadableError:
        return None


def prepare() -> None:
    """Import the parser, or raise an error that says how to install it."""
    try:
        import latex2sympy2_extended  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'Grading maths needs math-verify: pip install "trl-selfplay[math]".'
        ) from error
