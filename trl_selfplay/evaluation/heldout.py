"""Score held-out prompts: greedy accuracy and pass@k of graded completions.

In: a config's sampling options, graded rollouts. Out: metrics with the names that TRL's evaluation
expects, and each prompt's score for paired comparisons.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_selfplay.generation.sampler import SamplingOptions, build_sampling_options
from trl_selfplay.rollouts.record import Rollout

TOP_P_EVAL = 0.95


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """Scores of held-out prompts.

    Attributes:
        metrics: Metrics by name, including the prefix.
        by_prompt: Score per prompt id of the first set, higher is better: 1.0 if the greedy completion
            passed, its reward if rewards are graded, or the log-prob per token of the data's
            completion if the method learns from data.
        seconds: Wall-clock time.
        num_tokens: Tokens that were sampled for them, those of all steps of an agent.
    """

    metrics: Mapping[str, float]
    by_prompt: Mapping[str, float]
    seconds: float
    num_tokens: int = 0


def metric_prefixes(names: Sequence[str], prefix: str) -> dict[str, str]:
    """Return each held-out set's metric prefix: `eval`, or `eval_<name>` for a dict of sets."""
    return {name: f"{prefix}_{name}" if name else prefix for name in names}


def heldout_options(
    config: Any, eos_token_ids: tuple[int, ...]
) -> tuple[SamplingOptions, SamplingOptions]:
    """Return the sampling options of a held-out prompt's greedy completion and of its samples."""
    greedy, sampled = (
        build_sampling_options(
            config, eos_token_ids, temperature=temperature, top_p=top_p, top_k=0, min_p=None
        )
        for temperature, top_p in ((0.0, 1.0), (config.temperature_eval, TOP_P_EVAL))
    )
    return greedy, sampled


def greedy_scores(rollouts: Iterable[Rollout], threshold: float | None) -> dict[str, float]:
    """Return 1.0 for each prompt whose greedy completion passed, else 0.0.

    Without a threshold, because rewards are graded, return the reward itself. Abstentions are left
    out.
    """
    return {
        r.prompt_id: r.reward if threshold is None else float(r.passes(threshold))
        for r in rollouts
        if r.sample_index == 0 and r.reward is not None
    }
