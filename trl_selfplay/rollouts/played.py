"""The result of a round's sampling, grading and selection: the record that the loop trains on.

In: the stages' results. Out: one record, made by a trainer's `play_round`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from datasets import Dataset

from trl_selfplay.rollouts.funnel import Funnel
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.selection import Selection
from trl_selfplay.rollouts.stored import StoredRollouts


@dataclass(frozen=True, slots=True)
class PlayedRound:
    """The result of a round's sampling, grading and selection.

    Attributes:
        training_rows: The parent's final dataset.
        num_examples: Number of selected examples; packed rows hold several.
        funnel: Counts of what each selection step dropped.
        rollouts: All graded rollouts of the round, read from disk as they are iterated over.
        metrics: Metrics for the log, with the prefixes play/ and select/.
        rewards: Mean weighted reward, and the mean of each function by name.
        remedy: Why a round of this method may be empty and what to do; "" if rewards decide.
    """

    training_rows: Dataset
    num_examples: int
    funnel: Funnel
    rollouts: StoredRollouts | Sequence[Rollout]
    metrics: dict[str, float]
    rewards: dict[str, float | None]
    remedy: str = ""


def mean_rewards(rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, float | None]:
    """Return the mean weighted reward and each function's mean, without abstentions."""
    columns = {"mean": [r.reward for r in rollouts]}
    columns |= {name: [r.rewards[i] for r in rollouts] for i, name in enumerate(names)}
    return {
        name: fmean(scores) if (scores := [v for v in values if v is not None]) else None
        for name, values in columns.items()
    }


def round_metrics(selection: Selection, rewards: Mapping[str, float | None]) -> dict[str, float]:
    """Return a round's metrics: play/… of what was sampled, select/… of what was selected."""
    rollouts = selection.rollouts
    unhinted = [r for r in rollouts if not r.hinted]
    metrics = {
        "play/completions": float(len(rollouts)),
        "play/mean_length": fmean(len(r.completion_ids) for r in unhinted),
        "play/truncated": fmean(r.is_truncated for r in unhinted),
        "select/kept": float(len(selection.kept)),
        "select/kept_hinted": float(sum(r.hinted for r in selection.kept)),
        "select/prompts_solved": len({r.prompt_id for r in selection.kept if not r.hinted})
        / len({r.prompt_id for r in unhinted}),
        "select/examples": float(len(selection.examples)),
    }
    metrics |= {f"play/reward_{n}": v for n, v in rewards.items() if v is not None}
    return metrics
