"""What is known of a round, how two rounds are compared, and the number that a detector makes of it.

In: summaries of samples and held-out scores by prompt. Out: `Evidence`, changes with their standard errors,
and `Reading`s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

from trl_selfplay.evaluation.diversity import RoundSamples, Samples
from trl_selfplay.evaluation.estimates import binomial_interval, paired_difference
from trl_selfplay.rollouts.funnel import Funnel

_Z = 1.96  # of a 95 % interval
# A share of fewer is too uncertain for an alarm, whatever it is.
_MIN_COUNTED = 10

Scores = Mapping[str, float]


@dataclass(slots=True)
class Evidence:
    """What is known of a round so far. What is None is not there (yet).

    Attributes:
        round_index: The round.
        now: Its samples; None if it sampled nothing.
        first: Those of round 0, if they were sampled in the same way.
        funnel: The outcomes of its samples.
        is_graded: Whether reward functions graded them.
        newly_solved: Of each sampling round so far, the share of prompts that are solved now and were
            not in the one before, the share that are no longer solved, and the share that are unsolved.
        earlier_kept: Digests of what earlier rounds kept, sorted.
        rejected: Number of kept completions that `eval_reward_funcs` reject, and of those graded so.
        log_probs: Of some completions, the log-prob under the weights that sampled them, and under
            those from before round 0.
        votes: Whether a majority vote graded the samples.
        sampler_scores: Held-out scores by prompt of the weights that sampled.
        sampler_heldout: Held-out samples of these weights.
        steps: Number of optimizer steps.
        warmup_steps: How many of them warm up.
        untrained: Held-out scores by prompt of the untrained model, of the first set.
        best: The same of the best round before this one.
        scores: The same after this round.
        best_name: Names the best round.
        untrained_samples: Held-out samples of the untrained model.
        scored_samples: Held-out samples after the round.
        other_sets: By name of each further held-out set, scores of the untrained model and now.
        has_other_check: Whether `eval_reward_funcs` differ from the reward functions.
    """

    round_index: int
    now: RoundSamples | None = None
    first: RoundSamples | None = None
    funnel: Funnel | None = None
    is_graded: bool = False
    newly_solved: list[tuple[float, float, float]] = field(default_factory=list)
    earlier_kept: np.ndarray | None = None
    rejected: tuple[int, int] | None = None
    log_probs: Sequence[tuple[float, float]] = ()
    votes: bool = False
    sampler_scores: Scores | None = None
    sampler_heldout: Samples | None = None
    steps: int | None = None
    warmup_steps: int | None = None
    untrained: Scores | None = None
    best: Scores | None = None
    scores: Scores | None = None
    best_name: str = ""
    untrained_samples: Samples | None = None
    scored_samples: Samples | None = None
    other_sets: Mapping[str, tuple[Scores, Scores]] = field(default_factory=dict)
    has_other_check: bool = False

    @property
    def pair(self) -> tuple[RoundSamples, RoundSamples] | None:
        """The samples of round 0 and of this round, if it is a later one."""
        if self.first is None or self.now is None or self.round_index == 0:
            return None
        return self.first, self.now


@dataclass(frozen=True, slots=True)
class Reading:
    """What a detector measured in a round.

    Attributes:
        value: The number that its threshold is for; larger is worse.
        error: Its standard error; 0.0 for a fact without sampling error.
        finding: What was found, as the beginning of a sentence after "round 3: ".
        low: Lower end of its 95 % interval.
        high: Upper end.
        counts: Whether it can raise an alarm, as far as other conditions are concerned.
    """

    value: float
    error: float
    finding: str
    low: float
    high: float
    counts: bool = True


def reading_of(value: float, error: float, finding: str, counts: bool = True) -> Reading:
    """Return a reading with the interval of a normal distribution."""
    return Reading(value, error, finding, value - _Z * error, value + _Z * error, counts)


def share_of(part: int, whole: int, finding: str) -> Reading | None:
    """Return the reading of a share; None of nothing.

    Its error is that of Wilson's interval, which isn't 0 where the share is 0 or 1. A share of fewer
    than 10 raises no alarm.
    """
    if whole == 0:
        return None
    low, high = binomial_interval(part, whole)
    error = (high - low) / (2.0 * _Z)
    return Reading(part / whole, error, finding, low, high, counts=whole >= _MIN_COUNTED)


def span(value: float, error: float, digits: int = 3) -> str:
    """Return a 95 % interval as text."""
    low, high = value - _Z * error, value + _Z * error
    return f"95 % interval {low:.{digits}f} to {high:.{digits}f}"


def percent(value: float, error: float) -> str:
    """Return a share with its 95 % interval as text."""
    return f"{value:.0%}, 95 % interval {value - _Z * error:.0%} to {value + _Z * error:.0%}"


# --- comparing two rounds ------------------------------------------------------------------------

Parts = Mapping[str, tuple[float, float]]


def relative_fall(before: Parts, now: Parts) -> tuple[float, float, float, float] | None:
    """Return how far a ratio has fallen, as a share, with its standard error, and both ratios.

    A ratio is Σ a / Σ b over prompts, such as tokens per sample; with b = 1 it is a mean. The fall is
    1 − now / before. Its standard error is that of the linearized ratio, paired by prompt if at least
    half of the prompts are in both rounds, from both rounds as they are otherwise.

    Args:
        before: (a, b) by prompt.
        now: The same of the later round.

    Returns:
        The fall, its standard error, the ratio before and now; None for fewer than two prompts, or if
        the ratio was not above 0.
    """
    common = sorted(before.keys() & now.keys())
    is_paired = 2 * len(common) >= max(len(before), len(now))
    ids = (common, common) if is_paired else (sorted(before), sorted(now))
    if min(map(len, ids)) < 2:
        return None
    ratios: list[float] = []
    residuals: list[np.ndarray] = []
    for side, chosen in zip((before, now), ids, strict=True):
        a, b = np.array([side[i] for i in chosen], float).T
        if b.sum() == 0.0:
            return None
        ratios.append(float(a.sum() / b.sum()))
        residuals.append((a - ratios[-1] * b) / b.mean())
    if ratios[0] <= 0.0:
        return None
    scale = ratios[1] / ratios[0]
    if is_paired:
        error = _error(residuals[1] - scale * residuals[0])
    else:
        error = sqrt(_error(residuals[1]) ** 2 + (scale * _error(residuals[0])) ** 2)
    return 1.0 - scale, error / ratios[0], ratios[0], ratios[1]


def _error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / sqrt(len(values)))


def parts_of(values: Scores) -> Parts:
    """Return values whose ratio is their mean."""
    return {prompt_id: (value, 1.0) for prompt_id, value in values.items()}


def change_of(before: Scores | None, now: Scores | None) -> tuple[float, float] | None:
    """Return the mean change of scores on the same prompts and its standard error, or None."""
    if before is None or now is None:
        return None
    change, error = paired_difference(before, now)
    return None if change is None or error is None else (change, error)


def has_risen(change: tuple[float, float] | None) -> bool:
    """Return whether a change is a rise by two standard errors."""
    return change is not None and change[0] > 2.0 * change[1]


def has_learnt(e: Evidence) -> bool | None:
    """Return whether the weights that sampled score higher than the untrained ones; None: unknown.

    By held-out scores; without them, by the rewards of the round's own samples.
    """
    if e.untrained and e.sampler_scores:
        return has_risen(change_of(e.untrained, e.sampler_scores))
    if e.pair is None or not e.is_graded:
        return None
    return has_risen(change_of(*(mean_rewards_of(side.prompts) for side in e.pair)))


def mean_rewards_of(samples: Samples) -> dict[str, float]:
    """Return the mean reward of each prompt with graded samples."""
    return {i: own.total_reward / own.num_graded for i, own in samples.items() if own.num_graded}
