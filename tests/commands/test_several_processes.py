"""A command in two processes, started by torchrun, and in one that accelerate starts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RUN = [
    *("star", "--model_name_or_path", "./tiny-model", "--dataset_name", "./data", "--use_cpu"),
    *("--reward_funcs", "my_rewards.contains", "--output_dir", "out", "--num_rounds", "1"),
    *("--num_generations", "4", "--temperature", "1.0", "--max_completion_length", "8"),
    *("--max_steps", "1", "--report_to", "none", "--on_empty_round", "stop"),
]


@pytest.mark.parametrize(
    ("launcher", "num_processes"),
    [
        pytest.param(
            ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
            2,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["accelerate.commands.launch", "--num_processes", "1", "--cpu"],
            1,
            marks=pytest.mark.full,
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_a_launcher_starts_a_command(launcher, num_processes, work_folder) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "trl_selfplay", *RUN],
        cwd=work_folder, check=False, capture_output=True, text=True, timeout=1200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (work_folder / "out/_rounds/rounds.jsonl").read_text().splitlines()
    assert json.loads(line)["examples"] > 0
    record = json.loads((work_folder / "out/_rounds/config.json").read_text())
    assert record["number_of_processes"] == num_processes
    assert (done.stdout + done.stderr).count("round 0: sample from base") == 1
    counts = re.findall(r"(\d+)/(\d+) samples", done.stderr)
    assert counts[-1][0] == counts[-1][1]
    assert all(int(finished) <= int(total) for finished, total in counts), counts


@pytest.mark.slow
@pytest.mark.parametrize("backend", [[], ["--ddp_backend", "gloo"]])
def test_processes_that_would_not_work_together_are_refused(work_folder, backend) -> None:
    """Without a GPU, transformers joins them only on `--use_cpu`."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "trl_selfplay", *(f for f in RUN if f != "--use_cpu"), *backend],
        cwd=work_folder, check=False, capture_output=True, text=True, timeout=1200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode != 0
    assert "a launcher started 2 processes" in done.stderr
    assert "only with --use_cpu" in done.stderr
    assert "another process is training" not in done.stderr
    assert not (work_folder / "out").exists()
