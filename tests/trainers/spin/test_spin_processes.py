"""SPIN under SIGKILL and in two processes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import spin_process
from datasets import load_from_disk
from processes import call, call_twice

SCRIPT = Path(spin_process.__file__)


def run(folder, model, phase="none", count=0, peft="lora") -> int:
    return call(spin_process.main, str(folder), str(model), phase, str(count), peft)


def run_in_new_interpreter(folder, model, peft) -> int:
    """With another seed of hashes than the run before, whatever order sets have."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    command = [sys.executable, SCRIPT, folder, model, "none", "0", peft]
    done = subprocess.run(list(map(str, command)), env=environment, check=False, timeout=1200)
    return done.returncode


def read_run(folder):
    """What must be equal: lines without seconds, pairs with log-probs, the losses of all steps."""
    lines = [json.loads(x) for x in (folder / "_rounds/rounds.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    rounds = [folder / f"_rounds/round-{t:03d}" for t in range(3)]
    rows = [
        load_from_disk(str(path)).to_list()
        for one in rounds
        for path in (one / "dataset", one / "evaluation/pairs")
    ]
    logs = [json.loads((one / "trainer_state.json").read_text())["log_history"] for one in rounds]
    losses = [[(log["step"], log["loss"]) for log in one if "loss" in log] for one in logs]
    assert [len(one) for one in losses] == [3, 3, 3]
    return lines, rows, losses


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_a_killed_run_resumes_to_the_same_pairs_log_probs_and_losses(
    tmp_path, saved_tiny_model, peft
) -> None:
    """SP-12: SIGKILL while sampling, scoring the opponent, training, measuring, and at any time."""
    assert run(tmp_path / "whole", saved_tiny_model, peft=peft) == 0
    expected = read_run(tmp_path / "whole")
    late = random.Random(peft).uniform(0.5, 3.0)  # of the seconds after construction
    moments = [("sampling", 30), ("scoring", 16), ("training", 4), ("measuring", 4), ("any", late)]
    for phase, count in moments:
        folder = tmp_path / phase
        code = run(folder, saved_tiny_model, phase, count, peft)
        assert code == -signal.SIGKILL or (phase == "any" and code == 0)
        if (phase, peft) == ("training", "lora"):
            assert run_in_new_interpreter(folder, saved_tiny_model, peft) == 0
        else:
            assert run(folder, saved_tiny_model, peft=peft) == 0
        assert read_run(folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["lora", "full", "user", "nf4"])
def test_two_processes_begin_every_round_at_ln_2(tmp_path, saved_tiny_model, peft) -> None:
    """SP-1 under gradient accumulation, with rows, samples and log-probs shared between them."""
    for folder in ("one", "two"):
        arguments = (str(tmp_path / folder), str(saved_tiny_model), "none", "0", peft)
        if folder == "one":
            assert call(spin_process.main, *arguments) == 0
        else:
            assert call_twice(spin_process.main, *arguments) == [0, 0]
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
