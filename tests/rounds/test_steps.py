"""Which sample of a step goes on, and which one is trained on: RA-3, RA-5, RA-6, RA-11."""

import itertools
import re
from dataclasses import replace

import pytest
from chat_server import serving
from patience import ENDS_S

from trl_selfplay.rewards import JudgeReward
from trl_selfplay.rounds.steps import best_ranked, continued_sample

TAG = re.compile(r"Verdict (\w{6}): <")


@pytest.fixture
def samples(make_rollout):
    """Build a step's samples: their rewards, and log-probs for as many tokens."""

    def build(rewards, logprobs=(), lengths=()):
        return [
            make_rollout(
                sample_index=i,
                reward=reward,
                logprob=dict(enumerate(logprobs)).get(i, -1.0),
                completion_ids=(3,) * dict(enumerate(lengths)).get(i, 2),
            )
            for i, reward in enumerate(rewards)
        ]

    return build


def test_the_mean_log_prob_per_token_decides_what_goes_on_and_ties_go_to_the_first(samples) -> None:
    """RA-5: not the sum, which prefers short actions; whatever the order of the records."""
    group = samples([None] * 4, logprobs=[-3.0, -4.0, -2.0, -2.0], lengths=[1, 4, 2, 2])
    for shuffled in itertools.permutations(group):
        assert continued_sample(shuffled).sample_index == 1


def test_without_log_probs_there_is_no_choice(samples) -> None:
    (only,) = samples([None], logprobs=[None])
    assert continued_sample([only]) == only
    with pytest.raises(RuntimeError, match="no log-probs"):
        continued_sample(samples([None, None], logprobs=[None, None]))


def test_the_target_is_the_top_ranked_sample_and_without_ranking_the_continued_one(samples) -> None:
    """RA-3: ties keep the continued sample, then the lowest index."""
    for rewards, continued, target in (
        ([0.1, 0.9, 0.9], 0, 1),
        ([0.1, 0.9, 0.9], 2, 2),
        ([None, None, None], 1, 1),
        ([0.5, None, 0.7], 1, 1),  # nothing says that another one is better
        ([None, 0.2, 0.1], 2, 1),
        ([-1.0, -2.0, -0.5], 1, 2),
    ):
        group = samples(rewards)
        for shuffled in itertools.permutations(group):
            assert best_ranked(shuffled, group[continued]).sample_index == target


def test_what_can_not_be_parsed_is_no_target_however_well_it_is_ranked(samples) -> None:
    """RA-11."""
    group = samples([0.1, 0.9, 0.5])
    assert best_ranked([group[0], group[2]], group[0]).sample_index == 2


@pytest.mark.parametrize("judge", ["fair", "first", "second"])
def test_ranking_by_a_judge_does_not_depend_on_the_order_of_candidates(samples, judge) -> None:
    """RA-6: both orders are asked, and a disagreement is a tie, which keeps the continued sample."""

    def respond(question):
        tag = TAG.search(question)[1]
        shown = re.findall(rf"--- {tag} response [AB] ---\n(.*)\n", question)
        better = {"first": "A", "second": "B", "fair": "AB"[shown[1] > shown[0]]}[judge]
        return f"Verdict {tag}: {better}"

    texts = ["bee", "ant", "cow", "cow"]
    group = [replace(r, completion=t) for r, t in zip(samples([None] * 4), texts, strict=True)]
    with serving(respond) as server:
        reward = JudgeReward("m", base_url=server.url, deadline=ENDS_S, against="samples")
        for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
            given = [group[i].completion for i in order]
            scores = reward(["task"] * 4, given, groups=["one step"] * 4)
            ranked = [replace(group[i], reward=s) for i, s in zip(order, scores, strict=True)]
            (continued,) = (r for r in ranked if r.sample_index == 1)
            target = best_ranked(ranked, continued)
            assert target.sample_index == (2 if judge == "fair" else 1)
        # Three different texts: six ordered pairs, in whatever order they came, though "cow" is there twice.
        assert len(server.questions) == 6


def test_a_judge_compares_no_samples_of_different_steps_with_one_prompt() -> None:
    """RA-6: two trajectories of a question begin with the same prompt."""
    with serving(lambda question: f"Verdict {TAG.search(question)[1]}: A") as server:
        reward = JudgeReward("m", base_url=server.url, deadline=ENDS_S, against="samples")
        given = (["task"] * 4, ["a", "b", "c", "d"])
        assert len(reward.questions(*given, groups=[1, 1, 2, 2])) == 4
        assert len(reward.questions(*given)) == 12
