"""ReST with a reward model: its own tokenizer, stored scores, held-out rows truly graded."""

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from tiny_rewards import contains_solution, digit_share
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

from trl_selfplay.rewards.grading_model import GradingModel
from trl_selfplay.rewards.reward_model import RewardModel
from trl_selfplay.rollouts.record import load_rollouts, save_rollouts
from trl_selfplay.rollouts.stored import load_kept, load_samples


@pytest.fixture
def judge(byte_tokenizer):
    """A random classifier that reads bytes, where the policy reads words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=byte_tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def heldout_rollouts(trainer, round_index):
    folder = trainer.run.folder(round_index) / "evaluation"
    return [r for path in sorted(folder.glob("*.parquet")) for r in load_rollouts(path)]


def test_a_reward_model_has_a_tokenizer_of_its_own_and_scores_alike_again(
    build_rest, judge, byte_tokenizer
) -> None:
    """RE-12: each stored score is the classifier's on its own tokens of prompt and completion."""
    trainer = build_rest(
        reward_funcs=judge, reward_processing_classes=byte_tokenizer, num_rounds=1,
        improve_thresholds=[25.0, 60.0], threshold_kind="percentile",
    )  # fmt: skip
    trainer.train()
    prompts = {row.prompt_id: row.prompt for row in trainer.self_play.rows}
    samples = load_samples(trainer.run.folder(0))
    assert len({r.reward for r in samples}) > 10
    for rollout in samples:
        ids = byte_tokenizer(prompts[rollout.prompt_id] + rollout.completion, return_tensors="pt")
        with torch.no_grad():
            expected = judge(input_ids=ids["input_ids"]).logits[0, 0].item()
        assert rollout.reward == pytest.approx(expected, abs=1e-5)
    examples = [line["examples"] for line in trainer.run.lines]
    assert examples[0] > examples[1] > 0


def test_a_reward_model_leaves_the_device_before_each_training(
    build_rest, judge, byte_tokenizer, sums, monkeypatch
) -> None:
    """Also one that grades held-out prompts alone, and it returns for the next samples."""
    events = []

    class Watched(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            events.append("train")

    for name in ("ready", "park"):
        own = getattr(GradingModel, name)
        monkeypatch.setattr(
            GradingModel, name, lambda self, own=own, name=name: events.append(name) or own(self)
        )
    trainer = build_rest(
        reward_funcs=judge, reward_processing_classes=byte_tokenizer, num_rounds=2,
        eval_dataset=sums(4, first=50), eval_reward_funcs=RewardModel(judge, byte_tokenizer),
        improve_thresholds=[0.0], threshold_kind="percentile", callbacks=[Watched()],
    )  # fmt: skip
    trainer.train()
    phases = [name for name, _ in groupby(events)]
    assert phases == ["ready", "park", "train"] * 2 + ["ready"]
    assert events.count("park") == 4


def test_a_calibrated_reward_is_the_share_of_round_0_s_scores_below(
    build_rest, judge, byte_tokenizer
) -> None:
    """In round 1 as well, whose own scores it doesn't change with, and after a resume."""

    def build(**changes):
        return build_rest(
            reward_funcs=RewardModel(judge, byte_tokenizer, calibrate=True), num_rounds=2,
            improve_thresholds=[0.4], threshold_kind="value", **changes,
        )  # fmt: skip

    trainer = build()
    trainer.train()
    first, second = (load_samples(trainer.run.folder(index)) for index in (0, 1))
    scores = [r.rewards[0] for r in first]
    assert min(scores) < 0.0 or max(scores) > 1.0 or max(scores) - min(scores) < 0.9  # not shares
    for r in (*first, *second):
        below = sum(s < r.rewards[0] for s in scores) + sum(s == r.rewards[0] for s in scores) / 2
        assert r.reward == pytest.approx(below / len(scores))
    assert sum(r.reward for r in first) / len(first) == pytest.approx(0.5)
    kept = {(r.prompt_id, r.sample_index) for r in load_kept(trainer.run.folder(0))}
    assert kept <= {(r.prompt_id, r.sample_index) for r in first if r.reward > 0.4}
    # A run that was killed while rewards were written: some shards have scores, some percentiles.
    shard = next((trainer.run.folder(1) / "samples").glob("*.parquet"))
    rollouts = load_rollouts(shard)
    save_rollouts(shard, [replace(r, reward=r.rewards[0]) for r in rollouts])
    trainer.run.lines_path.write_text(trainer.run.lines_path.read_text().splitlines()[0] + "\n")
    build().train(resume_from_checkpoint=True)
    assert load_samples(trainer.run.folder(1)) == second
    uncalibrated = build_rest(reward_funcs=RewardModel(judge, byte_tokenizer), num_rounds=2,
                              improve_thresholds=[0.4], threshold_kind="value")  # fmt: skip
    with pytest.raises(ValueError, match="calibrated_reward_funcs"):
        uncalibrated.train(resume_from_checkpoint=True)


def test_a_calibrated_reward_cannot_grade_held_out_prompts(
    build_rest, judge, byte_tokenizer, sums
) -> None:
    """Before round 0 there is nothing that it could be compared with."""
    calibrated = RewardModel(judge, byte_tokenizer, calibrate=True)
    with pytest.raises(ValueError, match="Pass `eval_reward_funcs`"):
        build_rest(reward_funcs=calibrated, eval_dataset=sums(4, first=50))
    build_rest("other", reward_funcs=calibrated, eval_dataset=sums(4, first=50),
               eval_reward_funcs=contains_solution)  # fmt: skip


def test_held_out_completions_are_graded_by_functions_of_their_own(build_rest, sums) -> None:
    trainer = build_rest(
        eval_dataset=sums(12, first=50), eval_reward_funcs=contains_solution, num_rounds=1
    )
    trainer.train()
    solutions = {row.prompt_id: row.solution for row in trainer.self_play.heldout[""]}
    rollouts = heldout_rollouts(trainer, 1)
    assert rollouts
    for r in rollouts:
        assert r.rewards == (float(solutions[r.prompt_id] in r.completion.split()),)
    greedy = [r for r in rollouts if r.sample_index == 0]
    accuracy = sum(r.passes(1.0) for r in greedy) / len(greedy)
    assert trainer.run.lines[1]["eval"]["eval_accuracy"] == pytest.approx(accuracy)
    samples = load_samples(trainer.run.folder(0))
    assert [r.reward for r in samples] == digit_share([r.completion for r in samples])


def test_a_held_out_score_is_no_weight_and_may_be_negative(build_rest_em, sums) -> None:
    def minus_one(completions, **kwargs):
        return [-1.0] * len(completions)

    trainer = build_rest_em(
        eval_dataset=sums(4, first=50), eval_reward_funcs=minus_one, reward_funcs=digit_share,
        loss_weighting="reward", num_rounds=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.run.lines[0]["eval"]["eval_mean_reward"] == -1.0


def test_other_held_out_functions_make_another_run(build_rest_em, sums) -> None:
    heldout = sums(4, first=50)
    build_rest_em(eval_dataset=heldout, num_rounds=1).train()
    other = build_rest_em(eval_dataset=heldout, num_rounds=1, eval_reward_funcs=digit_share)
    with pytest.raises(ValueError, match="eval_reward_funcs"):
        other.train(resume_from_checkpoint=True)
