"""Detectors of what is sampled and what of it is kept.

In: `Evidence` of a round. Out: a `Reading`, larger is worse, or None where the evidence is absent. "Since round
0" is paired by prompt if both rounds have most prompts in common.
"""

from collections.abc import Callable
from dataclasses import replace
from math import expm1, log, log2, sqrt
from statistics import fmean

import numpy as np

from trl_selfplay.evaluation.diversity import (
    Samples,
    answer_entropies,
    distinct_correct,
    distinct_ratios,
    effective_share,
)
from trl_selfplay.evaluation.estimates import binomial_interval, standard_error
from trl_selfplay.evaluation.evidence import (
    Evidence,
    Parts,
    Reading,
    has_learnt,
    parts_of,
    percent,
    reading_of,
    relative_fall,
    share_of,
)

LEAST_NEW = 0.01


# --- what is sampled -----------------------------------------------------------------------------


def _fall_of(e: Evidence, parts: Callable[[Samples], Parts], what: str) -> Reading | None:
    """Return the relative fall of a ratio since round 0; `what` has fields for both values."""
    if e.pair is None:
        return None
    found = relative_fall(*(parts(side.prompts) for side in e.pair))
    if found is None:
        return None
    fall, error, before, now = found
    return reading_of(fall, error, f"{what.format(now, before)} (a fall of {percent(fall, error)})")


def measure_coverage(e: Evidence) -> Reading | None:
    """Count the last rounds in a row in which under 1 % of the prompts were newly solved.

    A prompt is solved if one of its samples is correct, and newly solved if it wasn't in the last round
    that sampled it. Rounds in which under 1 % are unsolved don't count: nothing is left.
    """
    if not e.newly_solved:
        return None
    count = 0
    for new, _, unsolved in reversed(e.newly_solved):
        if new >= LEAST_NEW or unsolved < LEAST_NEW:
            break
        count += 1
    new, lost, unsolved = e.newly_solved[-1]
    return reading_of(
        float(count),
        0.0,
        f"{count} rounds in a row have solved under {LEAST_NEW:.0%} of the prompts anew; in this one "
        f"{new:.1%} are new, {lost:.1%} are lost, and {unsolved:.1%} are unsolved",
    )


def measure_distinct(e: Evidence) -> Reading | None:
    """Measure the relative fall of distinct normal forms / samples, mean over prompts.

    It counts unless the model has learnt: right completions are also fewer completions.
    """
    reading = _fall_of(
        e,
        lambda samples: parts_of(distinct_ratios(samples)),
        "{:.2f} of a prompt's completions are distinct, {:.2f} in round 0, without a higher held-out "
        "score",
    )
    return _unless_learnt(e, reading)


def measure_distinct_correct(e: Evidence) -> Reading | None:
    """Measure the relative fall of distinct correct forms of prompts solved in both rounds, rarefied."""
    if e.pair is None:
        return None
    before, now = distinct_correct(*(side.prompts for side in e.pair))
    found = relative_fall(parts_of(before), parts_of(now))
    if found is None:
        return None
    fall, error, first, last = found
    return reading_of(
        fall,
        error,
        f"prompts solved in both rounds have {last:.2f} distinct correct completions at equal "
        f"numbers of samples, {first:.2f} in round 0 (a fall of {percent(fall, error)})",
    )


def measure_answer_entropy(e: Evidence) -> Reading | None:
    """Measure the relative fall of −Σ p_a ln p_a + (A − 1)/(2n) over final answers, mean over prompts.

    It counts unless the model has learnt.
    """
    reading = _fall_of(
        e,
        lambda samples: parts_of(answer_entropies(samples)),
        "the final answers of a prompt have an entropy of {:.3f} nats, {:.3f} in round 0, without a "
        "higher held-out score",
    )
    return _unless_learnt(e, reading)


def measure_token_entropy(e: Evidence) -> Reading | None:
    """Measure the relative fall of −(1/T) Σ log p(token) under the distribution sampled from.

    It counts unless the model has learnt. The built-in sampler gives the log-probs; an engine doesn't.
    """
    reading = _fall_of(
        e,
        lambda samples: {
            i: (-own.logprob, own.num_logprob_tokens)
            for i, own in samples.items()
            if own.num_logprob_tokens
        },
        "sampling has an entropy of {:.4f} nats per token, {:.4f} in round 0, without a higher "
        "held-out score",
    )
    return _unless_learnt(e, reading)


def _unless_learnt(e: Evidence, reading: Reading | None) -> Reading | None:
    if reading is None:
        return None
    return replace(reading, counts=has_learnt(e) is False)


def measure_length_drift(e: Evidence) -> Reading | None:
    """Measure |log2(mean tokens now / in round 0)|: 1 is half or double."""
    if e.pair is None or not e.is_graded:
        return None
    found = relative_fall(
        *(
            {i: (own.num_tokens, own.num_samples) for i, own in side.prompts.items()}
            for side in e.pair
        )
    )
    if found is None or found[3] <= 0.0:
        return None
    _, error, before, now = found
    return reading_of(
        abs(log2(now / before)),
        error * before / now / log(2.0),  # of log2, by the delta method
        f"completions have {now:.0f} tokens on average, {before:.0f} in round 0",
    )


def measure_one_answer(e: Evidence) -> Reading | None:
    """Measure the rise, since round 0, of the share of all answers that is the most frequent one."""
    if e.pair is None:
        return None
    shares = [
        [own.num_top / sum(own.answers) for own in side.prompts.values() if own.answers]
        for side in e.pair
    ]
    errors = [standard_error(values) for values in shares]
    if errors[0] is None or errors[1] is None:
        return None
    before, now = map(fmean, shares)
    error = sqrt(errors[0] ** 2 + errors[1] ** 2)
    return reading_of(
        now - before,
        error,
        f"one answer is {now:.0%} of the answers to all prompts; in round 0 the most frequent one was "
        f"{before:.0%}",
    )


def measure_drift(e: Evidence) -> Reading | None:
    """Measure the mean of r − 1 − ln r over sampled completions, r = p_0(y) / p_t(y).

    It estimates KL(p_t ‖ p_0) in nats per completion, of the distributions sampled from; p_0 has the
    weights from before round 0.

    Source: Schulman, "Approximating KL Divergence" (2020), the estimator k3, which is never negative.
    """
    if not e.log_probs:
        return None
    # Rounding alone makes r larger than e^50.
    logs = [min(base - now, 50.0) for now, base in e.log_probs]
    values = [expm1(log_r) - log_r for log_r in logs]
    error = standard_error(values) or 0.0
    return reading_of(
        fmean(values),
        error,
        f"the model is {fmean(values):.2f} nats per completion away from the one before round 0",
    )


# --- what is kept --------------------------------------------------------------------------------


def measure_truncation(e: Evidence) -> Reading | None:
    """Measure the share of completions without hint that were cut by length."""
    if e.funnel is None:
        return None
    truncated, sampled = e.funnel.unhinted.truncated, e.funnel.sampled
    low, high = binomial_interval(truncated, sampled)
    return share_of(
        truncated,
        sampled,
        f"{truncated} of {sampled} completions were cut by length ({truncated / max(sampled, 1):.0%}, "
        f"95 % interval {low:.0%} to {high:.0%}) and are lost"
        + ("" if e.now is None else e.now.results.describe()),
    )


def measure_repetition(e: Evidence) -> Reading | None:
    """Measure the share of kept completions that repeat themselves.

    In such a one, 8 tokens in a row occur 4 times without overlap, or the text compresses to under a
    fifth by zlib.
    """
    if e.now is None:
        return None
    kept = sum(e.now.kept.values())
    return share_of(
        e.now.num_repetitive,
        kept,
        f"{e.now.num_repetitive} of {kept} kept completions repeat themselves",
    )


def measure_concentration(e: Evidence) -> Reading | None:
    """Measure 1 − (Σ w)² / (P Σ w²), w kept completions of each of the P prompts that have any."""
    if e.now is None or not e.now.kept:
        return None
    share = effective_share(list(e.now.kept.values()))
    count = len(e.now.kept)
    return reading_of(
        1.0 - share,
        0.0,
        f"the kept completions of {count} prompts weigh like those of {share * count:.0f}: few "
        "prompts have most of them",
    )


def measure_starvation(e: Evidence) -> Reading | None:
    """Measure the share of the warm-up that the round's optimizer steps don't reach.

    Source: STaR, arXiv 2203.14465, section 4.1: 100 warm-up steps in each round and 40, 48, 57, …
    steps, so that the paper's own first rounds never reach the learning rate.
    """
    if e.steps is None or e.warmup_steps is None:
        return None
    reached = 1.0 if e.warmup_steps == 0 else e.steps / e.warmup_steps
    return reading_of(
        max(0.0, 1.0 - reached),
        0.0,
        f"{e.steps} optimizer steps, fewer than {e.warmup_steps} warm-up steps; the learning rate gets "
        f"no further than {reached:.0%} of its value",
    )


def measure_hint_share(e: Evidence) -> Reading | None:
    """Measure the share of kept completions that were sampled with a hint."""
    if e.funnel is None or not e.funnel.hinted.sampled:
        return None
    hinted, kept = e.funnel.hinted.kept, e.funnel.kept
    return share_of(
        hinted,
        kept,
        f"{hinted} of {kept} kept completions ({hinted / max(kept, 1):.0%}) were sampled with the "
        "answer as hint",
    )


def measure_false_positives(e: Evidence) -> Reading | None:
    """Measure the share of up to 100 random kept completions that `eval_reward_funcs` reject."""
    if e.rejected is None:
        return None
    rejected, graded = e.rejected
    low, high = binomial_interval(rejected, graded)
    return share_of(
        rejected,
        graded,
        f"eval_reward_funcs reject {rejected} of {graded} kept completions (95 % interval {low:.0%} "
        f"to {high:.0%})",
    )


def measure_duplicates(e: Evidence) -> Reading | None:
    """Measure the share of kept completions that an earlier round kept too, by normal form."""
    if e.now is None or e.earlier_kept is None or not len(e.now.kept_forms):
        return None
    repeated = int(np.isin(e.now.kept_forms, e.earlier_kept).sum())
    kept = len(e.now.kept_forms)
    return share_of(
        repeated,
        kept,
        f"{repeated} of {kept} kept completions ({repeated / kept:.0%}) were kept by an earlier round "
        "as well",
    )
