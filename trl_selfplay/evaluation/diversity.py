"""Summarize a round's samples by prompt, and measure how diverse they are.

In: graded rollouts, read once. Out: a few numbers per prompt, and their means for the log. The detectors of
detectors.py compare those of two rounds.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import comb, log
from statistics import fmean
from zlib import crc32

import numpy as np

from trl_selfplay.evaluation.estimates import pass_at_k
from trl_selfplay.evaluation.repetition import is_repetitive
from trl_selfplay.evaluation.room_of_results import RoomOfResults
from trl_selfplay.rollouts.facts import digest_form
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.sequence import Rollouts

# Base success at temperature 1, from the easiest down (ReST^EM, arXiv 2312.06585, section 5.4).
DIFFICULTIES = (("easy", 0.75), ("medium", 0.5), ("hard", 0.25), ("very_hard", 0.0))

# Samples whose final answers are read. Reading one takes longer than all else that is done with it.
_MOST_ANSWERS = 4000

NormalForm = Callable[[str], Hashable]


@dataclass(slots=True)
class PromptSamples:
    """What matters of a prompt's samples without hints.

    Attributes:
        forms: Number of samples of each normal form.
        correct_forms: The same of those that are correct.
        answers: Number of samples of each final answer; none of a prompt whose answers aren't read.
        num_top: Number of samples whose answer is the round's most frequent one.
        num_tokens: Number of the policy's tokens in all of them.
        num_graded: How many have a reward.
        total_reward: The sum of their rewards.
        best_reward: The highest reward of a finished one; None without any.
        logprob: Sum of the log-probs of the samples that have one.
        num_logprob_tokens: Number of the policy's tokens in the latter.
    """

    forms: tuple[int, ...] = ()
    correct_forms: tuple[int, ...] = ()
    answers: tuple[int, ...] = ()
    num_top: int = 0
    num_tokens: int = 0
    num_graded: int = 0
    total_reward: float = 0.0
    best_reward: float | None = None
    logprob: float = 0.0
    num_logprob_tokens: int = 0

    @property
    def num_samples(self) -> int:
        """The number of samples."""
        return sum(self.forms)

    @property
    def num_correct(self) -> int:
        """The number of correct ones."""
        return sum(self.correct_forms)


Samples = Mapping[str, PromptSamples]


@dataclass(slots=True)
class RoundSamples:
    """What matters of a round's samples.

    Attributes:
        prompts: Of each prompt, those without hints.
        kept: Number of kept completions by prompt, with and without hint.
        num_repetitive: How many of the kept ones repeat themselves.
        kept_forms: A digest of prompt and normal form of each kept one, sorted, uint64.
        results: What results of tools take of those that were cut, without hints.
    """

    prompts: dict[str, PromptSamples]
    kept: dict[str, int] = field(default_factory=dict)
    num_repetitive: int = 0
    kept_forms: np.ndarray = field(default_factory=lambda: np.array([], np.uint64))
    results: RoomOfResults = field(default_factory=RoomOfResults)


class _Kinds:
    """The kinds of a prompt's samples, while they are counted."""

    __slots__ = ("answers", "correct", "forms")

    def __init__(self) -> None:
        self.forms: dict[Hashable, int] = {}
        self.correct: dict[Hashable, int] = {}
        self.answers: dict[Hashable, int] = {}


def summarize_samples(
    rollouts: Sequence[Rollout],
    normal_form: NormalForm,
    threshold: float,
    answer_form: NormalForm | None = None,
    outcomes: Sequence[str] = (),
    max_completion_length: int = 0,
) -> RoundSamples:
    """Read a round's samples once; return what matters of them.

    Args:
        rollouts: Graded or not, in any order.
        normal_form: Maps equal completions to the same form.
        threshold: Minimum reward of a correct completion.
        answer_form: Returns the normal form of a completion's final answer, or None; None reads no
            answers. Of many samples, those of some prompts are read, of the same ones in each round.
        outcomes: Of each rollout; those that are "kept" are trained on.
        max_completion_length: What they were sampled with.
    """
    kinds: dict[str, _Kinds] = {}
    found = RoundSamples({})
    kept_forms = array("Q")
    top: Counter[Hashable] = Counter()
    read_below = 2**32 * _MOST_ANSWERS / max(len(rollouts), 1)
    for place, rollout in Rollouts.of(rollouts).scan():
        is_kept = bool(outcomes) and outcomes[place] == "kept"
        if rollout.hinted and not is_kept:
            continue
        form = digest_form(normal_form(rollout.completion))
        if is_kept:
            prompt_id = rollout.prompt_id
            found.kept[prompt_id] = found.kept.get(prompt_id, 0) + 1
            found.num_repetitive += is_repetitive(rollout.own_ids, rollout.completion)
            kept_forms.append(digest_kept(prompt_id, form))
        if not rollout.hinted:
            own = found.prompts.setdefault(rollout.prompt_id, PromptSamples())
            own_kinds = kinds.setdefault(rollout.prompt_id, _Kinds())
            _count(own, own_kinds, rollout, form, threshold)
            found.results.add(rollout, max_completion_length)
            if answer_form is None or crc32(rollout.prompt_id.encode()) >= read_below:
                continue
            if (answer := answer_form(rollout.completion)) is not None:
                answer = digest_form(answer)
                own_kinds.answers[answer] = own_kinds.answers.get(answer, 0) + 1
                top[answer] += 1
    most_frequent = top.most_common(1)[0][0] if top else None
    for prompt_id, own in found.prompts.items():
        own_kinds = kinds.pop(prompt_id)
        own.forms = tuple(own_kinds.forms.values())
        own.correct_forms = tuple(own_kinds.correct.values())
        own.answers = tuple(own_kinds.answers.values())
        own.num_top = own_kinds.answers.get(most_frequent, 0)
    found.kept_forms = np.sort(np.array(kept_forms, np.uint64))
    return found


def _count(
    own: PromptSamples, kinds: _Kinds, rollout: Rollout, form: Hashable, threshold: float
) -> None:
    kinds.forms[form] = kinds.forms.get(form, 0) + 1
    num_tokens = len(rollout.own_ids)
    own.num_tokens += num_tokens
    if rollout.logprob is not None:
        own.logprob += rollout.logprob
        own.num_logprob_tokens += num_tokens
    if rollout.reward is None:
        return
    own.num_graded += 1
    own.total_reward += rollout.reward
    if rollout.passes(threshold):
        kinds.correct[form] = kinds.correct.get(form, 0) + 1
    if rollout.is_finished:
        best = own.best_reward
        own.best_reward = rollout.reward if best is None else max(rollout.reward, best)


def digest_kept(prompt_id: str, form: Hashable) -> int:
    """Return 64 bits that stand for a prompt and the normal form of one of its completions."""
    return int.from_bytes(blake2b(repr((prompt_id, form)).encode(), digest_size=8).digest())


def distinct_ratios(samples: Samples) -> dict[str, float]:
    """Return the share of distinct normal forms among each prompt's samples.

    It is 1 if all n samples differ and 1/n if none do. It falls with n, so compare rounds with equal
    n.

    Source: the exploration of B-STaR, arXiv 2412.17256, counted on all samples.
    """
    return {i: len(own.forms) / own.num_samples for i, own in samples.items()}


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
        size = min(map(sum, correct))
        if size > 0:
            for side, forms in zip(values, correct, strict=True):
                side[prompt_id] = rarefied(forms, size)
    return values


def answer_entropy(counts: Sequence[int]) -> float:
    """Return the entropy in nats of a prompt's final answers, corrected for the number of samples.

    Args:
        counts: Number of samples of each answer, at least one.

    Source: Miller, "Note on the bias of information estimates" (1955), with Madow's correction:
    −Σ_a p_a ln p_a + (A − 1) / (2n) for A different answers of n samples.
    """
    n = sum(counts)
    return (len(counts) - 1) / (2 * n) - sum(c / n * log(c / n) for c in counts)


def answer_entropies(samples: Samples) -> dict[str, float]:
    """Return the entropy of the final answers of each prompt with at least two."""
    return {i: answer_entropy(own.answers) for i, own in samples.items() if sum(own.answers) > 1}


def token_entropy(samples: Samples) -> float | None:
    """Return the entropy per token, in nats, of the distribution that was sampled from.

    It is −(1/T) Σ log p over all T sampled tokens, after temperature, penalty, top-k, top-p and min-p.
    None if the sampler gave no log-probs.
    """
    num_tokens = sum(own.num_logprob_tokens for own in samples.values())
    return -sum(own.logprob for own in samples.values()) / num_tokens if num_tokens else None


def effective_share(weights: Sequence[float]) -> float:
    """Return the effective number of prompts, (Σ w)² / Σ w², as a share of their number.

    It is 1 for equal weights, and 1/P if one of P prompts has all.
    """
    return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))


def pass_rates(samples: Samples, k: int = 1) -> dict[str, float]:
    """Return the unbiased pass@k of each prompt with at least k graded samples."""
    return {
        prompt_id: pass_at_k(own.num_graded, own.num_correct, k)
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
    if (entropy := token_entropy(now)) is not None:
        metrics["play/token_entropy"] = entropy
    if entropies := answer_entropies(now):
        metrics["play/answer_entropy"] = fmean(entropies.values())
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
