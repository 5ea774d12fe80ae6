"""Measure how diverse a round's samples are, and whether rounds reduce diversity.

In: graded rollouts of two rounds, or of held-out prompts before and after. Out: one number per
prompt, their means for the log, and warnings as text. A warning needs a change beyond its threshold
and beyond two standard errors, paired by prompt, so that noise causes none. The thresholds are ours.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from math import comb, inf
from statistics import fmean

from trl_selfplay.evaluation.estimates import paired_difference, pass_at_k
from trl_selfplay.rollouts.record import Rollout

LEAST_DISTINCT = 0.5
LEAST_DISTINCT_CORRECT = 0.7
LEAST_LENGTH, MOST_LENGTH = 0.5, 2.0
_STANDARD_ERRORS = 2.0
# Base success at temperature 1, from the easiest down (ReST^EM, arXiv 2312.06585, section 5.4).
DIFFICULTIES = (("easy", 0.75), ("medium", 0.5), ("hard", 0.25), ("very_hard", 0.0))

NormalForm = Callable[[str], Hashable]


def _by_prompt(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        if not rollout.hinted:
            groups.setdefault(rollout.prompt_id, []).append(rollout)
    return groups


def distinct_ratios(rollouts: Sequence[Rollout], normal_form: NormalForm) -> dict[str, float]:
    """Return the share of distinct normal forms among each prompt's samples.

    It is 1 if all n samples differ and 1/n if none do. It falls with n, so compare rounds with equal
    n.

    Source: the exploration of B-STaR, arXiv 2412.17256, counted on all samples.
    """
    return {
        prompt_id: len({normal_form(r.completion) for r in group}) / len(group)
        for prompt_id, group in _by_prompt(rollouts).items()
    }


def rarefied(counts: Sequence[int], size: int) -> float:
    """Return the expected number of distinct kinds in a draw of `size` without replacement.

    Args:
        counts: Number of items of each kind.
        size: Size of the draw, at most the sum of the counts.

    Source: rarefaction, Hurlbert, "The nonconcept of species diversity", Ecology 52 (1971):
    Σ_i 1 − C(N − c_i, m) / C(N, m).
    """
    total = sum(counts)
    return sum(1.0 - comb(total - count, size) / comb(total, size) for count in counts)


def distinct_correct(
    before: Sequence[Rollout], now: Sequence[Rollout], normal_form: NormalForm, threshold: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the distinct correct solutions, before and now, of each prompt solved in both rounds.

    Both are rarefied to the smaller number of correct samples. Otherwise a prompt that is solved more
    often would seem more diverse.

    Source: RFT, arXiv 2308.01825, Table 3: distinct reasoning paths per question.
    """
    forms: list[dict[str, Counter[Hashable]]] = [{}, {}]
    for counts, rollouts in zip(forms, (before, now), strict=True):
        for prompt_id, group in _by_prompt(rollouts).items():
            correct = [normal_form(r.completion) for r in group if r.passes(threshold)]
            if correct:
                counts[prompt_id] = Counter(correct)
    values: tuple[dict[str, float], dict[str, float]] = {}, {}
    for prompt_id in forms[0].keys() & forms[1].keys():
        counters = [side[prompt_id] for side in forms]
        size = min(counter.total() for counter in counters)
        for side, counter in zip(values, counters, strict=True):
            side[prompt_id] = rarefied(list(counter.values()), size)
    return values


def mean_lengths(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the mean number of tokens of each prompt's completions."""
    groups = _by_prompt(rollouts)
    return {i: fmean(len(r.completion_ids) for r in group) for i, group in groups.items()}


def pass_rates(rollouts: Sequence[Rollout], threshold: float, k: int = 1) -> dict[str, float]:
    """Return the unbiased pass@k of each prompt with at least k graded samples."""
    rates = {}
    for prompt_id, group in _by_prompt(rollouts).items():
        graded = [r for r in group if r.reward is not None]
        if len(graded) >= k:
            correct = sum(r.passes(threshold) for r in graded)
            rates[prompt_id] = pass_at_k(len(graded), correct, k)
    return rates


def solved_by_difficulty(
    base_rates: Mapping[str, float], rates: Mapping[str, float]
) -> dict[str, float]:
    """Return the share of prompts with a correct sample, by how often the base model solved them.

    Args:
        base_rates: Pass rate of each prompt in round 0.
        rates: Pass rate of each prompt now. Prompts in only one of the two are left out.

    Source: ReST^EM, arXiv 2312.06585, section 5.4: easy from 75 % of samples solved, medium from
    50 %, hard from 25 %, very hard below.
    """
    groups: dict[str, list[bool]] = {}
    for prompt_id in base_rates.keys() & rates.keys():
        name = next(name for name, least in DIFFICULTIES if base_rates[prompt_id] >= least)
        groups.setdefault(name, []).append(rates[prompt_id] > 0.0)
    return {name: fmean(groups[name]) for name, _ in DIFFICULTIES if name in groups}


def best_rewards(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the highest reward among each prompt's finished samples."""
    best: dict[str, float] = {}
    for rollout in rollouts:
        if rollout.reward is not None and not rollout.hinted and not rollout.is_truncated:
            best[rollout.prompt_id] = max(rollout.reward, best.get(rollout.prompt_id, -inf))
    return best


def diversity_metrics(
    first: Sequence[Rollout],
    now: Sequence[Rollout],
    normal_form: NormalForm,
    threshold: float,
    has_degrees: bool = False,
) -> dict[str, float]:
    """Return a round's diversity metrics for the log, named play/….

    Args:
        first: The samples of round 0.
        now: The samples of this round.
        normal_form: Maps equal completions to the same form.
        threshold: Minimum reward of a correct completion.
        has_degrees: Rewards are graded and may never reach the threshold. The best reward per prompt
            is logged, and metrics of correct completions only if there are any.
    """
    metrics = {"play/distinct": fmean(distinct_ratios(now, normal_form).values())}
    if has_degrees:
        if best := best_rewards(now):
            metrics["play/best_reward"] = fmean(best.values())
        if not any(rollout.passes(threshold) for rollout in (*first, *now)):
            return metrics
    metrics["play/coverage"] = fmean(r > 0.0 for r in pass_rates(now, threshold).values() or [0.0])
    _, correct = distinct_correct(now, now, normal_form, threshold)
    if correct:
        metrics["play/distinct_correct"] = fmean(correct.values())
    shares = solved_by_difficulty(pass_rates(first, threshold), pass_rates(now, threshold))
    return metrics | {f"play/solved_{name}": share for name, share in shares.items()}


def _falls_below(
    before: Mapping[str, float], now: Mapping[str, float], share: float
) -> tuple[float, float] | None:
    """Return both means over the common prompts if the second is below `share` of the first."""
    common = before.keys() & now.keys()
    change, error = paired_difference(before, now)
    if change is None or error is None or change >= -_STANDARD_ERRORS * error:
        return None
    means = fmean(before[i] for i in common), fmean(now[i] for i in common)
    return means if means[1] < share * means[0] else None


def warn_poorer_samples(
    first: Sequence[Rollout],
    now: Sequence[Rollout],
    normal_form: NormalForm,
    threshold: float,
    round_index: int,
) -> list[str]:
    """Return warnings if a round's samples are less diverse, shorter or longer than those of round 0."""
    warnings = []
    remedy = (
        "Raise temperature, deduplicate, lower max_per_prompt, or train each round from the base "
        "(start_from='base')."
    )
    if found := _falls_below(
        distinct_ratios(first, normal_form), distinct_ratios(now, normal_form), LEAST_DISTINCT
    ):
        warnings.append(
            f"round {round_index}: {found[1]:.2f} of a prompt's completions are distinct, "
            f"{found[0]:.2f} in round 0. {remedy}"
        )
    before, after = distinct_correct(first, now, normal_form, threshold)
    if found := _falls_below(before, after, LEAST_DISTINCT_CORRECT):
        warnings.append(
            f"round {round_index}: prompts solved in both rounds have {found[1]:.2f} distinct "
            f"correct completions at equal numbers of samples, {found[0]:.2f} in round 0. {remedy}"
        )
    lengths = mean_lengths(first), mean_lengths(now)
    shorter = _falls_below(*lengths, LEAST_LENGTH)
    longer = _falls_below(lengths[1], lengths[0], 1.0 / MOST_LENGTH)
    if drifted := shorter or (longer and longer[::-1]):
        warnings.append(
            f"round {round_index}: completions have {drifted[1]:.0f} tokens on average, "
            f"{drifted[0]:.0f} in round 0. Read some: is the reward met by length alone? "
            "max_completion_length bounds them."
        )
    return warnings


def warn_sharpening(
    before: Sequence[Rollout], now: Sequence[Rollout], threshold: float, round_index: int
) -> str | None:
    """Return a warning if held-out pass@1 rose and pass@k fell, each by two standard errors.

    Args:
        before: Held-out samples of the untrained model.
        now: Held-out samples after the round on the same prompts; k is the smallest number of samples
            per prompt.
        threshold: Minimum reward of a passing completion.
        round_index: The round, for the warning.

    Source: "Progress or Regress? Self-Improvement Reversal in Post-training", arXiv 2407.05013.
    """
    groups = [*_by_prompt(before).values(), *_by_prompt(now).values()]
    k = min((sum(r.reward is not None for r in group) for group in groups), default=0)
    if k < 2:
        return None
    changes = {}
    for size in (1, k):
        scores = [pass_rates(rollouts, threshold, size) for rollouts in (before, now)]
        change, error = paired_difference(*scores)
        if change is None or error is None or abs(change) <= _STANDARD_ERRORS * error:
            return None
        changes[size] = change
    if not changes[1] > 0.0 > changes[k]:
        return None
    return (
        f"round {round_index}: sharpening. Held-out pass@1 has risen by {changes[1]:.3f} and "
        f"pass@{k} has fallen by {-changes[k]:.3f} since before training: the model repeats what it "
        "could do rather than learn what it couldn't. Raise temperature, deduplicate, lower "
        "max_per_prompt, or train each round from the base (start_from='base')."
    )
