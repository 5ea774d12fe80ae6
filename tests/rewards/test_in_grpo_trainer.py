"""The reward functions of this package as `reward_funcs` of TRL's own GRPOTrainer."""

import json
import math

import pytest
import torch
from chat_server import serving
from checkers import within_limit
from patience import ENDS_S
from transformers import LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer

from trl_selfplay.rewards import (
    JudgeReward,
    RewardModel,
    VerifierReward,
    checker_reward,
    choice_reward,
    code_fraction_reward,
    code_reward,
    equations_reward,
    exact_reward,
    math_reward,
    puzzle_reward,
    vote_reward,
)
from trl_selfplay.rewards.worker import close_workers

DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def judge():
    """A judge behind a server on this machine, who likes even lengths."""

    def respond(question):
        tag = question.rpartition("Score ")[2].partition(":")[0]
        return f"Score {tag}: {1 + 4 * (len(question) % 2)}"

    with serving(respond) as server:
        yield JudgeReward("m", base_url=server.url, deadline=ENDS_S)


@pytest.fixture
def functions(judge, tiny_model, word_tokenizer):
    pytest.importorskip("math_verify")
    pytest.importorskip("reasoning_gym")
    policy = tiny_model(word_tokenizer)
    torch.manual_seed(0)
    policy.config.num_labels = 1
    classifier = LlamaForSequenceClassification(policy.config)

    async def waiting_reward(completions, **columns):
        return exact_reward(completions, **columns)

    yield [
        exact_reward, math_reward, choice_reward, equations_reward, code_reward, code_fraction_reward,
        puzzle_reward("chain_sum"), checker_reward(within_limit, deadline=ENDS_S), vote_reward, judge,
        RewardModel(classifier, word_tokenizer),
        VerifierReward(tiny_model(word_tokenizer, seed=1), tokenizer=word_tokenizer), waiting_reward,
    ]  # fmt: skip
    close_workers()


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_all_of_them_grade_two_steps(
    functions, chat, tiny_model, word_tokenizer, sums, tmp_path
) -> None:
    """VF-1, VF-14: with the scores that each gives alone, sync and async, to text and messages."""
    seen = []

    def record(prompts, completions, completion_ids, **columns):
        kept = {name: columns[name] for name in ("solution", "choices", "tests", "metadata")}
        seen.append({"prompts": prompts, "completions": completions, **kept,
                     "completion_ids": completion_ids})  # fmt: skip
        return [0.0] * len(completions)

    rows = sums(8).map(
        lambda row: {
            "choices": DIGITS,
            "tests": [f"assert f() == {row['solution']}", "assert f() >= 0"],
            "metadata": json.dumps({"difficulty": {}}),
            **({"prompt": [{"role": "user", "content": row["prompt"]}]} if chat else {}),
        }
    )
    if chat:
        word_tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    trainer = GRPOTrainer(
        tiny_model(word_tokenizer),
        reward_funcs=[*functions, record],
        args=GRPOConfig(
            str(tmp_path), max_steps=2, num_generations=8, per_device_train_batch_size=16,
            max_completion_length=1 if chat else 8, logging_steps=1, report_to=[], bf16=False, use_cpu=True,
            save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=word_tokenizer,
    )  # fmt: skip
    assert trainer.train().global_step == 2
    assert len(seen) == 2
    for step, columns in enumerate(seen):
        logged = trainer.state.log_history[step]
        for function in functions[:-1]:
            scores = function(**columns)
            assert len(scores) == 16
            given = [score for score in scores if score is not None]
            mean = logged[f"rewards/{function.__name__}/mean"]
            if given:
                assert mean == pytest.approx(sum(given) / len(given), abs=1e-5), function.__name__
            else:
                assert mean is None or math.isnan(mean), function.__name__
        assert logged["rewards/waiting_reward/mean"] == logged["rewards/exact_reward/mean"]
