"""Two processes share the sampling and come to what one process samples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_selfplay.rollouts import load_rollouts

SCRIPT = """
import sys
from datasets import Dataset
from trl_selfplay import STaRConfig, STaRTrainer


def reward(completions, solution, **kwargs):
    return [float(s in c.split()) for c, s in zip(completions, solution, strict=True)]


pairs = [divmod(i, 10) for i in range(18)]
rows = [{"prompt": f"Q {a} + {b} = ?", "solution": str((a + b) % 10)} for a, b in pairs]
trainer = STaRTrainer(
    sys.argv[1],
    STaRConfig(
        sys.argv[2], num_rounds=2, num_generations=6, temperature=1.0, max_completion_length=8,
        max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, activation_checkpointing=False, use_cpu=True,
    ),
    train_dataset=Dataset.from_list(rows[:14]),
    eval_dataset=Dataset.from_list(rows[14:]),
    reward_funcs=reward,
)
trainer.self_play.collector.sampler.suggest_batch_size = lambda *lengths: 3
trainer.train()
trainer.end()
"""


def samples_of_round_0(folder: Path):
    paths = sorted((folder / "_rounds" / "round-000" / "samples").glob("*.parquet"))
    return [r for path in paths for r in load_rollouts(path)]


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tmp_path, saved_tiny_model) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for folder, launch in (
        ("one", [sys.executable]),
        ("two", [*torchrun, "--nproc_per_node", "2"]),
    ):
        subprocess.run(
            [*launch, str(script), str(saved_tiny_model), str(tmp_path / folder)],
            env=env,
            check=True,
            timeout=300,
        )
    one, two = (samples_of_round_0(tmp_path / folder) for folder in ("one", "two"))
    assert one == two
    assert one
    lines = (tmp_path / "two" / "_rounds" / "rounds.jsonl").read_text().splitlines()
    assert len(lines) == 2
