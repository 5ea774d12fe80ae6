"""The policy as the judge of its own samples: when, with which weights, and again after a kill."""

import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_rewards import contains_solution

from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.rewards import JudgeReward
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rounds.judging import check_judges
from trl_selfplay.rounds.weights import copy_into

# A random model names no tag: any number counts.
FORM = {
    "template": "{prompt} {completion} so", "verdict": r".*?(\d).*", "scale": (0, 9),
    "temperature": 1.0, "max_completion_length": 40,
}  # fmt: skip
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def judge(**changes):
    return JudgeReward("policy", **{**FORM, **changes})


def files(folder, pattern="_rounds/**/*.parquet"):
    """Return what lies in a run's files of samples, replies and outcomes."""
    return {
        str(path.relative_to(folder)): pq.read_table(path).to_pylist()
        for path in sorted(Path(folder).glob(pattern))
    }


@pytest.fixture
def judged(build_star, sums):
    """Return a function that builds a STaR run whose second reward function is the policy."""

    def build(folder, **changes):
        settings = {
            "reward_funcs": [contains_solution, judge()],
            "reward_weights": [1.0, 0.5],
            "reward_threshold": 0.4,
            "eval_dataset": sums(3, first=20),
            "num_generations_eval": 2,
            "load_best_round_at_end": False,
            "rationalize": True,
        }
        return build_star(folder, **{**settings, **changes})

    return build


def test_samples_are_the_same_with_and_without_the_judge(judged, tmp_path) -> None:
    """Judging comes after sampling, from other random streams, and leaves the weights alone."""
    judged("with", reward_weights=[1.0, 0.0], reward_threshold=1.0).train()
    judged("without", reward_funcs=contains_solution, reward_weights=[1.0], reward_threshold=1.0).train()  # fmt: skip
    both = [files(tmp_path / name, "_rounds/*/samples/*.parquet") for name in ("with", "without")]
    assert both[0].keys() == both[1].keys()
    for name, rows in both[0].items():
        for row, other in zip(rows, both[1][name], strict=True):
            assert row["completion_ids"] == other["completion_ids"]
            assert row["rewards"][0] == other["rewards"][0]
    judgements = files(tmp_path / "with", "_rounds/*/**/judgements/*.parquet")
    assert {Path(name).parts[1] for name in judgements} == {"before", "round-000", "round-001"}
    scores = [row["rewards"][1] for rows in both[0].values() for row in rows]
    assert None in scores
    assert len({score for score in scores if score is not None}) > 2
    saved = [tmp_path / name / "model.safetensors" for name in ("with", "without")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.mark.parametrize("weights", ["initial", "current"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "LoRA"])
def test_replies_come_from_the_weights_that_were_asked_for(
    judged, tmp_path, recorder, word_tokenizer, weights, peft_config
) -> None:
    """Round 1's replies equal those of the untrained model, or of the one that round 0 left."""
    trainer = judged(
        "run", reward_funcs=judge(weights=weights), reward_weights=[1.0], peft_config=peft_config,
        start_from="previous", eval_dataset=None, rationalize=False, callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    moments = recorder.weights_at_train_begin, recorder.weights_at_train_end
    asked = moments[weights == "current"][0]  # as round 0's training began, or ended
    copy_into(trainer.model, asked, "the recorder")
    sampler = TransformersSampler(trainer.model.eval(), word_tokenizer)
    options = SamplingOptions(40, 1.0, eos_token_ids=(word_tokenizer.eos_token_id,))
    [path] = (tmp_path / "run" / "_rounds" / "round-001" / "judgements").glob("*.parquet")
    for rollout in load_rollouts(path):
        key = stream_key(trainer.args.seed, 1, "judge", rollout.prompt_id, 0)
        [(_, sampled)] = sampler.sample([SampleRequest(rollout.prompt_ids, key)], options, 1)
        assert sampled.completion_ids == rollout.completion_ids


class Interrupted(Exception):
    pass


def interrupt(trainer, moment):
    """Let the trainer's sampler raise after so many samples."""
    sampler, left = trainer.self_play.collector.sampler, [moment]
    sample = sampler.sample

    def watched(*args):
        for finished in sample(*args):
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted
            yield finished

    sampler.sample = watched


def test_a_run_that_was_interrupted_goes_on_with_the_same_judgements(judged, tmp_path) -> None:
    """While held-out replies and then those of a round are sampled; tests/faults kills processes."""
    judged("whole").train()
    for moment in (15, 40):
        trainer = judged("run")
        interrupt(trainer, moment)
        with pytest.raises(Interrupted):
            trainer.train(resume_from_checkpoint=True)
    judged("run").train(resume_from_checkpoint=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    saved = [tmp_path / name / "model.safetensors" for name in ("run", "whole")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_samples_are_judged_before_any_is_graded_and_once(judged, tmp_path, monkeypatch) -> None:
    events = []
    trainer = judged("run", eval_dataset=None, rationalize=False, num_rounds=1)
    ask, grade = type(trainer.self_play).ask, type(trainer.self_play.collector).grade

    def watched_ask(self, rows, round_index, phase, *args, **kwargs):
        events.append(phase)
        return ask(self, rows, round_index, phase, *args, **kwargs)

    def watched_grade(self, *args):
        events.append("grade")
        return grade(self, *args)

    monkeypatch.setattr(type(trainer.self_play), "ask", watched_ask)
    monkeypatch.setattr(type(trainer.self_play.collector), "grade", watched_grade)
    trainer.train()
    assert events[:2] == ["train", "judge"]
    assert set(events[2:]) == {"grade"}
    events.clear()
    judged("run", eval_dataset=None, rationalize=False, num_rounds=2).train(True)
    assert events[:2] == ["train", "judge"]  # of round 1 alone


def test_gold_and_evaluate_are_judged_as_well(
    build_rest_em, sums, gold_answers, tmp_path, monkeypatch
) -> None:
    trainer = build_rest_em(
        reward_funcs=judge(), improve_thresholds=[0.1, 0.2], gold_dataset=gold_answers(),
        eval_dataset=sums(3, first=20), start_from="previous", max_per_prompt=None,
        few_shot_in_training=False,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    first = trainer.evaluate()
    trainer.train()
    gold = pq.read_table(tmp_path / "run" / "_rounds" / "gold.parquet").to_pylist()
    assert len(gold) == 4
    assert any(row["reward"] is not None for row in gold)
    after = trainer.evaluate()
    assert {n for n in first if "reward" in n} <= after.keys()
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_a_question_without_room_abstains_and_the_round_goes_on(
    judged, tmp_path, tiny_model, word_tokenizer
) -> None:
    trainer = judged(
        "run", model=tiny_model(word_tokenizer, max_position_embeddings=24), num_rounds=1,
        reward_funcs=[contains_solution, judge(max_completion_length=10)], eval_dataset=None,
        max_steps=1, rationalize=False,
    )  # fmt: skip
    trainer.train()
    rows = [r for rows in files(tmp_path / "run", "_rounds/*/samples/*.parquet").values() for r in rows]  # fmt: skip
    causes = [row["causes"][1] for row in rows if row["causes"]]
    assert "the question is too long for the judge" in causes
    assert any(row["rewards"][1] is not None for row in rows)


def test_another_rubric_is_warned_of_and_what_was_asked_is_refused(
    judged, tmp_path, caplog
) -> None:
    settings = {"eval_dataset": None, "rationalize": False}
    judged("run", num_rounds=1, **settings).train()
    recorded = json.loads((tmp_path / "run" / "_rounds" / "config.json").read_text())
    assert recorded["graders.judge_reward.weights"] == "initial"
    other = [contains_solution, judge(rubric="Is it short?")]
    with caplog.at_level(logging.WARNING):
        judged("run", num_rounds=2, reward_funcs=other, **settings).train(True)
    assert "graders.judge_reward.rubric" in caplog.text
    assert "Is it short?" in caplog.text


def test_replies_to_other_questions_arent_taken_for_these(judged, tmp_path) -> None:
    settings = {"eval_dataset": None, "rationalize": False, "num_rounds": 1}
    judged("run", **settings).train()
    rounds = tmp_path / "run" / "_rounds"
    (rounds / "rounds.jsonl").unlink()
    for name in ("dataset", "model"):
        for path in (rounds / "round-000" / name).glob("*"):
            path.unlink()
        (rounds / "round-000" / name).rmdir()
    for path in (rounds / "round-000" / "samples").glob("*.parquet"):
        path.unlink()  # they are sampled again, and have to be judged
    other = [contains_solution, judge(template="{completion} {prompt} so")]
    with pytest.raises(ValueError, match=r"judgements.*plans"):
        judged("run", reward_funcs=other, **settings).train(True)


def test_samples_are_not_compared_where_there_is_one(judged) -> None:
    compares = JudgeReward("policy", against="samples", max_completion_length=64)
    fixed = {"reward_funcs": compares, "reward_weights": [1.0], "rationalize": False}
    with pytest.raises(ValueError, match="judge_reward compares a prompt's samples"):
        judged("run", **fixed)
    judged("run", **fixed, eval_dataset=None)


def test_weights_that_are_divided_over_processes_are_not_exchanged(judged) -> None:
    only = {"reward_weights": [1.0], "eval_dataset": None}
    check_judges(judged("a", reward_funcs=judge(weights="current"), **only).self_play, True)
    play = judged("b", reward_funcs=judge(), **only).self_play
    check_judges(play, False)
    with pytest.raises(ValueError, match="weights='current'"):
        check_judges(play, True)


def test_a_judge_without_room_for_its_replies_is_refused(judged) -> None:
    with pytest.raises(ValueError, match=r"'policy' has a context of 512 .* Lower that"):
        judged("run", reward_funcs=judge(max_completion_length=512), reward_weights=[1.0])


def test_a_judge_that_needs_a_solution_wants_the_column(judged, sums) -> None:
    rows = sums(6).remove_columns("solution")
    with pytest.raises(ValueError, match="column `solution`"):
        judged(
            "run", reward_weights=[1.0],
            reward_funcs=JudgeReward("policy", against="solution", max_completion_length=64),
            train_dataset=rows, eval_dataset=None, rationalize=False,
        )  # fmt: skip
    lists = Dataset.from_list([{"prompt": "Q", "solution": ["1"]}])
    with pytest.raises(TypeError, match="compares with one answer"):
        judged(
            "run", reward_weights=[1.0],
            reward_funcs=JudgeReward("policy", shows_solution=True, max_completion_length=64),
            train_dataset=lists, eval_dataset=None, rationalize=False,
        )  # fmt: skip
