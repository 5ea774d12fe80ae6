"""What is read from a run's folder, and what is said of it where it was damaged."""

import json
import logging

import pytest
from datasets import Dataset

from trl_selfplay.disk import DamagedFileError
from trl_selfplay.rounds.run import (
    UNTRAINED,
    RoundProgress,
    Run,
    find_best_round,
    has_stalled,
    load_lines,
)

LINES = [{"round": i, "steps": 3, "eval": {}} for i in range(3)]


def write(path, texts):
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def test_a_last_line_cut_short_is_finished_again(tmp_path, caplog) -> None:
    path = write(tmp_path / "rounds.jsonl", [json.dumps(line).encode() for line in LINES])
    assert load_lines(path) == LINES
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        assert load_lines(path) == LINES[:2]
    assert "finished again" in caplog.text
    assert load_lines(tmp_path / "none") == []


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b"[1]", b"3", b'{"round": 2}', b""])
def test_a_damaged_line_before_the_last_is_named(tmp_path, damage) -> None:
    texts = [json.dumps(line).encode() for line in LINES]
    path = write(tmp_path / "rounds.jsonl", [texts[0], damage, texts[2]])
    with pytest.raises(DamagedFileError, match=r"line 2 of .*rounds\.jsonl .* delete this line"):
        load_lines(path)


def build_run(tmp_path, **changes):
    settings = {
        "chosen_metric": "eval_accuracy", "loads_best_round": True, "keeps_initial_weights": False,
        "keeps_every_model": False,
    }  # fmt: skip
    return Run(tmp_path / "_rounds", **{**settings, **changes})


def test_the_best_round_is_chosen_by_the_settled_metric(tmp_path) -> None:
    lines = [
        {**LINES[i], "eval": {"eval_accuracy": accuracy, "eval_other": -accuracy}}
        for i, accuracy in enumerate((0.2, 0.6, 0.4))
    ]
    assert find_best_round(build_run(tmp_path), lines) == 1
    lines[0]["eval_before"] = {"eval_accuracy": 0.9}
    assert find_best_round(build_run(tmp_path), lines) == UNTRAINED
    assert find_best_round(build_run(tmp_path, greater_is_better=False), lines) == 0
    assert find_best_round(build_run(tmp_path, chosen_metric="eval_other"), lines) == 0
    assert find_best_round(build_run(tmp_path, chosen_metric=None), lines) == 2
    assert has_stalled(build_run(tmp_path), lines, patience=3)
    assert not has_stalled(build_run(tmp_path), lines, patience=4)
    assert not has_stalled(build_run(tmp_path), lines, patience=None)


def test_a_round_begins_after_the_steps_of_those_before_it() -> None:
    progress = RoundProgress((), lines=LINES[:2])
    progress.begin(2)
    assert (progress.round_index, progress.steps_before) == (2, 6)
    progress.lines = LINES
    assert (progress.steps_before, progress.total_steps) == (6, 9)
    assert [progress.weights_before(i) for i in (0, 1)] == ["base", "round 0"]
    warmed = RoundProgress((), warm_up_rows=Dataset.from_list([{"input_ids": [1]}]))
    assert [warmed.weights_before(i) for i in (0, 1)] == ["warm-up", "round 0"]
