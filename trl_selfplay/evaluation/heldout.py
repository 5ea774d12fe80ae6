"""Score held-out prompts: greedy accuracy and pass@k, of sampled and graded completions.

In: the sampling options of a config, graded rollouts. Out: metrics under the names that TRL's
evaluation machinery expects, and each prompt's score for paired comparisons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_selfplay.generation.sampler import SamplingOptions, build_sampling_options
from trl_selfplay.rollouts.record import Rollout

TOP_P_EVAL = 0.95


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """What held-out prompts came to.

    Attributes:
        metrics: By name, prefix included.
        by_prompt: A score for each prompt id of the first set, higher is better: whether the
            greedy completion passed, its reward where rewards have degrees, or the log-prob per
            token of the data's completion where a method learns from data.
        seconds: Wall time.
    """

    metrics: Mapping[str, float]
    by_prompt: Mapping[str, float]
    seconds: float


def metric_prefixes(names: Sequence[str], prefix: str) -> dict[str, str]:
    """Return each held-out set's metric prefix: `eval`, or `eval_<name>` for a dict of sets."""
    return {name: f"{prefix}_{name}" if name else prefix for name in names}


def heldout_options(
    config: Any, eos_token_ids: tuple[int, ...]
) -> tuple[SamplingOptions, SamplingOptions]:
    """Return the options of the greedy completion and of the samples of a held-out prompt."""
    greedy, sampled = (
        build_sampling_options(
            config, eos_token_ids, temperature=temperature, top_p=top_p, top_k=0, min_p=None
        )
        for temperature, top_p in ((0.0, 1.0), (config.temperature_eval, TOP_P_EVAL))
    )
    return greedy, sampled


def greedy_scores(rollouts: Sequence[Rollout], threshold: float | None) -> dict[str, float]:
    """Return for each prompt whether its greedy completion passed; abstentions are left out.

    Without a threshold, because rewards have degrees, the reward itself.
    """
    return {
        r.prompt_id: r.reward if threshold is None else float(r.passes(threshold))
        for r in rollouts
        if r.sample_index == 0 and r.reward is not None
    }
