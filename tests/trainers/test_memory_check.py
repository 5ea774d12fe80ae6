"""What `train()` says of memory before a run, and of time after a round."""

import pytest

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
    monkeypatch.setattr(memory_check, "_free_for_all", lambda model, device: 1000)
    tell_memory(build_star())
    assert "This run may need more memory" in caplog.text
    assert "gradient_checkpointing=True" in caplog.text


def test_nothing_is_said_of_a_small_model(build_star, capsys) -> None:
    tell_memory(build_star())
    assert "memory: " not in capsys.readouterr().out


def test_the_time_of_the_remaining_rounds_is_told(build_star, capsys) -> None:
    build_star().train()
    said = [line for line in capsys.readouterr().out.splitlines() if "rounds left" in line]
    assert len(said) == 1  # not after the last
    assert "rounds left: 1" in said[0]
