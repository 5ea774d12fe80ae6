"""Score held-out prompts: greedy accuracy and pass@k, by sampling and grading.

In: held-out sets of prompts and a collector. Out: metrics under the names that TRL's evaluation
machinery expects, and each prompt's greedy verdict for paired comparisons. Weights, modes and
random streams of training stay as they are.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_selfplay.evaluation.estimates import summarize_heldout
from trl_selfplay.generation.sampler import build_sampling_options
from trl_selfplay.rollouts.collection import Assignment, Collector, Progress
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.rendering import PromptFormatter

TOP_P_EVAL = 0.95


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """Held-out metrics, each prompt's greedy verdict in the first set, wall time.

    A verdict is 0.0 or 1.0, or the reward where rewards have degrees.
    """

    metrics: dict[str, float]
    greedy: dict[str, float]
    seconds: float


def metric_prefixes(names: Sequence[str], prefix: str) -> dict[str, str]:
    """Return each held-out set's metric prefix: `eval`, or `eval_<name>` for a dict of sets."""
    return {name: f"{prefix}_{name}" if name else prefix for name in names}


def score_prompts(
    collector: Collector,
    formatter: PromptFormatter,
    rows: Sequence[PromptRow],
    config: Any,
    eos_token_ids: tuple[int, ...],
    progress: Progress,
    *,
    few_shot: bool,
    prefix: str,
    folder: Path | None = None,
    file_prefix: str = "",
) -> tuple[dict[str, float], list[Rollout]]:
    """Sample and grade held-out prompts once greedily and `num_generations_eval` times at random.

    The random streams don't depend on the round: every round, and a later evaluation of a saved
    model, meets the same noise, so that differences between rounds are differences of weights.

    Returns:
        Metrics with `prefix`, and the rollouts (`sample_index` 0 is the greedy one).
    """
    greedy = build_sampling_options(
        config, eos_token_ids, temperature=0.0, top_p=1.0, top_k=0, min_p=None
    )
    sampled = build_sampling_options(
        config,
        eos_token_ids,
        temperature=config.temperature_eval,
        top_p=TOP_P_EVAL,
        top_k=0,
        min_p=None,
    )
    prompt_ids = {row.prompt_id: formatter.token_ids(row, few_shot=few_shot) for row in rows}
    rollouts: list[Rollout] = []
    for name, options, indices in (
        ("greedy-", greedy, (0,)),
        ("sampled-", sampled, tuple(range(1, config.num_generations_eval + 1))),
    ):
        if not indices:
            continue
        rollouts += collector.collect(
            [Assignment(row, prompt_ids[row.prompt_id], indices) for row in rows],
            options,
            round_index=0,  # the key of the streams, see above
            phase="eval",
            progress=progress,
            folder=folder,
            prefix=file_prefix + name,
        )
    metrics = summarize_heldout(rollouts, reward_threshold=collector.eval_threshold, prefix=prefix)
    return metrics, rollouts


def greedy_verdicts(rollouts: Sequence[Rollout], collector: Collector) -> dict[str, float]:
    """Return for each prompt whether its greedy completion passed; abstentions are left out.

    Where rewards have degrees the reward itself.
    """
    threshold = collector.eval_threshold
    return {
        r.prompt_id: r.reward if threshold is None else float(r.passes(threshold))
        for r in rollouts
        if r.sample_index == 0 and r.reward is not None
    }


def score_all(
    collector: Collector,
    formatter: PromptFormatter,
    sets: Mapping[str, Sequence[PromptRow]],
    config: Any,
    eos_token_ids: tuple[int, ...],
    progress: Progress,
    *,
    folder: Path | None,
    prefix: str = "eval",
    with_few_shot: bool = False,
) -> HeldOutScores:
    """Score every held-out set in the form that is trained on.

    `with_few_shot` scores them also with the few-shot examples in the prompt, under
    `<prefix>_few_shot_…`: what the untrained model can do when it is shown the task. The other
    arguments are those of `score_prompts`.
    """
    started = time.monotonic()
    metrics: dict[str, float] = {}
    greedy: dict[str, float] | None = None
    in_training = getattr(config, "few_shot_in_training", False)  # SPIN has no examples
    for name, set_prefix in metric_prefixes(list(sets), prefix).items():
        forms = {"": in_training}
        if with_few_shot and formatter.few_shot_examples and not in_training:
            forms["few_shot_"] = True
        for form, few_shot in forms.items():
            scored, rollouts = score_prompts(
                collector,
                formatter,
                sets[name],
                config,
                eos_token_ids,
                progress,
                few_shot=few_shot,
                prefix=f"{set_prefix}_{form}".rstrip("_"),
                folder=folder,
                file_prefix=f"{name}-{form}" if name else form,
            )
            metrics |= scored
            if greedy is None:
                greedy = greedy_verdicts(rollouts, collector)
    return HeldOutScores(metrics, greedy or {}, time.monotonic() - started)
