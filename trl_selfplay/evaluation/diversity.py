"""Measure how diverse a round's samples are, and whether rounds reduce diversity.

In: graded rollouts of two rounds, or of held-out prompts before and after. Out: one number per
prompt, their means for the log, and warnings as text. A warning needs a change beyond its threshold
and beyond two standard errors, paired by prompt, so that noise causes none. The thresholds are ours.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

from trl_selfplay.evaluation.estimates import paired_difference, pass_at_k
from trl_selfplay.rollouts.facts import digest_form
from trl_selfplay.rollouts.record import Rollout

LEAST_DISTINCT = 0.5
LEAST_DISTINCT_CORRECT = 0.7
LEAST_LENGTH, MOST_LENGTH = 0.5, 2.0
_STANDARD_ERRORS = 2.0
# Base success at temperature 1, from the easiest down (ReST^EM, arXiv 2312.06585, section 5.4).
DIFFICULTIES = (("easy", 0.75), ("medium", 0.5), ("hard", 0.25), ("very_hard", 0.0))

NormalForm = Callable[[str], Hashable]


@dataclass(slots=True)
class PromptSamples:
    """What matters of a prompt's samples without hints.

    Attributes:
        forms: A stand-in for the normal form of each.
        correct_forms: The same of those that are correct.
        num_tokens: Of all completions together.
        num_graded: How many have a reward.
        best_reward: The highest reward of a finished one; None without any.
    """

    forms: list[Hashable]
    correct_forms: list[Hashable]
    num_tokens: int = 0
    num_graded: int = 0
    best_reward: float | None = None


Samples = Mapping[str, PromptSamples]


def summarize_samples(
    rollouts: Iterable[Rollout], normal_form: NormalForm, threshold: float
) -> dict[str, PromptSamples]:
    """Read a round's samples once; return what matters of them by prompt.

    Args:
        rollouts: Graded, in any order; those with hints don't count.
        normal_form: Maps equal completions to the same form.
        threshold: Minimum reward of a correct completion.
    """
    samples: dict[str, PromptSamples] = {}
    for rollout in rollouts:
        if rollout.hinted:
            continue
        own = samples.get(rollout.prompt_id)
        if own is None:
            own = samples[rollout.prompt_id] = PromptSamples([], [])
        form = digest_form(normal_form(rollout.completion))
        own.forms.append(form)
        own.num_tokens += len(rollout.completion_ids)
        if rollout.reward is not None:
            own.num_graded += 1
            if rollout.passes(threshold):
                own.correct_forms.append(form)
            if not rollout.is_truncated:
                best = own.best_reward
                own.best_reward = rollout.reward if best is None else max(rollout.reward, best)
    return samples


def distinct_ratios(samples: Samples) -> dict[str, float]:
    """Return the share of distinct normal forms among each prompt's samples.

    It is 1 if all n samples differ and 1/n if none do. It falls with n, so compare rounds with equal
    n.

    Source: the exploration of B-STaR, arXiv 2412.17256, counted on all samples.
    """
    return {i: len(set(own.forms)) / len(own.forms) for i, own in samples.items()}


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


def distinct_correct(before: Samples, now: Samples) -> tuple[dict[str, float], dict[str, float]]:
    """Return the distinct correct solutions, before and now, of each prompt solved in both rounds.

    Both are rarefied to the smaller number of correct samples. Otherwise a prompt that is solved more
    often would seem more diverse.

    Source: RFT, arXiv 2308.01825, Table 3: distinct reasoning paths per question.
    """
    values: tuple[dict[str, float], dict[str, float]] = {}, {}
    for prompt_id in before.keys() & now.keys():
        correct = [side[prompt_id].correct_forms for side in (before, now)]
        size = min(map(len, correct))
        if size > 0:
            for side, forms in zip(values, correct, strict=True):
                side[prompt_id] = rarefied(list(Counter(forms).values()), size)
    return values


def mean_lengths(samples: Samples) -> dict[str, float]:
    """Return the mean number of tokens of each prompt's completions."""
    return {i: own.num_tokens / len(own.forms) for i, own in samples.items()}


def pass_rates(samples: Samples, k: int = 1) -> dict[str, float]:
    """Return the unbiased pass@k of each prompt with at least k graded samples."""
    return {
        prompt_id: pass_at_k(own.num_graded, len(own.correct_forms), k)
        for prompt_id, own in samples.items()
        if own.num_graded >= k
    }


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


def best_rewards(samples: Samples) -> dict[str, float]:
    """Return the highest reward among each prompt's finished samples."""
    return {i: own.best_reward for i, own in samples.items() if own.best_reward is not None}


def diversity_metrics(first: Samples, now: Samples, has_degrees: bool = False) -> dict[str, float]:
    """Return a round's diversity metrics for the log, named play/….

    Args:
        first: The samples of round 0.
        now: The samples of this round.
        has_degrees: Rewards are graded and may never reach the threshold. The best reward per prompt
            is logged, and metrics of correct completions only if there are any.
    """
    metrics = {"play/distinct": fmean(distinct_ratios(now).values())}
    if has_degrees:
        if best := best_rewards(now):
            metrics["play/best_reward"] = fmean(best.values())
        if not any(own.correct_forms for own in (*first.values(), *now.values())):
            return metrics
    metrics["play/coverage"] = fmean(r > 0.0 for r in pass_rates(now).values() or [0.0])
    _, correct = distinct_correct(now, now)
    if correct:
        metrics["play/distinct_correct"] = fmean(correct.values())
    shares = solved_by_difficulty(pass_rates(first), pass_rates(now))
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


def warn_poorer_samples(first: Samples, now: Samples, round_index: int) -> list[str]:
    """Return warnings if a round's samples are less diverse, shorter or longer than those of round 0."""
    warnings = []
    remedy = (
        "Raise temperature, deduplicate, lower max_per_prompt, or train each round from the base "
        "(start_from='base')."
    )
    if found := _falls_below(distinct_ratios(first), distinct_ratios(now), LEAST_DISTINCT):
        warnings.append(
            f"round {round_index}: {found[1]:.2f} of a prompt's completions are distinct, "
            f"{found[0]:.2f} in round 0. {remedy}"
        )
    before, after = distinct_correct(first, now)
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


def warn_sharpening(before: Samples, now: Samples, round_index: int) -> str | None:
    """Return a warning if held-out pass@1 rose and pass@k fell, each by two standard errors.

    Args:
        before: Held-out samples of the untrained model.
        now: Held-out samples after the round on the same prompts; k is the smallest number of samples
            per prompt.
        round_index: The round, for the warning.

    Source: "Progress or Regress? Self-Improvement Reversal in Post-training", arXiv 2407.05013.
    """
    k = min((own.num_graded for own in (*before.values(), *now.values())), default=0)
    if k < 2:
        return None
    changes = {}
    for size in (1, k):
        scores = [pass_rates(samples, size) for samples in (before, now)]
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
