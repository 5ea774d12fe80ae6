"""SPIN under SIGKILL and in two processes."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_from_disk

SCRIPT = Path(__file__).parent / "spin_process.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(folder, model, phase="none", count=0, peft="lora", launcher=()) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), folder, model, phase, str(count), peft]
    done = subprocess.run(list(map(str, command)), env=environment, check=False, timeout=300)
    return done.returncode


def read_run(folder):
    lines = [json.loads(x) for x in (folder / "_rounds/rounds.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    rows = [
        load_from_disk(str(path)).to_list()
        for t in range(3)
        for path in (folder / f"_rounds/round-{t:03d}" / p for p in ("dataset", "evaluation/pairs"))
    ]
    return lines, rows


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_pairs_log_probs_and_scores(
    tmp_path, saved_tiny_model
) -> None:
    """SP-12: SIGKILL while sampling, while scoring the opponent, while training."""
    assert run(tmp_path / "whole", saved_tiny_model) == 0
    expected = read_run(tmp_path / "whole")
    for phase, count in (("sampling", 30), ("scoring", 16), ("training", 4)):
        folder = tmp_path / phase
        assert run(folder, saved_tiny_model, phase, count) == -signal.SIGKILL
        assert run(folder, saved_tiny_model) == 0
        assert read_run(folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_two_processes_begin_every_round_at_ln_2(tmp_path, saved_tiny_model, peft) -> None:
    """SP-1, with rows, samples and log-probs shared between the processes."""
    for folder, launcher in (("one", ()), ("two", TORCHRUN)):
        code = run(tmp_path / folder, saved_tiny_model, peft=peft, launcher=launcher)
        assert code == 0
        first = json.loads((tmp_path / folder / "first.json").read_text())
        assert sorted(first) == ["0", "1", "2"]
        for logs in first.values():
            assert logs["loss"] == pytest.approx(math.log(2.0), abs=1e-5)
            assert logs["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    one, two = (
        load_from_disk(str(tmp_path / f / "_rounds/round-000/dataset")).to_list()
        for f in ("one", "two")
    )
    for mine, other in zip(one, two, strict=True):
        assert mine["rejected_ids"] == other["rejected_ids"]
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert mine[name] == pytest.approx(other[name], abs=1e-4)
