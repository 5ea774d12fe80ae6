"""What `train()` says of memory before a run, and of time after a round."""

from typing import Any

import pytest
import torch

from trl_selfplay.rewards.grading_model import GradingModel
from trl_selfplay.rounds import memory_check
from trl_selfplay.rounds.memory_check import tell_memory


@pytest.fixture
def counts_small_models(monkeypatch) -> None:
    monkeypatch.setattr(memory_check, "_LEAST_WEIGHTS", 0)


def test_a_run_that_fits_says_what_it_takes(
    build_star, counts_small_models, capsys, caplog
) -> None:
    tell_memory(build_star())
    assert "memory: " in capsys.readouterr().out
    assert "may need more memory" not in caplog.text


def test_a_run_that_does_not_fit_is_warned_of(
    build_star, counts_small_models, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(memory_check, "_free_for_all", lambda model, device: 10**7)
    tell_memory(build_star())
    assert "This run may need more memory" in caplog.text
    assert "gradient_checkpointing=True" in caplog.text


def test_models_that_grade_on_the_same_gpu_are_counted(
    build_star, counts_small_models, monkeypatch
) -> None:
    here, elsewhere = (torch.nn.Linear(64, 1) for _ in range(2))
    trainer = build_star(
        reward_funcs=[on_device(here, "cuda"), on_device(elsewhere, "cuda:1")],
        reward_threshold=2.0,
    )
    gpu = property(lambda self: torch.device("cuda:0"))
    monkeypatch.setattr(type(trainer.accelerator), "device", gpu)
    monkeypatch.setattr(memory_check, "_free_for_all", lambda model, device: 10**9)
    found = []
    real = memory_check.estimate
    monkeypatch.setattr(
        memory_check, "estimate", lambda *a, **k: found.append(real(*a, **k)) or found[-1]
    )
    tell_memory(trainer)
    own = sum(p.nbytes for p in here.parameters())
    assert found[0].phase("sampling").parts["grading models"] == own


def on_device(model: torch.nn.Module, device: str) -> Any:
    def grade(completions, **columns) -> list[float]:
        return [1.0] * len(completions)

    grade.grading_model = GradingModel(model, device)
    return grade


def test_nothing_is_said_of_a_small_model(build_star, capsys) -> None:
    tell_memory(build_star())
    assert "memory: " not in capsys.readouterr().out


def test_the_time_of_the_remaining_rounds_is_told(build_star, capsys) -> None:
    build_star().train()
    said = [line for line in capsys.readouterr().out.splitlines() if "rounds left" in line]
    assert len(said) == 1  # not after the last
    assert "rounds left: 1" in said[0]
