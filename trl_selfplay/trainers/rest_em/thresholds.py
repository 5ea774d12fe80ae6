"""Decide which rewards are high enough: a value, a percentile, or between mean and maximum.

In: graded rollouts and a level. Out: a test of single rollouts. Pure functions of records.

Source: ReST, arXiv 2308.08998: F(x, y; τ) = 1[R(x, y) > τ] (section 3, Eq. 2, strict), and the
thresholds of a prompt's own candidates (appendix A.7).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from math import inf, isfinite
from statistics import fmean

import numpy as np

from trl_selfplay.rollouts.record import Rollout

THRESHOLD_KINDS = ("value", "percentile", "interpolate")
_RANGES = {"value": (-inf, inf), "percentile": (0.0, 100.0), "interpolate": (0.0, 1.0)}


def check_thresholds(thresholds: Sequence[float], kind: str) -> None:
    """Raise ValueError for thresholds that don't rise or are outside their kind's range."""
    if kind not in THRESHOLD_KINDS:
        raise ValueError(f"threshold_kind={kind!r}; choose one of {THRESHOLD_KINDS}.")
    if not thresholds:
        raise ValueError(
            "improve_thresholds is empty; give one threshold per Improve step, or None."
        )
    for lower, higher in itertools.pairwise(thresholds):
        if not lower < higher:
            raise ValueError(
                f"improve_thresholds={list(thresholds)}: {higher} doesn't rise above {lower}. "
                "Each Improve step trains on a smaller, better part of the same samples, so the "
                "thresholds must rise strictly."
            )
    low, high = _RANGES[kind]
    for place, level in enumerate(thresholds):
        if level == -inf and place == 0:
            continue  # no filter
        if not (low <= level <= high and isfinite(level)):
            raise ValueError(
                f"improve_thresholds has {level} with threshold_kind={kind!r}; it must be between "
                f"{low:g} and {high:g}, or, as the first one, -inf (no filter)."
            )


def threshold_of(rewards: Sequence[float], kind: str, level: float) -> float:
    """Return the threshold τ given by a prompt's own candidates.

    Args:
        rewards: Rewards of one prompt's candidates, at least one.
        kind: "percentile": the percentile `level` (0 to 100) of the rewards, interpolated
            linearly. "interpolate": τ = level · max + (1 − level) · mean.
        level: See `kind`.

    Source: ReST, arXiv 2308.08998, appendix A.7: τ_γ(x) = γ V^max(x) + (1 − γ) V^mean(x).
    """
    if kind == "percentile":
        return float(np.percentile(rewards, level))
    return level * max(rewards) + (1.0 - level) * fmean(rewards)


def above_threshold(
    rollouts: Iterable[Rollout], kind: str, level: float
) -> Callable[[Rollout], bool]:
    """Return the test for a reward strictly above the threshold; -inf passes all.

    For percentiles and interpolation, a prompt without a reward strictly above its threshold (all
    are equal, or the level is the maximum) keeps the completions with its maximum reward, so no prompt
    is lost.

    Args:
        rollouts: All rollouts to test; abstentions and unfinished ones don't affect thresholds.
        kind: See `threshold_of`; "value" uses `level` itself for all prompts.
        level: The threshold, percentile or position, depending on `kind`.
    """
    if level == -inf:
        return lambda rollout: True
    if kind == "value":
        return lambda rollout: rollout.reward is not None and rollout.reward > level
    rewards: dict[str, list[float]] = {}
    for rollout in rollouts:
        if rollout.reward is not None and rollout.is_finished:
            rewards.setdefault(rollout.prompt_id, []).append(rollout.reward)
    # A mean of equal numbers can be off by a rounding error, above or below their maximum.
    thresholds = {i: min(threshold_of(r, kind, level), max(r)) for i, r in rewards.items()}
    highest = {i: max(r) for i, r in rewards.items()}

    def is_above(rollout: Rollout) -> bool:
        if rollout.reward is None or rollout.prompt_id not in thresholds:
            return False
        best = highest[rollout.prompt_id]
        return rollout.reward > thresholds[rollout.prompt_id] or rollout.reward == best

    return is_above
