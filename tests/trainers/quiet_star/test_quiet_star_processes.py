"""Quiet-STaR in two processes, and going on after a stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "quiet_star_process.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(folder, model, peft, steps=3, launcher=()) -> tuple[list[float], dict[str, torch.Tensor]]:
    command = [sys.executable, *launcher, SCRIPT, folder, model, peft, steps]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, timeout=300)
    losses = json.loads((folder / "losses.json").read_text())
    return losses, load_file(folder / "weights.safetensors")


def assert_same_run(one, two) -> None:
    """Losses and weights to 1e-6: other batches add the same numbers in another order."""
    assert len(one[0]) == len(two[0]) > 0
    assert one[0] == pytest.approx(two[0], abs=2e-6)
    assert set(one[1]) == set(two[1])
    for name, weight in one[1].items():
        torch.testing.assert_close(two[1][name], weight, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_two_processes_equal_one(tmp_path, saved_tiny_model, peft) -> None:
    """QS-18: the same global batch, thoughts and thinking columns, so the same losses and weights."""
    alone = run(tmp_path / "one", saved_tiny_model, peft)
    together = run(tmp_path / "two", saved_tiny_model, peft, launcher=TORCHRUN)
    assert_same_run(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_a_run_that_goes_on_equals_one_that_was_not_stopped(
    tmp_path, saved_tiny_model, peft
) -> None:
    """QS-15: nothing is initialised again by a resume."""
    whole = run(tmp_path / "whole", saved_tiny_model, peft, steps=4)
    run(tmp_path / "parts", saved_tiny_model, peft, steps=2)
    parts = run(tmp_path / "parts", saved_tiny_model, peft, steps=4)
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_a_run_that_is_killed_while_a_checkpoint_is_written_ends_as_if_never_stopped(
    tmp_path, saved_tiny_model
) -> None:
    """In the midst of each file, bit for bit; the checkpoint before is gone on from."""
    script = SCRIPT.with_name("quiet_star_kills.py")
    command = [sys.executable, script, tmp_path / "runs", saved_tiny_model]
    (tmp_path / "runs").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, timeout=300)
    runs = {path.stem: load_file(path) for path in (tmp_path / "runs").glob("*.safetensors")}
    whole = runs.pop("whole")
    assert len(runs) == 5
    for name, weights in runs.items():
        assert weights.keys() == whole.keys()
        for key, weight in weights.items():
            assert torch.equal(weight, whole[key]), (name, key)
