"""Estimate held-out scores with confidence intervals.

In: graded rollouts of held-out prompts. Out: metrics by name. Intervals are over prompts, because
samples of the same prompt aren't independent.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from math import comb, inf, prod, sqrt
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

from trl_selfplay.rollouts.facts import call_metrics
from trl_selfplay.rollouts.record import Rollout


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of the probability that at least one of k samples is right.

    Args:
        n: Number of samples of the prompt.
        c: Number of right ones.
        k: Size of the draw, at most n.

    Raises:
        ValueError: Not 0 ≤ c ≤ n and 1 ≤ k ≤ n.

    Source: "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, Eq. 1:
    1 − C(n−c, k) / C(n, k), as a product of ratios near 1.

    >>> round(pass_at_k(n=10, c=3, k=5), 6)
    0.916667
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k of n={n}, c={c}, k={k}; it needs 0 <= c <= n and 1 <= k <= n.")
    if n - c < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def best_of_k(scores: Sequence[float], correct: Sequence[bool], k: int) -> float:
    """Return the probability that the best-scored of k samples, drawn from all N, is right.

    Ties are broken at random: the result is the average over all orders of samples with equal scores.

    Args:
        scores: Scores of a prompt's N samples; higher is better.
        correct: Whether each sample is right.
        k: Size of the draw, at most N.

    Raises:
        ValueError: Lengths differ, or not 1 ≤ k ≤ N.

    Source: V-STaR, arXiv 2402.06457, Eq. 3: Σ_i C(N−i−1, k−1) α_i / C(N, k), where α_i says
    whether the sample at place i (from 0, best first) is right.
    """
    n = len(scores)
    if len(correct) != n or not 1 <= k <= n:
        raise ValueError(
            f"best-of-k of {n} scores, {len(correct)} verdicts and k={k}; it needs as many "
            "verdicts as scores and 1 <= k <= their number."
        )
    # The sum is linear in α, so averaging over tie orders is averaging α within each tie.
    shares = {
        score: fmean(right for s, right in zip(scores, correct, strict=True) if s == score)
        for score in scores
    }
    alpha = [shares[score] for score in sorted(scores, reverse=True)]
    return sum(comb(n - i - 1, k - 1) * alpha[i] for i in range(n - k + 1)) / comb(n, k)


def mean_best_of_k(
    rollouts: Sequence[Rollout],
    scores: Sequence[float | None],
    ks: Sequence[int],
    reward_threshold: float = 1.0,
) -> dict[int, float]:
    """Return, by k, how often the best-scored of k samples is right, on average over the prompts.

    Args:
        rollouts: Graded samples. A truncated one is wrong.
        scores: Of each sample; None is the worst.
        ks: Numbers of samples to choose from; at most those of each prompt.
        reward_threshold: Minimum reward of a right one.

    Raises:
        ValueError: As `best_of_k`.
    """
    known = [-inf if score is None else score for score in scores]
    return _mean_over_prompts(best_of_k, rollouts, known, ks, reward_threshold)


def majority_at_k(forms: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Return the probability that the majority of k samples, drawn from all N, is right.

    Ties are broken at random. A draw without a vote is wrong.

    Args:
        forms: The normal form of the answer of each of a prompt's N samples; None doesn't vote.
        correct: Whether each sample is right.
        k: Size of the draw, at most N.

    Raises:
        ValueError: Lengths differ, or not 1 ≤ k ≤ N.

    Source: self-consistency, arXiv 2203.11171; here, its expected value over all draws.
    """
    n = len(forms)
    if len(correct) != n or not 1 <= k <= n:
        raise ValueError(
            f"the majority of k={k} of {n} answers and {len(correct)} verdicts; it needs as many "
            "verdicts as answers and 1 <= k <= their number."
        )
    verdicts: dict[Hashable, list[bool]] = {}
    for form, right in zip(forms, correct, strict=True):
        if form is not None:
            verdicts.setdefault(form, []).append(right)
    num_silent = n - sum(map(len, verdicts.values()))
    won = 0.0
    for form, own in verdicts.items():
        others = [len(theirs) for other, theirs in verdicts.items() if other != form]
        for votes in range(1, min(len(own), k) + 1) if any(own) else ():
            ways = comb(len(own), votes) * _ways_to_win(others, num_silent, votes, k - votes)
            won += fmean(own) * ways
    return won / comb(n, k)


def _ways_to_win(others: Sequence[int], num_silent: int, votes: int, rest: int) -> float:
    """Return the number of ways to draw the rest so that no other form has more votes.

    A way in which t others have as many counts 1 / (t + 1).
    """
    ways = {(0, 0): 1}  # by the number of samples drawn, and of forms with as many votes
    for count in others:
        before, ways = ways, {}
        for (drawn, tied), number in before.items():
            for taken in range(min(count, votes, rest - drawn) + 1):
                key = drawn + taken, tied + (taken == votes)
                ways[key] = ways.get(key, 0) + number * comb(count, taken)
    return sum(
        number * comb(num_silent, rest - drawn) / (tied + 1)
        for (drawn, tied), number in ways.items()
    )


def mean_majority_at_k(
    rollouts: Sequence[Rollout],
    forms: Sequence[Hashable | None],
    ks: Sequence[int],
    reward_threshold: float = 1.0,
) -> dict[int, float]:
    """Return, by k, how often the majority of k samples is right, on average over the prompts.

    It is what voting reaches without training on the votes.

    Args:
        rollouts: Graded samples. A truncated one is wrong.
        forms: The normal form of each sample's answer; None doesn't vote.
        ks: Numbers of samples that vote; at most those of each prompt.
        reward_threshold: Minimum reward of a right one.

    Raises:
        ValueError: As `majority_at_k`.
    """
    return _mean_over_prompts(majority_at_k, rollouts, forms, ks, reward_threshold)


def _mean_over_prompts(
    estimate: Callable[[Sequence[Any], Sequence[bool], int], float],
    rollouts: Sequence[Rollout],
    values: Sequence[Any],
    ks: Sequence[int],
    reward_threshold: float,
) -> dict[int, float]:
    """Return, by k, the mean of an estimate of a prompt's samples: their values, and which are right."""
    by_prompt: dict[str, tuple[list[Any], list[bool]]] = {}
    for rollout, value in zip(rollouts, values, strict=True):
        of_prompt, correct = by_prompt.setdefault(rollout.prompt_id, ([], []))
        of_prompt.append(value)
        correct.append(rollout.passes(reward_threshold))
    return {k: fmean(estimate(*each, k) for each in by_prompt.values()) for k in ks}


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of one value per prompt; None for fewer than two."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) / sqrt(len(values))


def paired_difference(
    before: Mapping[str, float], after: Mapping[str, float]
) -> tuple[float | None, float | None]:
    """Return the mean change of a score on the same prompts, and its standard error.

    Args:
        before: Score per prompt id.
        after: Score per prompt id. Prompts in only one of the two are left out.

    Returns:
        The mean of after − before and its standard error; None if there are too few prompts.
    """
    changes = [after[i] - before[i] for i in sorted(before.keys() & after.keys())]
    return (fmean(changes) if changes else None), standard_error(changes)


def binomial_interval(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share; (0, 1) for n = 0.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927).
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1.0 + level) / 2.0)
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap_interval(
    values: Sequence[float], draws: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over prompts.

    Args:
        values: One value per prompt, at least one.
        draws: Number of resampled sets of prompts.
        seed: Seeds the resampling; the same values and seed give the same interval.
        level: Share of resampled means within the interval.

    Raises:
        ValueError: No values.
    """
    if len(values) == 0:
        raise ValueError("a bootstrap interval needs at least one value.")
    array = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    # Drawn one set at a time: draws × prompts indices at once would be 80 MB for 10,000 prompts.
    means = [array[generator.integers(len(array), size=len(array))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def interval_of_shares(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean over prompts of shares, each from 0 to 1.

    A bootstrap of equal values has no width, however few they are. For these it is Wilson's interval,
    with one trial per prompt: of all values from 0 to 1 with a given mean, those of trials vary most.

    Args:
        values: One share per prompt, at least one.

    Raises:
        ValueError: No values.
    """
    if values and min(values) == max(values):
        return binomial_interval(values[0] * len(values), len(values))
    return bootstrap_interval(values)


def interval_of_scores(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of a mean over prompts; None if all are equal.

    Nothing is known of the spread of equal values without bounds.

    Args:
        values: One value per prompt, at least one.

    Raises:
        ValueError: No values.
    """
    if values and min(values) == max(values):
        return None
    return bootstrap_interval(values)


def summarize_heldout(
    rollouts: Iterable[Rollout], *, reward_threshold: float | None, prefix: str = "eval"
) -> dict[str, float]:
    """Return the metrics of one held-out set.

    A completion passes if it is finished and its reward is at least the threshold. As in
    selection, a truncated completion is wrong even if its answer is right, and so is a trajectory that
    ended without an answer. Completions on which every reward function abstained don't count.

    Args:
        rollouts: The greedy completion of each prompt (`sample_index` 0) and samples (from 1 on).
        reward_threshold: Minimum reward of a passing completion; None if rewards are graded.
        prefix: Prefix of the names.

    Returns:
        For greedy completions: `{prefix}_accuracy` with `_accuracy_low` and `_accuracy_high`
        (Wilson), `_mean_reward`, `_mean_length` (tokens of the policy), and the shares `_truncated` and
        `_abstained`; of trajectories also `_tools/call_frequency`, `_tools/failure_frequency` and
        `_tools/rerendered_frequency`. For samples: `{prefix}_pass@k` for k = 1, 2, 4, … and for the
        number of samples, the first and the last with `_low` and `_high` (bootstrap over prompts; Wilson if all have the
        same value); prompts with fewer than k graded samples are left out. Without a threshold,
        `_mean_reward` with `_low` and `_high` (bootstrap) replaces
        accuracy, and `_mean_sampled_reward`, over prompts and their samples, replaces pass@k. Metrics
        without data are absent.
    """
    rewards: dict[str, float | None] = {}  # of greedy completions
    lengths: list[int] = []
    calls: list[tuple[int, int, int]] = []
    has_tools = False
    num_passed = num_truncated = 0
    samples: dict[str, list[tuple[float, bool]]] = {}
    for r in rollouts:
        passes = reward_threshold is not None and r.passes(reward_threshold)
        if r.sample_index == 0:
            rewards[r.prompt_id] = r.reward
            lengths.append(len(r.own_ids))
            calls.append((r.num_calls, r.num_failed_calls, r.num_rerendered_turns))
            has_tools = has_tools or len(r.messages) > 0
            num_passed += passes
            num_truncated += r.is_truncated
        elif r.reward is not None:
            samples.setdefault(r.prompt_id, []).append((r.reward, passes))
    metrics: dict[str, float] = {}
    graded = [reward for _, reward in sorted(rewards.items()) if reward is not None]
    if graded and reward_threshold is not None:
        low, high = binomial_interval(num_passed, len(graded))
        metrics["accuracy"] = num_passed / len(graded)
        metrics["accuracy_low"], metrics["accuracy_high"] = low, high
    if graded:
        metrics["mean_reward"] = fmean(graded)
        if reward_threshold is None:
            low, high = bootstrap_interval(graded)
            metrics["mean_reward_low"], metrics["mean_reward_high"] = low, high
    if lengths:
        metrics["mean_length"] = fmean(lengths)
        metrics["truncated"] = num_truncated / len(lengths)
        metrics["abstained"] = 1.0 - len(graded) / len(lengths)
    if has_tools:
        metrics |= call_metrics(*zip(*calls, strict=True))
    if reward_threshold is not None:
        verdicts = [[passes for _, passes in own] for _, own in sorted(samples.items())]
        metrics |= _pass_at_k_metrics(verdicts)
    elif samples:
        means = [fmean(reward for reward, _ in own) for own in samples.values()]
        metrics["mean_sampled_reward"] = fmean(means)
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def _pass_at_k_metrics(verdicts: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Return pass@k of prompts, given whether each of their samples is right."""
    most = max(map(len, verdicts), default=0)
    powers = {2**i for i in range(most.bit_length())}
    ks = sorted({k for k in powers if k <= most} | ({most} if most else set()))
    metrics: dict[str, float] = {}
    for k in ks:
        values = [pass_at_k(len(v), sum(v), k) for v in verdicts if len(v) >= k]
        metrics[f"pass@{k}"] = fmean(values)
        if k in (1, most):
            metrics[f"pass@{k}_low"], metrics[f"pass@{k}_high"] = interval_of_shares(values)
    return metrics
