"""What is counted of a round's samples. Invariants CD-3 to CD-6."""

from dataclasses import replace
from itertools import combinations
from math import log
from statistics import fmean

import numpy as np
import pytest
import torch

from trl_selfplay.evaluation.diversity import (
    answer_entropy,
    distinct_correct,
    distinct_ratios,
    diversity_metrics,
    effective_share,
    rarefied,
    solved_by_difficulty,
    summarize_samples,
    token_entropy,
)
from trl_selfplay.evaluation.room_of_results import RoomOfResults
from trl_selfplay.generation.decode_batch import TokenChooser
from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.rollouts.selection import default_normal_form as form


def summary(rollouts, threshold=1.0):
    return summarize_samples(rollouts, form, threshold).prompts


def sample_set(make_rollout, texts, rewards=None, length=4):
    """Summarize rollouts made from a list of texts for each prompt."""
    rollouts = [
        make_rollout(
            prompt_id=f"p{p}", sample_index=s, completion=text, completion_ids=(5,) * length,
            reward=1.0 if rewards is None else rewards[p][s],
        )
        for p, group in enumerate(texts)
        for s, text in enumerate(group)
    ]  # fmt: skip
    return summary(rollouts)


def test_distinct_ratio_is_1_for_all_different_and_1_over_n_for_all_equal(make_rollout) -> None:
    """CD-3."""
    rollouts = sample_set(make_rollout, [["a", "b", "c", "d"], ["x", "X ", " x", "x"]])
    assert distinct_ratios(rollouts) == {"p0": 1.0, "p1": 0.25}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rarefaction_is_the_mean_over_all_draws(size) -> None:
    counts = [3, 1, 2]
    kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
    expected = fmean(len({kinds[i] for i in draw}) for draw in combinations(range(6), size))
    assert rarefied(counts, size) == pytest.approx(expected)


def test_newly_solved_prompts_do_not_look_like_lost_paths(make_rollout) -> None:
    """CD-4: only prompts solved in both rounds count."""
    texts = [[f"path {i}" for i in range(8)], [f"way {i}" for i in range(8)]]
    before = sample_set(make_rollout, texts, [[1.0] * 8, [0.0] * 8])
    now = sample_set(make_rollout, texts, [[1.0] * 8, [1.0] + [0.0] * 7])
    first, second = distinct_correct(before, now)
    assert first == second == {"p0": pytest.approx(8.0)}


def test_solved_share_by_base_success() -> None:
    base = {"a": 1.0, "b": 0.75, "c": 0.6, "d": 0.3, "e": 0.1, "f": 0.0}
    now = {"a": 1.0, "b": 0.0, "c": 0.1, "d": 0.5, "e": 0.0, "f": 0.2}
    assert solved_by_difficulty(base, now) == {
        "easy": 0.5, "medium": 1.0, "hard": 1.0, "very_hard": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(("top_k", "expected"), [(0, log(21)), (5, log(5))])
def test_token_entropy_is_that_of_the_distribution_sampled_from(
    make_rollout, top_k, expected
) -> None:
    """CD-5: ln V for a uniform sampler over V tokens, ln V' for the V' that top-k leaves."""
    logits = torch.zeros(40, 21)
    if top_k:
        logits[:, top_k:] = -1.0
    options = SamplingOptions(1, top_k=top_k, temperature=0.7, return_logprobs=True)
    tokens, logprobs = TokenChooser(options, range(21)).choose(logits, range(40), [0] * 40, None)
    pairs = zip(tokens.tolist(), logprobs.tolist(), strict=True)
    rollouts = [
        make_rollout(sample_index=i, completion_ids=(token,), logprob=logprob)
        for i, (token, logprob) in enumerate(pairs)
    ]
    samples = summary(rollouts)
    assert token_entropy(samples) == pytest.approx(expected, abs=1e-6)


def test_token_entropy_counts_only_what_the_policy_wrote_and_has_a_log_prob(make_rollout) -> None:
    written = make_rollout(
        completion_ids=(5, 6, 7), completion_mask=(True, False, True), logprob=-3.0
    )
    without = make_rollout(sample_index=1, completion_ids=(5,) * 9)
    samples = summary([written, without])
    assert token_entropy(samples) == pytest.approx(1.5)
    assert samples[written.prompt_id].num_tokens == 2 + 9  # which the drift of lengths reads
    assert token_entropy(summary([without])) is None


def test_answer_entropy_is_corrected_for_the_number_of_samples() -> None:
    """D7: of many uniform draws over four answers, the mean is ln 4 with far less bias than without."""
    assert answer_entropy([3, 1]) == pytest.approx(-0.75 * log(0.75) - 0.25 * log(0.25) + 1 / 8)
    rng = np.random.default_rng(0)
    draws = [c[c > 0].tolist() for c in rng.multinomial(16, [0.25] * 4, 2000)]
    corrected = fmean(map(answer_entropy, draws))
    plain = fmean(-sum(n / 16 * log(n / 16) for n in counts) for counts in draws)
    assert abs(corrected - log(4)) < 0.02 < abs(plain - log(4))


def test_concentration_is_1_for_equal_weights_and_1_over_p_for_one_prompt_with_all() -> None:
    """CD-6."""
    assert effective_share([3, 3, 3, 3]) == 1.0
    assert effective_share([7, 0, 0, 0]) == 0.25


def test_kept_completions_count_with_hint_and_samples_without(make_rollout) -> None:
    rollouts = [
        make_rollout(sample_index=0, completion="a"),
        make_rollout(sample_index=1, completion="b", reward=0.0),
        make_rollout(sample_index=2, completion="c", hinted=True),
        make_rollout(sample_index=3, completion="loop " * 40, completion_ids=(5, 6) * 20),
    ]
    found = summarize_samples(rollouts, form, 1.0, None, ["kept", "failed", "kept", "kept"])
    (own,) = found.prompts.values()
    assert (own.num_samples, own.num_correct, own.num_graded) == (3, 2, 3)
    assert list(found.kept.values()) == [3]
    assert found.num_repetitive == 1
    assert len(found.kept_forms) == 3


def test_the_most_frequent_answer_is_that_of_all_prompts(make_rollout) -> None:
    answers = {"p": "7 7 1 2", "q": "7 3 3 3", "r": "7 7 4 ?"}
    rollouts = [
        make_rollout(prompt_id=i, sample_index=k, completion=text)
        for i, texts in answers.items()
        for k, text in enumerate(texts.split())
    ]
    found = summarize_samples(rollouts, form, 1.0, lambda text: None if text == "?" else text)
    assert {i: own.num_top for i, own in found.prompts.items()} == {"p": 2, "q": 1, "r": 2}
    assert sorted(found.prompts["r"].answers) == [1, 2]


def test_the_rounds_numbers_for_the_log(make_rollout) -> None:
    rollouts = sample_set(make_rollout, [["a", "b"], ["c", "c"]], [[1.0, 1.0], [0.0, 0.0]])
    assert diversity_metrics(rollouts, rollouts) == {
        "play/distinct": 0.75,
        "play/coverage": 0.5,
        "play/distinct_correct": 2.0,
        "play/solved_easy": 1.0,
        "play/solved_very_hard": 0.0,
    }


def test_rewards_with_degrees_are_told_by_the_best_of_a_prompt(make_rollout) -> None:
    """Counts by a threshold that nothing reaches are left out; where something does they stay."""
    rewards = {"a": [0.2, 0.6], "b": [0.3, 0.1]}
    rollouts = [
        make_rollout(prompt_id=i, sample_index=k, reward=r, completion=f"{i} {k}")
        for i, values in rewards.items()
        for k, r in enumerate(values)
    ]
    cut = make_rollout(prompt_id="a", sample_index=2, reward=0.9, finish="length")
    with_cut = summary([*rollouts, cut])
    numbers = diversity_metrics(with_cut, with_cut, has_degrees=True)
    assert numbers == {"play/distinct": 1.0, "play/best_reward": pytest.approx(0.45)}
    reached = summary(rollouts, threshold=0.5)
    counted = diversity_metrics(reached, reached, has_degrees=True)
    assert counted["play/coverage"] == 0.5
    assert counted["play/solved_medium"] == 1.0


def test_of_many_samples_the_answers_of_some_prompts_are_read(make_rollout) -> None:
    rollouts = [
        make_rollout(prompt_id=f"p{p}", sample_index=s, completion=str(s))
        for p in range(4000)
        for s in range(2)
    ]
    read = []
    for kept in (rollouts, rollouts[:-100]):  # a round with almost as many
        found = summarize_samples(kept, form, 1.0, str).prompts
        assert all(sum(own.answers) in (0, 2) for own in found.values())
        read.append({prompt_id for prompt_id, own in found.items() if own.answers})
    assert 1800 < len(read[0]) < 2200  # of 4000 answers
    assert len(read[0] & read[1]) > 0.95 * len(read[0])


def test_what_a_tool_repeats_is_no_repetition_of_the_policy(make_rollout) -> None:
    """Nor is a trajectory without an end the best of its prompt."""
    ids, mask = tuple(range(3, 63)) + (7,) * 64, (True,) * 60 + (False,) * 64
    rollout = make_rollout(
        completion_ids=ids, completion_mask=mask, completion="so it goes, with a tool in between"
    )
    summary_of = summarize_samples([rollout], form, 1.0, outcomes=["kept"])
    assert summary_of.num_repetitive == 0
    whole = replace(rollout, completion_mask=None)
    assert summarize_samples([whole], form, 1.0, outcomes=["kept"]).num_repetitive
    halted = replace(rollout, halt="tool_limit")
    assert summarize_samples([halted], form, 1.0).prompts[rollout.prompt_id].best_reward is None


def test_what_results_take_of_cut_completions_is_counted(make_rollout) -> None:
    """A result that no longer fits isn't among the tokens: the completion ends before the room does."""
    turns = ({"role": "assistant", "content": ""},)
    cut = make_rollout(finish="length", completion_ids=(3,) * 8, messages=turns, reward=None)
    half = replace(cut, sample_index=1, completion_mask=(True, True, *[False] * 5, True))
    others = [make_rollout(messages=turns), replace(cut, messages=()), replace(cut, hinted=True)]
    for most, without in ((8, 0), (9, 2)):
        found = summarize_samples([cut, half, *others], form, 1.0, max_completion_length=most)
        assert found.results == RoomOfResults(2, 16, 5, without)
    assert "took 31% of the tokens of the cut ones, and in 2 of them" in found.results.describe()
    assert RoomOfResults().describe() == ""
