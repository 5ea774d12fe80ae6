"""Grade mathematical answers by value, with math-verify, in a process that can be killed.

In: completions and gold answers. Out: 1.0 or 0.0, or None where the gold answer can't be parsed or
the comparison raised, hung or died. math-verify's own deadlines work in the main thread alone, so
they are off and the parent's deadline counts.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from trl_selfplay.rewards.answer import text_of
from trl_selfplay.rewards.worker import Worker, WorkerFailure

logger = logging.getLogger(__name__)

DEADLINE_S = 5.0
_MISSING = 'Grading maths needs math-verify: pip install "trl-selfplay[math]".'


def math_reward(
    completions: Sequence[Any], solution: Sequence[Any], **kwargs: Any
) -> list[float | None]:
    r"""Give 1.0 where a completion's final answer equals the solution in value, else 0.0.

    Gold answers are LaTeX (`$\frac{1}{2}$`, `\boxed{2}`) or plain numbers and expressions. Of a
    completion, the last answer of the strictest form found counts; an earlier number never
    rescues it. None, with one warning that counts them, where the gold answer can't be parsed, or
    where the comparison gave no verdict within 5 seconds.

    Args:
        completions: Text, or messages whose last one counts.
        solution: The ground truth.
        **kwargs: Other columns, unused.

    Raises:
        ImportError: math-verify is not installed.
    """
    worker = _worker()
    scores: list[float | None] = []
    reasons: Counter[str] = Counter()
    for completion, gold in zip(completions, solution, strict=True):
        try:
            verdict = worker.call(
                None if gold is None else str(gold), text_of(completion), deadline_s=DEADLINE_S
            )
        except WorkerFailure as failure:
            reasons[str(failure).split(":")[0]] += 1
            scores.append(None)
            continue
        if verdict is None:
            reasons["the solution can't be parsed"] += 1
        scores.append(None if verdict is None else float(verdict))
    for reason, count in reasons.items():
        logger.warning(
            "math_reward: no verdict for %d of %d completions: %s", count, len(scores), reason
        )
    return scores


@cache
def _worker() -> Worker:
    return Worker(__name__, "verdict")


def close_workers() -> None:
    """End the grading process; the next call starts another."""
    if _worker.cache_info().currsize:
        _worker().close()


def verdict(gold: str | None, answer: str) -> bool | None:
    """Compare in this process, without a deadline; None if `gold` can't be parsed.

    Raises:
        ImportError: math-verify is not installed.
    """
    prepare()
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    if gold is None or not gold.strip():
        return None
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # `parse` adds the raw text to what it parsed; a list with only text was not parsed.
    parsed_gold = parse(gold, configs, parsing_timeout=None)
    if all(isinstance(value, str) for value in parsed_gold):
        parsed_gold = parse(f"${gold}$", configs, parsing_timeout=None)
    if all(isinstance(value, str) for value in parsed_gold):
        return None
    # Only the last match of the strictest form: "any_match" would go on to earlier numbers.
    parsed = parse(answer, configs, extraction_mode="first_match", parsing_timeout=None)
    # Not symmetric: the gold answer comes first.
    return bool(verify(parsed_gold, parsed, timeout_seconds=None))


def prepare() -> None:
    """Import math-verify, or say how to install it."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING) from error


# The worker calls this before its first verdict, so that importing isn't counted as grading.
verdict.prepare = prepare  # type: ignore[attr-defined]  # a function may carry its own set-up
