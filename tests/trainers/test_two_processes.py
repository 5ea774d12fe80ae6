"""Two processes share the sampling, and come to the samples and weights of one in round 0."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_selfplay.rollouts.record import load_rollouts

# Two processes take two rows each where one takes them in two passes.
SCRIPT = """
import json, os, sys
from datasets import Dataset
from peft import LoraConfig
from trl_selfplay import (
    IRPOConfig, IRPOTrainer, ReSTEMConfig, ReSTEMTrainer, STaRConfig, STaRTrainer
)


def reward(completions, solution, **kwargs):
    return [len(c) % 4 / 8 + float(s in c.split()) for c, s in zip(completions, solution)]


method, model, folder, changes = sys.argv[1:]
Trainer, Config = {"STaR": (STaRTrainer, STaRConfig), "IRPO": (IRPOTrainer, IRPOConfig)}.get(
    method, (ReSTEMTrainer, ReSTEMConfig)
)
pairs = [divmod(i, 10) for i in range(18)]
rows = [{"prompt": f"Q {a} + {b} = ?", "solution": str((a + b) % 10)} for a, b in pairs]
gold = {"gold_dataset": Dataset.from_list(
    [{**row, "completion": f"so {row['solution']}"} for row in rows[:14]]
)} if method == "ReST" else {}
trainer = Trainer(
    model,
    args=Config(
        folder, num_rounds=2, num_generations=6, temperature=1.0, top_k=0, max_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=0.5, optim="sgd", report_to=[], disable_tqdm=True, gradient_checkpointing=False,
        use_cpu=True, seed=1, load_best_round_at_end=False, **json.loads(changes),
    ),
    train_dataset=Dataset.from_list(rows[:14]),
    eval_dataset=Dataset.from_list(rows[14:]),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    reward_funcs=reward,
    **gold,
)
trainer.self_play.collector.sampler.suggest_batch_size = lambda *lengths: 3
trainer.train()
trainer.end()
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def samples_of_round_0(folder: Path):
    paths = sorted((folder / "_rounds" / "round-000" / "samples").glob("*.parquet"))
    return [r for path in paths for r in load_rollouts(path)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("STaR", {}),
        ("IRPO", {"max_completion_length": 32, "max_per_prompt": 2}),
        ("ReST^EM", {"loss_weighting": "reward"}),
        ("ReST", {"improve_thresholds": [0.1, 0.3], "start_from": "previous"}),
    ],
)
def test_two_processes_come_to_what_one_does(tmp_path, saved_tiny_model, method, changes) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for folder, launcher in (("one", ()), ("two", TORCHRUN)):
        arguments = [
            script,
            method,
            saved_tiny_model,
            tmp_path / folder,
            json.dumps({"max_completion_length": 8, **changes}),
        ]
        command = [sys.executable, *launcher, *map(str, arguments)]
        subprocess.run(command, env=env, check=True, timeout=300)
    one, two = (samples_of_round_0(tmp_path / folder) for folder in ("one", "two"))
    assert one == two
    assert one
    first, second = (tmp_path / folder / "_rounds" for folder in ("one", "two"))
    lines = [
        [json.loads(line) for line in (root / "rounds.jsonl").read_text().splitlines()]
        for root in (first, second)
    ]
    assert len(lines[0]) == len(lines[1]) == (4 if method == "ReST" else 2)
    for name in ("funnel", "rewards", "examples", "steps", "learning_rate"):
        assert lines[0][0][name] == lines[1][0][name]
    weights, others = (
        load_file(r / "round-000/model/adapter_model.safetensors") for r in (first, second)
    )
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5)
