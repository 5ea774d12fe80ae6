"""Warnings fire where they should and nowhere else; the best round is the earliest best one."""

import pytest

from trl_selfplay.evaluation.monitor import (
    best_round,
    is_better,
    rounds_without_gain,
    warn_baseline,
    warn_long,
)
from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts


def test_a_model_that_solves_nothing_is_warned_about_with_the_largest_k() -> None:
    metrics = {"eval_accuracy": 0.0, "eval_accuracy_high": 0.1, "eval_mean_length": 9.0}
    pass_at_k = {"eval_pass@1": 0.0, "eval_pass@16": 0.0, "eval_pass@8": 0.0}
    assert "accuracy is 0" in (warn_baseline(metrics) or "")
    assert "pass@16 are 0" in (warn_baseline(metrics | pass_at_k) or "")


@pytest.mark.parametrize(
    "found",
    [
        {"eval_pass@16": 0.01},
        {"eval_accuracy": 0.01},
        {"eval_few_shot_accuracy": 0.01},
        {"eval_few_shot_pass@16": 0.01},
        {"eval_other_accuracy": 0.01},
    ],
)
def test_one_solved_prompt_in_any_form_is_something_to_learn_from(found: dict[str, float]) -> None:
    metrics = {"eval_accuracy": 0.0, "eval_pass@1": 0.0, "eval_pass@16": 0.0}
    assert warn_baseline(metrics | found) is None


@pytest.mark.parametrize(("accuracy", "warns"), [(0.95, False), (0.951, True), (1.0, True)])
def test_a_model_that_solves_nearly_everything_is_warned_about(
    accuracy: float, warns: bool
) -> None:
    assert ("little is left" in (warn_baseline({"eval_accuracy": accuracy}) or "")) == warns
    other = {"eval_accuracy": accuracy, "eval_few_shot_accuracy": 0.4}
    assert warn_baseline(other) is None


def test_a_high_pass_at_k_with_a_low_accuracy_leaves_much_to_gain() -> None:
    assert warn_baseline({"eval_accuracy": 0.3, "eval_pass@1": 0.3, "eval_pass@64": 0.99}) is None


def test_rewards_with_degrees_leave_something_to_learn_without_a_success() -> None:
    metrics = {"eval_accuracy": 0.0, "eval_pass@4": 0.0, "eval_mean_reward": 0.4}
    assert warn_baseline(metrics, has_degrees=True) is None
    assert warn_baseline(metrics) is not None


def test_no_metrics_give_no_baseline_warning() -> None:
    assert warn_baseline({}) is None
    assert warn_baseline({"eval_mean_length": 0.0, "eval_accuracy_low": 0.0}) is None


def test_the_best_round_is_the_earliest_of_the_best() -> None:
    """CD-9; the untrained model is a candidate."""
    assert best_round([(-1, 0.2), (0, 0.7), (1, 0.7), (2, 0.6)]) == 0
    assert best_round([(-1, 0.7), (0, 0.7)]) == -1
    assert best_round([(1, 0.7), (0, 0.7)]) == 0
    assert best_round([(-1, 2.0), (0, 1.5), (1, 1.5)], greater_is_better=False) == 0
    with pytest.raises(ValueError, match="no held-out score"):
        best_round([])


def test_better_is_strict() -> None:
    assert is_better(1.0, 0.5)
    assert not is_better(0.5, 0.5)
    assert is_better(0.5, 1.0, greater_is_better=False)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.2, 0.5], 0),
        ([0.5, 0.5], 1),  # ST-28: not above the best so far
        ([0.5, 0.4, 0.45], 2),
        ([0.2, 0.5, 0.4, 0.6, 0.6], 1),
    ],
)
def test_rounds_without_gain_are_counted_since_the_best(scores: list[float], expected: int) -> None:
    """ST-28: a naive walk over the rounds gives the same."""
    history = list(enumerate(scores, start=-1))
    since, best = 0, scores[0]
    for score in scores[1:]:
        since, best = (0, score) if score > best else (since + 1, best)
    assert rounds_without_gain(history) == since == expected


def test_one_score_is_compared_with_nothing() -> None:
    """CD-10."""
    assert rounds_without_gain([(-1, 0.0)]) == 0
    assert rounds_without_gain([]) == 0
    assert best_round([(-1, 0.0)]) == -1


def test_completions_lost_to_max_length_are_counted_with_and_without_hint() -> None:
    kept = Funnel(4, 3, OutcomeCounts(kept=3, failed=5))
    assert warn_long(kept, 0, 64) is None
    lost = Funnel(4, 3, OutcomeCounts(kept=3, too_long=2), OutcomeCounts(kept=1, too_long=4))
    assert "6 of 10 completions" in (warn_long(lost, 0, 64) or "")
    assert "max_length=64" in (warn_long(lost, 0, 64) or "")
