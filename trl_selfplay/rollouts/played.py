"""The result of a round's sampling, grading and selection: the record that the loop trains on.

In: the stages' results. Out: one record, made by a trainer's `play_round`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from datasets import Dataset

from trl_selfplay.rollouts.facts import Facts, call_metrics
from trl_selfplay.rollouts.funnel import Funnel, Outcome
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.selection import Selection


@dataclass(frozen=True, slots=True)
class PlayedRound:
    """The result of a round's sampling, grading and selection.

    Attributes:
        training_rows: The parent's final dataset.
        num_examples: Number of selected examples; packed rows hold several.
        funnel: Counts of what each selection step dropped.
        rollouts: All graded rollouts of the round, read from disk when they are needed.
        metrics: Metrics for the log, with the prefixes play/, select/ and tools/.
        rewards: Mean weighted reward, and the mean of each function by name.
        remedy: Why a round of this method may be empty and what to do; "" if rewards decide.
        outcomes: The outcome of each of `rollouts`.
    """

    training_rows: Dataset
    num_examples: int
    funnel: Funnel
    rollouts: Sequence[Rollout]
    metrics: dict[str, float]
    rewards: dict[str, float | None]
    remedy: str = ""
    outcomes: Sequence[Outcome] = ()


def mean_rewards(facts: Facts, names: Sequence[str]) -> dict[str, float | None]:
    """Return the mean weighted reward and each function's mean, without abstentions."""
    columns = {"mean": facts.rewards, **dict(zip(names, facts.scores, strict=False))}
    known = {name: values[~np.isnan(values)] for name, values in columns.items()}
    return {name: fmean(values.tolist()) if len(values) else None for name, values in known.items()}


def round_metrics(selection: Selection, rewards: Mapping[str, float | None]) -> dict[str, float]:
    """Return a round's metrics: play/… of what was sampled, select/… of what was selected.

    Of trajectories also what `call_metrics` returns, of which GRPOTrainer logs the first two.
    """
    facts = selection.facts
    unhinted = ~facts.hinted
    outcomes = np.array(selection.outcomes, dtype=object)
    kept = outcomes == "kept"
    num_solved = len(np.unique(facts.prompts[kept & unhinted]))
    metrics = {
        "play/completions": float(len(kept)),
        "play/mean_length": fmean(facts.lengths[unhinted].tolist()),
        "play/truncated": fmean(facts.truncated[unhinted].tolist()),
        "select/kept": float(kept.sum()),
        "select/kept_hinted": float((kept & facts.hinted).sum()),
        "select/prompts_solved": num_solved / len(np.unique(facts.prompts[unhinted])),
        "select/examples": float(len(selection.examples)),
    }
    if facts.has_tools:
        metrics |= {
            f"play/{o}": fmean(outcomes[unhinted] == o) for o in ("malformed", "tool_limit")
        }
        of_calls = (facts.calls, facts.failed_calls, facts.rerendered_turns)
        metrics |= call_metrics(*(counts[unhinted] for counts in of_calls))
    metrics |= {f"play/reward_{n}": v for n, v in rewards.items() if v is not None}
    return metrics
