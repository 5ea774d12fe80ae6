"""Detectors of held-out scores that fall, alone or while something else rises.

In: `Evidence` of a round. Out: a `Reading`, larger is worse, or None where the evidence is absent. Scores are
compared by prompt.
"""

from math import copysign, inf, sqrt

from trl_selfplay.evaluation.diversity import Samples, pass_rates
from trl_selfplay.evaluation.evidence import (
    Evidence,
    Reading,
    change_of,
    has_risen,
    mean_rewards_of,
    reading_of,
    span,
)


def measure_heldout_fall(e: Evidence) -> Reading | None:
    """Measure s(best round so far) − s(this round), the mean held-out score by prompt, paired."""
    change = change_of(e.best, e.scores)
    if change is None:
        return None
    fall, error = -change[0], change[1]
    return reading_of(
        fall,
        error,
        f"the held-out score is {fall:.3f} below that of {e.best_name}, the best so far "
        f"({span(fall, error)})",
    )


def measure_sharpening(e: Evidence) -> Reading | None:
    """Measure pass@k(untrained) − pass@k(now) on held-out prompts; counts if pass@1 has risen.

    k is the smallest number of samples of a prompt. Both by two standard errors, paired.

    Source: "Progress or Regress? Self-Improvement Reversal in Post-training", arXiv 2407.05013.
    """
    if e.untrained_samples is None or e.scored_samples is None:
        return None
    now = e.scored_samples
    before = {i: own for i, own in e.untrained_samples.items() if i in now}
    k = min((own.num_graded for own in (*before.values(), *now.values())), default=0)
    if k < 2:
        return None
    one, many = (change_of(pass_rates(before, n), pass_rates(now, n)) for n in (1, k))
    if one is None or many is None:
        return None
    return reading_of(
        -many[0],
        many[1],
        f"sharpening. Held-out pass@1 has risen by {one[0]:.3f} and pass@{k} has fallen by "
        f"{-many[0]:.3f} ({span(-many[0], many[1])}) since before training: the model repeats what "
        "it could do rather than learn what it couldn't",
        counts=has_risen(one),
    )


def measure_gap(e: Evidence) -> Reading | None:
    """Measure the growth of pass@1(training samples) − pass@1(held-out samples) since round 0.

    Both of the weights that sampled the round. Each is paired by prompt, and the two standard errors
    are added in quadrature.
    """
    if e.pair is None or e.untrained_samples is None or e.sampler_heldout is None:
        return None
    train = change_of(*(pass_rates(side.prompts) for side in e.pair))
    heldout = change_of(pass_rates(e.untrained_samples), pass_rates(e.sampler_heldout))
    if train is None or heldout is None:
        return None
    growth, error = train[0] - heldout[0], sqrt(train[1] ** 2 + heldout[1] ** 2)
    return reading_of(
        growth,
        error,
        f"since round 0, pass@1 has changed by {train[0]:+.3f} on training prompts and by "
        f"{heldout[0]:+.3f} on held-out ones; the gap has grown by {growth:.3f} "
        f"({span(growth, error)}): the model memorises",
    )


def measure_reward_against_check(e: Evidence) -> Reading | None:
    """Measure the fall of the held-out score under another check; counts if the mean reward rose.

    Only with `eval_reward_funcs` of their own. Both by two standard errors, paired, since round 0.
    """
    fall = change_of(e.untrained, e.scores)
    if not e.has_other_check or e.pair is None or fall is None:
        return None
    reward = change_of(*(mean_rewards_of(side.prompts) for side in e.pair))
    if reward is None:
        return None
    return reading_of(
        -fall[0],
        fall[1],
        f"the mean reward has risen by {reward[0]:.3f} since round 0, and the held-out score, which "
        f"other functions give, has fallen by {-fall[0]:.3f} ({span(-fall[0], fall[1])})",
        counts=has_risen(reward),
    )


def measure_vote_drift(e: Evidence) -> Reading | None:
    """Measure the fall of the held-out score where votes grade; counts if agreement has risen.

    Agreement is the share of a prompt's most frequent answer among its answers. Both by two standard
    errors, paired, since round 0.
    """
    fall = change_of(e.untrained, e.scores)
    if not e.votes or e.pair is None or fall is None:
        return None
    agreement = change_of(*(_agreement(side.prompts) for side in e.pair))
    if agreement is None:
        return None
    return reading_of(
        -fall[0],
        fall[1],
        f"agreement has risen by {agreement[0]:.3f} since round 0, and the held-out score has fallen "
        f"by {-fall[0]:.3f} ({span(-fall[0], fall[1])}): the votes confirm errors",
        counts=has_risen(agreement),
    )


def _agreement(samples: Samples) -> dict[str, float]:
    return {i: max(own.answers) / sum(own.answers) for i, own in samples.items() if own.answers}


def measure_transfer(e: Evidence) -> Reading | None:
    """Measure the surest fall of the score of a further held-out set since before training, paired.

    The sets after the first of an `eval_dataset` that is a dict. The surest fall is the one of most
    standard errors; of falls without error, which count as the surest, the largest.
    """
    found: list[tuple[float, float, str]] = []
    for name, (before, now) in e.other_sets.items():
        if (change := change_of(before, now)) is not None:
            found.append((-change[0], change[1], name))
    if not found:
        return None
    fall, error, name = max(found, key=_significance)
    return reading_of(
        fall,
        error,
        f"the score of the held-out set {name!r} has fallen by {fall:.3f} since before training "
        f"({span(fall, error)})",
    )


def _significance(found: tuple[float, float, str]) -> tuple[float, float]:
    fall, error, _ = found
    return fall / error if error else copysign(inf, fall) if fall else 0.0, fall
