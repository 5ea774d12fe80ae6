"""Decide what to do next from a run's metrics: warn, choose the best round, stop.

In: held-out metrics, scores by round, the funnel. Out: a warning as text or None; a round index.
Nothing here logs or stops anything. Alarms of collapse are in detectors.py.
"""

import re
from collections.abc import Mapping, Sequence

from trl_selfplay.rollouts.funnel import Funnel

LITTLE_TO_GAIN = 0.95
# Of SPIN's convergence: nats that are no longer worth a round, and pairs that can say so.
LEAST_DISTANCE = 0.01
FEWEST_PAIRS = 20

_PASS_AT_K = re.compile(r"(.+)_pass@(\d+)")
_ACCURACY = re.compile(r"(.+)_accuracy")


def warn_baseline(metrics: Mapping[str, float], has_degrees: bool = False) -> str | None:
    """Return a warning if the untrained model solves nothing, or nearly everything.

    "Nothing" means that pass@k at the largest k and greedy accuracy are 0 in every held-out set, with
    and without few-shot examples, so that the first round may have nothing to train on. "Nearly
    everything" means greedy accuracy above .95 in all of them. A high pass@k with a low accuracy
    needs no warning: training on the model's own samples turns it into accuracy.

    Args:
        metrics: Metrics of `summarize_heldout`, with any prefixes.
        has_degrees: Rewards are graded, so completions below the threshold are trained on as well.
    """
    accuracy = {m[1]: v for name, v in metrics.items() if (m := _ACCURACY.fullmatch(name))}
    pass_at_k: dict[str, tuple[int, float]] = {}
    for name, value in metrics.items():
        if m := _PASS_AT_K.fullmatch(name):
            pass_at_k[m[1]] = max(pass_at_k.get(m[1], (0, 0.0)), (int(m[2]), value))
    scores = [*accuracy.values(), *(value for _, value in pass_at_k.values())]
    if scores and max(scores) == 0.0 and not has_degrees:
        largest = max((k for k, _ in pass_at_k.values()), default=0)
        name = f"accuracy and pass@{largest} are" if largest else "accuracy is"
        return (
            f"held-out {name} 0: the model solves none of these prompts, so there may be nothing "
            "to learn from. Add few_shot_examples that show the answer format, sample more "
            "(num_generations with temperature above 0), or begin with an easier task."
        )
    if accuracy and min(accuracy.values()) > LITTLE_TO_GAIN:
        return (
            f"held-out accuracy is {min(accuracy.values()):.3f} before any training: little is "
            "left to gain. Choose harder prompts."
        )
    return None


def warn_long(funnel: Funnel, round_index: int, max_length: int | None) -> str | None:
    """Return a warning if completions were dropped because their row is too long, or None."""
    lost = funnel.unhinted.too_long + funnel.hinted.too_long
    if lost == 0:
        return None
    return (
        f"round {round_index}: {lost} of {lost + funnel.kept} completions that could have been "
        f"trained on are longer than max_length={max_length} together with their prompts, and are "
        "left out. Raise max_length, or lower max_completion_length."
    )


def warn_failed_calls(metrics: Mapping[str, float], round_index: int) -> str | None:
    """Return a warning if tools were called in a round and not one call succeeded."""
    if metrics.get("tools/failure_frequency") != 1.0:
        return None
    return (
        f"round {round_index}: every call of a tool failed. `trl-selfplay samples` shows what the policy was "
        "told: are the tools broken, or their arguments wrongly described?"
    )


def is_better(value: float, than: float, greater_is_better: bool = True) -> bool:
    """Return whether a held-out score is strictly better than another."""
    return value > than if greater_is_better else value < than


def best_round(history: Sequence[tuple[int, float]], greater_is_better: bool = True) -> int:
    """Return the round with the best held-out score; ties go to the earliest.

    The best of several noisy scores is biased upward, so report a score on other prompts.

    Args:
        history: (round index, score), at least one; -1 is the untrained model.
        greater_is_better: False for a loss.

    Raises:
        ValueError: No scores.
    """
    if not history:
        raise ValueError("there is no held-out score to choose a round by.")
    ordered = sorted(history)
    best_index, best_value = ordered[0]
    for round_index, value in ordered[1:]:
        if is_better(value, best_value, greater_is_better):
            best_index, best_value = round_index, value
    return best_index


def rounds_without_gain(
    history: Sequence[tuple[int, float]], greater_is_better: bool = True
) -> int:
    """Return the number of rounds since the best one.

    Args:
        history: As for `best_round`. Without scores the result is 0.
        greater_is_better: False for a loss.
    """
    if not history:
        return 0
    best = best_round(history, greater_is_better)
    return sum(round_index > best for round_index, _ in history)


def find_convergence(metrics: Mapping[str, float], prefix: str = "eval") -> str | None:
    """Return a message if held-out completions of data and opponent can't be told apart, or None.

    The criterion is that the 95 % interval of the win rate includes 1/2 and that ln 2 minus the
    held-out loss is below .01. Both are needed: with a tiny learning rate the loss stays at ln 2
    although every pair is told apart, and few pairs give a wide interval.

    Args:
        metrics: Metrics of `trainers/spin/discriminator.py: measure_heldout`.
        prefix: Prefix of the held-out set's metrics.

    Source: SPIN, arXiv 2401.01335, theorem 5.2: no gain is left when the opponent is the data.
    """
    needed = ("win_rate", "win_rate_low", "win_rate_high", "distance", "pairs")
    if any(f"{prefix}_{name}" not in metrics for name in needed):
        return None
    win_rate, low, high, distance, pairs = (metrics[f"{prefix}_{name}"] for name in needed)
    if pairs < FEWEST_PAIRS or not low <= 0.5 <= high or distance >= LEAST_DISTANCE:
        return None
    return (
        f"converged: {pairs:.0f} held-out pairs of the data and the opponent can't be told apart "
        f"(win rate {win_rate:.2f}, 95 % interval {low:.2f} to {high:.2f}; ln 2 - loss = "
        f"{distance:.4f}). More rounds have little to learn from these prompts."
    )
