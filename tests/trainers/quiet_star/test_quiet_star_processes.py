"""Quiet-STaR in two processes, and going on after a stop."""

import json

import pytest
import quiet_star_process
import torch
from processes import call, call_twice
from safetensors.torch import load_file


def run(folder, model, peft, steps=3, start=call) -> tuple[list[float], dict[str, torch.Tensor]]:
    codes = start(quiet_star_process.main, str(folder), str(model), peft, str(steps))
    assert codes in (0, [0, 0])
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
    together = run(tmp_path / "two", saved_tiny_model, peft, start=call_twice)
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
