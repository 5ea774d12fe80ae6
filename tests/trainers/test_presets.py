"""Every preset of every `from_paper` runs to its last round, with reward functions of this package.

Only sizes are smaller: steps, samples, batches, lengths. The model is tiny and right on half of its
prompts, so rounds find something to keep and something to drop.
"""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_selfplay import (
    IRPOConfig,
    IRPOTrainer,
    QuietSTaRConfig,
    QuietSTaRTrainer,
    ReSTEMConfig,
    ReSTEMTrainer,
    SPINConfig,
    SPINTrainer,
    STaRConfig,
    STaRTrainer,
)
from trl_selfplay.rewards import choice_reward, equations_reward, exact_reward
from trl_selfplay.rollouts.selection import reasoning_path
from trl_selfplay.trainers.irpo.config import _PRESETS as IRPO_PRESETS
from trl_selfplay.trainers.rest_em.config import _PRESETS as REST_EM_PRESETS
from trl_selfplay.trainers.star.config import PAPER_PRESETS as STAR_PRESETS

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
WORDS = [*map(str, range(10)), "+", "=", "?", "Q", "A", "B", "Answer:"]
QUIET = {
    "report_to": [], "disable_tqdm": True, "use_cpu": True, "gradient_checkpointing": False,
    "save_strategy": "no",
}  # fmt: skip
SHORT = {"max_completion_length": 10, "per_device_train_batch_size": 4}
STAR_ROUNDS = {"commonsense_qa": 30, "gsm8k": 36, "addition": 16}
REST_EM_ROUNDS = {"math": 3, "apps": 1, "v_star": 3, "rest": 2 * 3, "rft": 1}
IRPO_ROUNDS = {"gsm8k": 4, "arc": 3, "math": 3}


@pytest.fixture
def tokenizer():
    backend = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate([*SPECIAL.values(), *WORDS])}, unk_token="<unk>"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **SPECIAL)


def additions(count=12):
    """Sums below 10 with their worked answers."""
    pairs = [(a, b) for a in range(5) for b in range(5)][:count]
    return Dataset.from_list(
        [
            {"prompt": f"Q {a} + {b} = ?", "completion": f" {a} + {b} = {a + b} Answer: {a + b}",
             "solution": str(a + b)}
            for a, b in pairs
        ]
    )  # fmt: skip


def choices(count=12):
    """Questions with two letters to choose from."""
    return Dataset.from_list(
        [
            {"prompt": f"Q {i // 10} {i % 10} A B ?", "completion": f" Answer: {'AB'[i % 2]}",
             "solution": "AB"[i % 2]}
            for i in range(count)
        ]
    )  # fmt: skip


@pytest.fixture
def half_taught(tiny_model, tokenizer):
    """Return a function that teaches a tiny model every other row."""

    def teach(rows):
        model = tiny_model(tokenizer)
        ids = [
            tokenizer(r["prompt"] + r["completion"])["input_ids"] + [tokenizer.eos_token_id]
            for r in rows
        ][::2]
        length = max(map(len, ids))
        batch = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(80):
            loss = model(batch, labels=batch.masked_fill(batch == 0, -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    return teach


def read_lines(trainer):
    return [json.loads(line) for line in trainer.run.lines_path.read_text().splitlines()]


def assert_trained(lines, rounds) -> None:
    assert [line["round"] for line in lines] == list(range(rounds))
    assert all(line["steps"] > 0 and line["examples"] > 0 for line in lines)


def test_the_presets_are_those_that_run_below() -> None:
    assert set(STAR_PRESETS) == set(STAR_ROUNDS)
    assert set(REST_EM_PRESETS) == set(REST_EM_ROUNDS)
    assert set(IRPO_PRESETS) == set(IRPO_ROUNDS)


@pytest.mark.full
@pytest.mark.parametrize("preset", STAR_PRESETS)
def test_a_preset_of_star_runs_to_its_end(preset, half_taught, tokenizer, tmp_path) -> None:
    rows, reward = (
        (choices(), choice_reward) if preset == "commonsense_qa" else (additions(), exact_reward)
    )
    rounds = STAR_ROUNDS[preset]
    config = STaRConfig.from_paper(
        preset, output_dir=str(tmp_path), **QUIET, **SHORT, max_length=64,
        round_max_steps=[1] * rounds,
    )  # fmt: skip
    assert config.num_rounds == rounds
    trainer = STaRTrainer(
        half_taught(rows), config, train_dataset=rows.remove_columns("completion"),
        reward_funcs=reward, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert_trained(read_lines(trainer), rounds)


@pytest.mark.parametrize(
    "preset",
    [
        # "apps" is "math" with other numbers
        p if p == "rest" else pytest.param(p, marks=pytest.mark.slow)
        for p in REST_EM_PRESETS
        if p != "apps"
    ],
)
def test_a_preset_of_rest_em_runs_to_its_end(preset, half_taught, tokenizer, tmp_path) -> None:
    rows = additions()
    arguments = {"reward_funcs": exact_reward}
    size = {"num_generations": 6, "max_steps": 1}
    if preset == "rest":  # 0, .25, .75 or 1
        size["reward_weights"] = [0.75, 0.25]
    if preset in ("rest", "rft"):
        arguments = {"reward_funcs": [exact_reward, equations_reward], "gold_dataset": rows}
        size["gradient_accumulation_steps"] = 1
    if preset == "v_star":
        arguments["gold_dataset"] = rows
    if preset == "rft":
        arguments["normal_form"] = reasoning_path
    trainer = ReSTEMTrainer(
        half_taught(rows),
        ReSTEMConfig.from_paper(preset, output_dir=str(tmp_path), **QUIET, **{**SHORT, **size}),
        train_dataset=rows, processing_class=tokenizer, **arguments,
    )  # fmt: skip
    trainer.train()
    lines = read_lines(trainer)
    assert_trained(lines, REST_EM_ROUNDS[preset])
    if preset == "rest":
        assert [line["threshold"] for line in lines] == [0.7, 0.8, 0.9] * 2
        for earlier, later in ((0, 1), (1, 2), (3, 4), (4, 5)):
            assert lines[earlier]["examples"] >= lines[later]["examples"]
    if preset == "rft":
        assert lines[0]["sampled_from"] == "warm-up"
        assert lines[0]["funnel"]["gold"] == len(rows)


@pytest.mark.slow
def test_the_preset_of_spin_runs_to_its_end(half_taught, tokenizer, tmp_path) -> None:
    rows = additions()
    trainer = SPINTrainer(
        half_taught(rows),
        args=SPINConfig.from_paper(
            output_dir=str(tmp_path), **QUIET, per_device_train_batch_size=4,
            gradient_accumulation_steps=1, max_completion_length=10, max_length=64, max_steps=2,
        ),
        train_dataset=rows.remove_columns("solution"), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert_trained(read_lines(trainer), 4)


@pytest.mark.parametrize(
    "preset",
    [p if p == "gsm8k" else pytest.param(p, marks=pytest.mark.slow) for p in IRPO_PRESETS],
)
def test_a_preset_of_irpo_runs_to_its_end(preset, half_taught, tokenizer, tmp_path) -> None:
    rows, reward = (choices(), choice_reward) if preset == "arc" else (additions(), exact_reward)
    trainer = IRPOTrainer(
        half_taught(rows),
        args=IRPOConfig.from_paper(
            preset, output_dir=str(tmp_path), **QUIET, **SHORT, num_generations=6, max_steps=1,
            gradient_accumulation_steps=1,
        ),
        train_dataset=rows.remove_columns("completion"), reward_funcs=reward,
        processing_class=tokenizer, gold_dataset=rows,
    )  # fmt: skip
    trainer.train()
    assert_trained(read_lines(trainer), IRPO_ROUNDS[preset])


@pytest.mark.slow
def test_the_preset_of_quiet_star_runs_to_its_end(half_taught, tokenizer, tmp_path) -> None:
    rows = additions().map(lambda row: {"text": row["prompt"] + row["completion"]})
    trainer = QuietSTaRTrainer(
        half_taught(rows),
        QuietSTaRConfig.from_paper(output_dir=str(tmp_path), **QUIET, max_steps=2, max_length=32),
        train_dataset=rows.select_columns("text"), processing_class=tokenizer,
    )  # fmt: skip
    assert trainer.train().global_step == 2
