"""Trainers that grade by votes: what they refuse, and what becomes of the votes."""

import json

import pytest

from trl_selfplay.rewards import VoteReward, exact_reward, vote_reward
from trl_selfplay.rewards.vote import count_votes
from trl_selfplay.rollouts.record import load_rollouts


def parity(text):
    """Return whether the first number is odd, on which a random model's samples may agree."""
    return next((int(word) % 2 for word in text.split() if word.isdigit()), None)


BUILDERS = ["build_star", "build_rest_em", "build_irpo"]


@pytest.fixture(params=BUILDERS)
def build(request):
    fixed = {"rationalize": False} if request.param == "build_star" else {}
    builder = request.getfixturevalue(request.param)
    return lambda **arguments: builder(**{"reward_funcs": vote_reward, **fixed, **arguments})


def test_held_out_prompts_need_functions_of_their_own(build, sums) -> None:
    """One greedy completion would always agree with itself."""
    heldout = sums(4, first=90)
    with pytest.raises(ValueError, match=r"vote_reward compares .*eval_reward_funcs=exact_reward"):
        build(eval_dataset=heldout)
    with pytest.raises(ValueError, match="can't grade the held-out prompts"):
        build(eval_dataset=heldout, eval_reward_funcs=[exact_reward, VoteReward()])
    trainer = build()
    with pytest.raises(ValueError, match="can't grade the held-out prompts"):
        trainer.evaluate(heldout)
    graded = build(eval_dataset=heldout, eval_reward_funcs=exact_reward)
    assert graded.self_play.collector.heldout_scorer.names == ("exact_reward",)


def test_single_samples_can_t_be_compared(build_star, build_rest_em) -> None:
    for builder, fixed in ((build_star, {"rationalize": False}), (build_rest_em, {})):
        with pytest.raises(ValueError, match="num_generations=1 with vote_reward"):
            builder(reward_funcs=vote_reward, num_generations=1, **fixed)


def test_hinted_samples_would_agree_on_the_hint(build_star) -> None:
    with pytest.raises(ValueError, match="rationalize=True with vote_reward"):
        build_star(reward_funcs=vote_reward, rationalize=True)


def test_gold_completions_would_agree_with_themselves(build_irpo, sums) -> None:
    gold = sums(4).map(lambda row: {"completion": f" so {row['solution']}"})
    with pytest.raises(ValueError, match="can't grade `gold_dataset`"):
        build_irpo(reward_funcs=vote_reward, gold_dataset=gold)


def test_a_run_without_solutions_trains_on_what_its_samples_agree_on(build_rest_em, sums) -> None:
    """Each prompt's rewards are those of its own samples; ties are counted in the funnel."""
    votes = VoteReward(0.6, normal_form=parity)
    trainer = build_rest_em(
        reward_funcs=votes, num_generations=6, num_rounds=1, on_empty_round="stop",
        train_dataset=sums(12).remove_columns("solution"), max_completion_length=24,
    )  # fmt: skip
    trainer.self_play.collector.sampler.suggest_batch_size = lambda *_: 5  # several shards
    trainer.train()
    folder = trainer.run.folder(0) / "samples"
    shards = [load_rollouts(path) for path in sorted(folder.glob("0*.parquet"))]
    assert len(shards) > 2
    by_prompt = {}
    for rollout in (r for shard in shards for r in shard):
        by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    assert len(by_prompt) == 12
    causes = []
    for rollouts in by_prompt.values():
        forms = [parity(r.completion) for r in rollouts]
        vote = count_votes(forms, threshold=0.6)
        expected = [None if vote.label is None else float(f == vote.label) for f in forms]
        assert [r.reward for r in rollouts] == expected
        assert {r.causes for r in rollouts} == {(vote.cause,) if vote.cause else ()}
        causes += [vote.cause] * 6 if vote.cause else []
    line = json.loads((trainer.run.root / "rounds.jsonl").read_text())
    counted = {k: n for k, n in line["funnel"].items() if k.startswith("abstained: ")}
    assert causes
    assert counted == {f"abstained: {cause}": causes.count(cause) for cause in set(causes)}
    assert 0.0 < line["metrics"]["play/vote_confidence"] < 1.0
    decided = sum(r.reward is not None for rollouts in by_prompt.values() for r in rollouts) / 72
    assert line["metrics"]["play/vote_decided"] == pytest.approx(decided)


def test_the_options_of_a_vote_belong_to_the_run(build_rest_em, caplog) -> None:
    arguments = {"num_rounds": 1, "on_empty_round": "stop"}
    build_rest_em(reward_funcs=VoteReward(0.3, parity), **arguments).train()
    changed = build_rest_em(reward_funcs=VoteReward(0.9, parity), **arguments)
    changed.train(resume_from_checkpoint=True)
    assert "graders.vote_reward.threshold" in caplog.text
