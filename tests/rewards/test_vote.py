"""Votes: ties and small majorities abstain; a prompt's samples vote together, and nobody else's."""

import itertools
import math
import random
from collections import Counter

import pytest
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOConfig, GRPOTrainer

from trl_selfplay.rewards import VoteReward, exact_reward, vote_reward
from trl_selfplay.rewards.functions import columns_read
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rewards.vote import BELOW_THRESHOLD, NO_VOTES, TIE, answer_form, count_votes
from trl_selfplay.rollouts.collection import Collector
from trl_selfplay.rollouts.prompts import load_prompt_rows


def says(*answers):
    return [f"so the answer is {a}." if a is not None else "I don't know" for a in answers]


def vote(*answers, function=vote_reward, **columns):
    completions = says(*answers)
    return function(prompts=["Q"] * len(answers), completions=completions, **columns)


def test_a_completion_scores_by_the_answer_that_most_samples_have() -> None:
    """Numbers by value; one without an answer doesn't vote and doesn't agree."""
    assert vote("1,000", "1000.0", "999", None, "1000") == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert vote("Yes", "yes", "no") == [1.0, 1.0, 0.0]
    chat = [[{"role": "assistant", "content": text}] for text in says("a", "b", "a")]
    assert vote_reward(prompts=["Q"] * 3, completions=chat) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        (("5", "7"), TIE),
        (("5", "7", "5", "7", None), TIE),
        (("5", "5", "7", "8", "9"), BELOW_THRESHOLD),
        (("5", None, None, None), BELOW_THRESHOLD),  # of all samples, not of the votes alone
        ((None, None), NO_VOTES),
        ((None,), NO_VOTES),
    ],
)
def test_without_a_clear_majority_all_samples_of_a_prompt_abstain(answers, cause) -> None:
    """VF-13."""
    scores = vote(*answers)
    assert scores == [None] * len(answers)
    assert scores.causes == dict.fromkeys(range(len(answers)), cause)


def test_a_single_sample_is_its_own_majority() -> None:
    """VF-13."""
    assert vote("5") == [1.0]


answers = st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=8)


@given(answers, st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]), st.randoms())
def test_scores_are_those_of_counting_in_any_order(given_answers, threshold, rng) -> None:
    """VF-1, VF-5."""
    function = VoteReward(threshold)
    counts = Counter(a for a in given_answers if a is not None).most_common()
    if not counts or (len(counts) > 1 and counts[0][1] == counts[1][1]):
        label = None
    else:
        label = counts[0][0] if counts[0][1] >= threshold * len(given_answers) else None
    expected = [None if label is None else float(a == label) for a in given_answers]
    assert vote(*given_answers, function=function) == expected
    order = list(range(len(given_answers)))
    rng.shuffle(order)
    shuffled = vote(*(given_answers[i] for i in order), function=function)
    assert shuffled == [expected[i] for i in order]


def test_each_prompt_votes_for_itself_also_when_prompts_are_mixed() -> None:
    prompts = ["P", "Q", "P", "Q", "P", "Q"]
    completions = says("1", "2", "1", "1", "2", "2")
    assert vote_reward(prompts=prompts, completions=completions) == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    chat = [[{"role": "user", "content": p}] for p in prompts]
    assert vote_reward(prompts=chat, completions=completions) == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]


def test_votes_are_weighed_by_another_function() -> None:
    def trust(completions, level, **kwargs):
        return level

    weighed = VoteReward(threshold=0.0, weigh_by=trust)
    assert vote("1", "2", "2", function=weighed, level=[5.0, 1.0, 1.0]) == [1.0, 0.0, 0.0]
    assert vote("1", "2", "2", function=weighed, level=[None, 1.0, None]) == [0.0, 1.0, 1.0]
    tied = vote("1", "2", "2", function=weighed, level=[0.3, 0.1, 0.2])
    assert set(tied.causes.values()) == {TIE}
    none = vote("1", "2", function=weighed, level=[0.0, None])
    assert set(none.causes.values()) == {NO_VOTES}
    # 3 of 4 of the weight, though 1 of 3 of the samples
    assert vote("1", "2", None, function=VoteReward(0.7, weigh_by=trust), level=[3, 0.5, 0.5]) == [
        1.0, 0.0, 0.0,
    ]  # fmt: skip
    assert vote("1", "2", function=weighed, level=[math.nan, 1.0]) == [0.0, 1.0]
    with pytest.raises(ValueError, match="trust gave 3 weights for 2 completions"):
        vote("1", "2", function=weighed, level=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"trust gave -1\.0 as the weight of completion 1"):
        vote("1", "2", function=weighed, level=[1.0, -1.0])


def test_a_form_of_one_s_own_decides_what_votes_together() -> None:
    last_digit = VoteReward(normal_form=lambda text: text[-1] if text[-1].isdigit() else None)
    completions = ["13", "3", "x", "4"]
    scores = last_digit(prompts=["Q"] * 4, completions=completions)
    assert scores == [1.0, 1.0, 0.0, 0.0]


def test_confidence_and_the_accuracy_of_labels_are_logged() -> None:
    """Accuracy only of labels that were voted for, and whose solution is known."""
    logged = []
    function = VoteReward(check_by=exact_reward)
    scores = function(
        prompts=["P"] * 3 + ["Q"] * 3 + ["R"] * 2 + ["S"],
        completions=says("1", "1", "2", "4", "5", "5", "6", "7", "8"),
        solution=["1"] * 3 + ["4"] * 3 + ["6"] * 2 + [None],
        log_metric=lambda name, value: logged.append((name, value)),
    )
    assert scores == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, None, None, 1.0]
    values = {name: [v for n, v in logged if n == name] for name, _ in logged}
    assert values == {
        "vote_confidence": [2 / 3, 2 / 3, 1 / 2, 1.0],
        "vote_decided": [1.0, 1.0, 0.0, 1.0],
        "vote_label_accuracy": [1.0, 0.0],
    }


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threshold": 1.2}, r"threshold=1\.2"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"normal_form": None}, "normal_form is None"),
        ({"weigh_by": "model"}, "weigh_by is 'model'"),
    ],
)
def test_options_that_can_t_work_are_refused(options, error) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        VoteReward(**options)


def test_an_async_function_can_t_weigh_votes() -> None:
    async def later(completions, **kwargs):
        return [1.0] * len(completions)

    with pytest.raises(TypeError, match=r"weigh_by is .* isn't async"):
        VoteReward(weigh_by=later)


def test_a_vote_reads_the_columns_of_the_functions_that_it_calls() -> None:
    """So rows that differ in other columns alone are one prompt, with one vote."""
    columns = ["prompt", "id", "solution"]
    assert columns_read(vote_reward, columns) == []
    assert columns_read([VoteReward(check_by=exact_reward)], columns) == ["solution"]
    with pytest.raises(ValueError, match=r"'exact_reward' needs \['solution'\]"):
        Scorer(VoteReward(check_by=exact_reward)).check_columns(["id"], "train_dataset")


def test_rows_with_the_same_prompt_vote_apart(make_rollout, word_tokenizer, sums) -> None:
    """Two solutions of one prompt are two rows: whether they are graded in one call has no effect."""
    (row,) = sums(1)
    dataset = Dataset.from_list([row, {**row, "solution": "other"}])
    rows = {r.prompt_id: r for r in load_prompt_rows(dataset, "d")}
    assert len(rows) == 2
    rollouts = [
        make_rollout(prompt_id=prompt_id, sample_index=i, completion=text)
        for prompt_id, texts in zip(rows, (says("1", "1", "2"), says("2", "2", "2")), strict=True)
        for i, text in enumerate(texts)
    ]
    collector = Collector(None, Scorer(vote_reward), word_tokenizer, Accelerator(cpu=True), 0)
    together = [r.reward for r in collector.grade(rollouts, rows)]
    assert together == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    mixed = random.Random(0).sample(rollouts, len(rollouts))
    by_key = {(r.prompt_id, r.sample_index): r.reward for r in collector.grade(mixed, rows)}
    assert [by_key[r.prompt_id, r.sample_index] for r in rollouts] == together


@pytest.mark.parametrize(
    ("answers", "scores"),
    [
        (("5 km", "5", "7", "5"), [1.0, 1.0, 0.0, 1.0]),
        (("5 km", "5", "7", "7 km", "5 km"), [1.0, 1.0, 0.0, 0.0, 1.0]),
        (("1/3", "0.33333333", "0.25"), [1.0, 1.0, 0.0]),
        ((r"$\frac12$", "0.5", "2"), [1.0, 1.0, 0.0]),
        # 5 agrees with both, and they don't agree with each other
        (("5 km", "5", "5", "5", "5 m"), [0.0, 1.0, 1.0, 1.0, 0.0]),
        (("5", "5%", "5%"), [0.0, 1.0, 1.0]),
    ],
)
def test_answers_vote_together_that_exact_reward_takes_for_the_same(answers, scores) -> None:
    assert vote(*answers) == scores
    for order in itertools.permutations(range(len(answers))):
        assert vote(*(answers[i] for i in order)) == [scores[i] for i in order]


def test_a_vote_of_exact_weights_doesn_t_depend_on_the_order() -> None:
    weights = [0.1, 0.2, 0.3, 1e16, 1.0, 1e16 + 2]
    forms = ["a", "a", "b", "c", "c", "d"]
    outcomes = {
        count_votes([forms[i] for i in order], [weights[i] for i in order]).cause
        for order in itertools.permutations(range(6))
    }
    assert outcomes == {TIE}


def test_only_marked_answers_have_a_form() -> None:
    assert answer_form("no idea") is None
    assert answer_form("The answer is .") is None
    assert answer_form("\\boxed{7}") == answer_form("#### 7.0")


def test_grpo_trains_on_votes(tmp_path, tiny_model, word_tokenizer, sums) -> None:
    """VF-14: for two steps; its batches hold all samples of a prompt."""
    seen = []

    class Watched(VoteReward):
        def __call__(self, prompts, completions, **kwargs):
            seen.append(Counter(prompts))
            return super().__call__(prompts, completions, **kwargs)

    trainer = GRPOTrainer(
        tiny_model(word_tokenizer),
        reward_funcs=Watched(0.2, normal_form=lambda text: text.split()[0] if text else None),
        args=GRPOConfig(
            str(tmp_path), num_generations=4, per_device_train_batch_size=8, max_steps=2,
            max_completion_length=4, report_to=[], bf16=False, use_cpu=True, save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=sums(8),
        processing_class=word_tokenizer,
    )  # fmt: skip
    assert trainer.train().global_step == 2
    assert [set(counts.values()) for counts in seen] == [{4}, {4}]
    logs = [log for log in trainer.state.log_history if "rewards/vote_reward/mean" in log]
    assert len(logs) == 2
    assert all("vote_confidence" in log for log in logs)
