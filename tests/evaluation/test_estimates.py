"""Estimators against enumeration and against values worked out by hand. Invariants EV-…."""

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from trl_selfplay.evaluation.estimates import (
    best_of_k,
    binomial_interval,
    bootstrap_interval,
    interval_of_scores,
    interval_of_shares,
    majority_at_k,
    mean_best_of_k,
    mean_majority_at_k,
    paired_difference,
    pass_at_k,
    standard_error,
    summarize_heldout,
)
from trl_selfplay.rollouts.record import Rollout


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_equals_the_enumeration_of_all_draws(n: int) -> None:
    """EV-1 and EV-2."""
    for c in range(n + 1):
        verdicts = [True] * c + [False] * (n - c)
        values = []
        for k in range(1, n + 1):
            draws = list(combinations(verdicts, k))
            values.append(sum(map(any, draws)) / len(draws))
            assert pass_at_k(n, c, k) == pytest.approx(values[-1], abs=1e-12)
        assert pass_at_k(n, c, 1) == pytest.approx(c / n, abs=1e-12)
        assert values == sorted(values)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    exact = 1 - math.comb(9_900, 500) / math.comb(10_000, 500)
    assert pass_at_k(10_000, 100, 500) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k of"):
        pass_at_k(n, c, k)


def best_of_k_by_enumeration(scores: list[float], correct: list[bool], k: int) -> float:
    """Every draw of k, every order of the samples for breaking ties."""
    n = len(scores)
    values = []
    for order in permutations(range(n)):
        rank = {sample: place for place, sample in enumerate(order)}
        for draw in combinations(range(n), k):
            best = max(draw, key=lambda i: (scores[i], rank[i]))
            values.append(correct[best])
    return sum(values) / len(values)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=5),
    st.integers(1, 5),
)
def test_best_of_k_equals_the_enumeration_also_with_ties(
    samples: list[tuple[int, bool]], k: int
) -> None:
    """EV-3."""
    k = min(k, len(samples))
    scores, correct = [float(s) for s, _ in samples], [c for _, c in samples]
    expected = best_of_k_by_enumeration(scores, correct, k)
    assert best_of_k(scores, correct, k) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_best_of_k_with_distinct_scores_equals_the_enumeration(
    correct: list[bool], data: st.DataObject
) -> None:
    """EV-3, for every N up to 8."""
    scores = data.draw(st.permutations([float(i) for i in range(len(correct))]))
    for k in range(1, len(correct) + 1):
        draws = list(combinations(range(len(correct)), k))
        expected = sum(correct[max(d, key=lambda i: scores[i])] for d in draws) / len(draws)
        assert best_of_k(scores, correct, k) == pytest.approx(expected, abs=1e-12)


def test_best_of_k_of_a_case_worked_out_by_hand() -> None:
    assert best_of_k([4.0, 3.0, 2.0, 1.0], [False, True, True, False], 2) == pytest.approx(0.5)


@pytest.mark.parametrize("c", range(7))
def test_best_of_k_with_equal_scores_is_the_share_and_with_gold_scores_pass_at_k(c: int) -> None:
    """EV-3 and EV-4."""
    correct = [i < c for i in range(6)]
    for k in range(1, 7):
        assert best_of_k([1.0] * 6, correct, k) == pytest.approx(c / 6)
        assert best_of_k([float(v) for v in correct], correct, k) == pytest.approx(
            pass_at_k(6, c, k)
        )


@pytest.mark.parametrize(
    ("scores", "correct", "k"), [([1.0], [True, False], 1), ([1.0], [True], 2)]
)
def test_best_of_k_refuses_what_has_no_meaning(
    scores: list[float], correct: list[bool], k: int
) -> None:
    with pytest.raises(ValueError, match="best-of-k"):
        best_of_k(scores, correct, k)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (107, 1000), (1, 1)])
def test_binomial_interval_equals_scipys_wilson_interval(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert binomial_interval(successes, n) == pytest.approx((expected.low, expected.high))


def test_binomial_interval_of_nothing_is_everything() -> None:
    assert binomial_interval(0, 0) == (0.0, 1.0)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    """400 sets of 60 prompts with a true mean of 0.3: about 95 % of the intervals hold it."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = bootstrap_interval(generator.binomial(4, 0.3, size=60) / 4, draws=300)
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 400 <= 0.98  # 3.5 standard errors, and the method is a bit narrow


def test_bootstrap_interval_is_as_wide_as_the_normal_one_on_many_prompts() -> None:
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(values, draws=2000)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 5)


def test_bootstrap_interval_repeats_under_a_seed_and_shrinks_to_a_point_without_spread() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])


@pytest.mark.parametrize(("share", "n"), [(0.0, 8), (1.0, 8), (0.5, 30), (1.0, 1)])
def test_equal_shares_of_all_prompts_have_the_interval_of_one_trial_each(share, n) -> None:
    expected = binomtest(int(share * n), n).proportion_ci(method="wilson")
    assert interval_of_shares([share] * n) == pytest.approx((expected.low, expected.high))


def test_an_interval_of_values_with_spread_is_the_bootstrap_and_of_equal_scores_unknown() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    assert interval_of_shares(values) == interval_of_scores(values) == bootstrap_interval(values)
    assert interval_of_scores([11.38]) is None
    for interval in (interval_of_shares, interval_of_scores):
        with pytest.raises(ValueError, match="at least one value"):
            interval([])


@pytest.mark.parametrize("num_samples", [1, 4])
def test_no_right_sample_of_a_few_prompts_doesnt_look_certain(num_samples) -> None:
    """EV-5 at the edge: more samples of the same prompts don't narrow it."""
    rollouts = [make_rollout(f"p{p}", i, 0.0) for p in range(8) for i in range(num_samples + 1)]
    metrics = summarize_heldout(rollouts, reward_threshold=1.0)
    for end in ("_low", "_high"):
        assert metrics[f"eval_pass@1{end}"] == metrics[f"eval_accuracy{end}"]


def test_standard_error_of_a_sample() -> None:
    assert standard_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx(math.sqrt((1 / 3) / 4))
    assert standard_error([1.0]) is None


def test_paired_difference_looks_at_common_prompts_alone() -> None:
    before = {"a": 0.0, "b": 1.0, "c": 0.0, "only before": 1.0}
    after = {"c": 1.0, "b": 1.0, "a": 1.0, "only after": 0.0}
    mean, error = paired_difference(before, after)
    changes = np.array([1.0, 0.0, 1.0])
    assert mean == pytest.approx(changes.mean())
    assert error == pytest.approx(changes.std(ddof=1) / math.sqrt(3))


def test_pairing_removes_the_spread_between_prompts() -> None:
    before = {str(i): float(i % 2) for i in range(10)}
    assert paired_difference(before, before) == (0.0, 0.0)


def test_a_difference_of_nothing_is_unknown() -> None:
    assert paired_difference({"a": 1.0}, {"b": 1.0}) == (None, None)
    assert paired_difference({"a": 0.0}, {"a": 1.0}) == (1.0, None)


def make_rollout(
    prompt_id: str, sample_index: int, reward: float | None, finish: Any = "eos", length: int = 2
) -> Rollout:
    return Rollout(
        round_index=0,
        phase="eval",
        prompt_id=prompt_id,
        sample_index=sample_index,
        prompt_ids=(1,),
        completion_ids=(5,) * length,
        prompt="q",
        completion="c",
        finish=finish,
        reward=reward,
        rewards=(reward,),
    )


def test_heldout_metrics_of_a_case_worked_out_by_hand() -> None:
    rollouts = [
        make_rollout("a", 0, 1.0, length=4),
        *(make_rollout("a", i, float(i <= 1)) for i in (1, 2, 3)),
        make_rollout("b", 0, 0.0, length=2),
        *(make_rollout("b", i, 0.0) for i in (1, 2, 3)),
    ]
    metrics = summarize_heldout(rollouts, reward_threshold=1.0)
    assert metrics["eval_accuracy"] == 0.5
    assert (metrics["eval_accuracy_low"], metrics["eval_accuracy_high"]) == pytest.approx(
        tuple(binomtest(1, 2).proportion_ci(method="wilson"))
    )
    assert metrics["eval_pass@1"] == pytest.approx(1 / 6)
    assert metrics["eval_pass@2"] == pytest.approx((2 / 3) / 2)
    assert metrics["eval_pass@3"] == pytest.approx(0.5)
    assert metrics["eval_mean_length"] == 3.0
    assert metrics["eval_mean_reward"] == 0.5
    assert (metrics["eval_truncated"], metrics["eval_abstained"]) == (0.0, 0.0)
    assert set(metrics) == {
        *(f"eval_accuracy{end}" for end in ("", "_low", "_high")),
        *(f"eval_pass@{k}{end}" for k in (1, 3) for end in ("", "_low", "_high")),
        "eval_pass@2",
        "eval_mean_length",
        "eval_mean_reward",
        "eval_truncated",
        "eval_abstained",
    }


@pytest.mark.parametrize(
    ("n", "ks"), [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (8, {1, 2, 4, 8}), (10, {1, 2, 4, 8, 10})]
)
def test_pass_at_k_is_given_for_powers_of_two_and_the_number_of_samples(
    n: int, ks: set[int]
) -> None:
    metrics = summarize_heldout(
        [make_rollout("a", i, 1.0) for i in range(1, n + 1)], reward_threshold=1.0, prefix="eval_x"
    )
    found = {int(k.removeprefix("eval_x_pass@")) for k in metrics if k.split("@")[-1].isdigit()}
    assert found == ks


def test_an_abstention_is_not_in_the_denominator() -> None:
    """SE-2."""
    rollouts = [
        *(make_rollout("a", i, 1.0) for i in range(3)),
        make_rollout("b", 0, None),
        make_rollout("b", 1, None),
        make_rollout("b", 2, 0.0),
    ]
    metrics = summarize_heldout(rollouts, reward_threshold=1.0)
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_abstained"] == 0.5
    assert metrics["eval_pass@1"] == 0.5  # b has one graded sample, and it is wrong
    assert metrics["eval_pass@2"] == 1.0  # b has too few


def test_a_completion_cut_by_length_is_wrong_whatever_its_reward() -> None:
    """SE-7: held-out scores and selection agree on what is correct."""
    rollouts = [make_rollout("a", i, 1.0, finish="length") for i in range(3)]
    metrics = summarize_heldout(rollouts, reward_threshold=1.0)
    assert metrics["eval_accuracy"] == metrics["eval_pass@1"] == metrics["eval_pass@2"] == 0.0
    assert metrics["eval_truncated"] == 1.0


def test_trajectories_tell_their_calls_and_are_wrong_without_an_end() -> None:
    answer, result = {"role": "assistant", "content": "a"}, {"role": "tool", "content": "r"}
    calling = {"messages": (answer, result, result, answer), "num_failed_calls": 1}
    mask = (True, False, False, True)
    rollouts = [
        replace(make_rollout("a", 0, 1.0, length=4), **calling, completion_mask=mask),
        replace(make_rollout("b", 0, 1.0), messages=(answer,), halt="malformed"),
        replace(make_rollout("b", 1, 1.0), **calling),
    ]
    metrics = summarize_heldout(rollouts, reward_threshold=1.0)
    assert metrics["eval_accuracy"] == 0.5
    assert metrics["eval_mean_length"] == 2.0
    assert metrics["eval_tools/call_frequency"] == 1.0  # of greedy ones
    assert metrics["eval_tools/failure_frequency"] == 0.5


def test_the_interval_of_pass_at_1_does_not_narrow_when_samples_are_duplicated() -> None:
    """EV-5."""
    once, twice = [], []
    for p in range(40):
        verdicts = [float((p * 7 + i * 3) % 5 < 2) for i in range(4)]
        once += [make_rollout(f"p{p}", i + 1, v) for i, v in enumerate(verdicts)]
        twice += [make_rollout(f"p{p}", i + 1, v) for i, v in enumerate(verdicts * 2)]
    narrow = summarize_heldout(twice, reward_threshold=1.0)
    wide = summarize_heldout(once, reward_threshold=1.0)
    for name in ("eval_pass@1", "eval_pass@1_low", "eval_pass@1_high"):
        assert narrow[name] == pytest.approx(wide[name])
    assert wide["eval_pass@1_low"] < wide["eval_pass@1"] < wide["eval_pass@1_high"]


def test_the_order_of_the_rollouts_has_no_influence() -> None:
    rollouts = [make_rollout(f"p{p}", i, float(p * i % 3 == 0)) for p in range(9) for i in range(5)]
    assert summarize_heldout(rollouts[::-1], reward_threshold=1.0) == summarize_heldout(
        rollouts, reward_threshold=1.0
    )


def test_nothing_graded_gives_no_accuracy() -> None:
    metrics = summarize_heldout([make_rollout("a", 0, None)], reward_threshold=1.0)
    assert metrics == {
        "eval_mean_length": 2.0,
        "eval_truncated": 0.0,
        "eval_abstained": 1.0,
    }
    assert summarize_heldout([], reward_threshold=1.0) == {}


def test_best_of_k_is_averaged_over_prompts_and_a_missing_score_is_the_worst(make_rollout) -> None:
    rollouts = [
        make_rollout(prompt_id=prompt, reward=reward, finish=finish)
        for prompt, reward, finish in (
            ("a", 1.0, "eos"), ("a", 0.0, "eos"), ("b", 1.0, "eos"), ("b", 1.0, "length"),
        )
    ]  # fmt: skip
    assert mean_best_of_k(rollouts, [0.3, 0.2, None, -9.0], [1, 2]) == {1: 0.5, 2: 0.5}
    assert mean_best_of_k(rollouts, [0.3, 0.2, -8.0, -9.0], [2]) == {2: 1.0}


@pytest.mark.parametrize("k", range(1, 7))
def test_best_of_k_by_the_gold_label_is_pass_at_k(make_rollout, k) -> None:
    """EV-4; and VS-6 at k = 1, whatever the scores."""
    rewards = {"a": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], "b": [0.0] * 6, "c": [1.0] * 6}
    rollouts = [
        make_rollout(prompt_id=p, sample_index=i, reward=r)
        for p, each in rewards.items()
        for i, r in enumerate(each)
    ]
    expected = fmean(pass_at_k(6, int(sum(each)), k) for each in rewards.values())
    by_gold = mean_best_of_k(rollouts, [r.reward for r in rollouts], [k])
    assert by_gold == pytest.approx({k: expected})
    scores = random.Random(k).sample(range(100), len(rollouts))
    (by_chance,) = mean_best_of_k(rollouts, scores, [1]).values()
    assert by_chance == pytest.approx(fmean(r.reward for r in rollouts))


@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=7), st.data())
def test_the_majority_of_k_equals_the_mean_over_all_draws(forms, data) -> None:
    """Each form is right or wrong as a whole; ties are split, and no vote is wrong."""
    right = data.draw(st.sets(st.sampled_from(["a", "b", "c", "d"])))
    k = data.draw(st.integers(1, len(forms)))
    outcomes = []
    for draw in combinations(forms, k):
        votes = Counter(form for form in draw if form is not None)
        winners = [form for form, n in votes.items() if n == max(votes.values())]
        outcomes.append(fmean(form in right for form in winners) if winners else 0.0)
    found = majority_at_k(forms, [form in right for form in forms], k)
    assert found == pytest.approx(fmean(outcomes))


def test_the_majority_of_one_is_the_mean_sample_and_of_all_is_the_vote(make_rollout) -> None:
    """One prompt votes right, another wrong; the third's answers are all different."""
    answers = {"p": ("5", "5", "7"), "q": ("7", "5", "7"), "r": ("1", "2", "5")}
    rollouts = [
        make_rollout(
            prompt_id=prompt_id, sample_index=i, reward=float(answer == "5"), completion=answer
        )
        for prompt_id, given_answers in answers.items()
        for i, answer in enumerate(given_answers)
    ]
    forms = [r.completion for r in rollouts]
    found = mean_majority_at_k(rollouts, forms, [1, 3])
    assert found == {1: pytest.approx(4 / 9), 3: pytest.approx((1 + 0 + 1 / 3) / 3)}


def test_the_majority_of_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="k=3 of 2 answers and 2 verdicts"):
        majority_at_k(["a", "b"], [True, False], 3)
