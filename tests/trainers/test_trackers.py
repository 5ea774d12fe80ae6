"""Experiment trackers over the rounds of a run: one run of each, with steps that go on, also on resume."""

import json
import os
import sqlite3
from pathlib import Path

import pytest
from transformers import TrainerCallback

pytest.importorskip("trackio")
pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trl_selfplay.rounds.trackers import TrackerRun


class StopBefore(TrainerCallback):
    """Interrupts the run as a round begins, as Ctrl-C does."""

    def __init__(self, round_index):
        self.round_index = round_index

    def on_round_begin(self, args, state, control, round_index, **kwargs):
        if round_index == self.round_index:
            raise KeyboardInterrupt


def read_trackio(project):
    """Return (run name, metrics) of every line that Trackio keeps of a project."""
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / f"{project}.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
    return [(name, json.loads(metrics)) for name, metrics in rows]


def test_an_interrupted_run_is_one_run_in_trackio_and_tensorboard(
    build_star, sums, tmp_path, recorder
) -> None:
    project = f"p{tmp_path.name}"

    def run(num_rounds, resume, **changes):
        trainer = build_star(
            num_rounds=num_rounds, report_to=["tensorboard", "trackio"], project=project,
            eval_dataset=sums(4, first=40), log_completions=True, num_completions_to_print=0,
            **changes,
        )  # fmt: skip
        before = list(trainer.callback_handler.callbacks)
        try:
            trainer.train(resume_from_checkpoint=resume)
        finally:
            assert trainer.callback_handler.callbacks == before
        return trainer

    with pytest.raises(KeyboardInterrupt):
        run(2, None, callbacks=[StopBefore(1)])
    trainer = run(3, True, callbacks=[recorder])
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6, 7, 8, 9]

    lines = read_trackio(project)
    assert {name for name, _ in lines} == {trainer.args.run_name}
    assert trainer.args.run_name.startswith("run-")
    steps = [(m["train/global_step"], m["train/loss"]) for _, m in lines if "train/loss" in m]
    assert steps == [(line["step"], line["loss"]) for line in logged]
    scored = [m["train/global_step"] for _, m in lines if "eval/accuracy" in m]
    assert scored == [0, 3, 6, 9]  # before training, and after each round
    tables = [m["completions"]["_value"] for _, m in lines if "completions" in m]
    assert [rows[0]["step"] for rows in tables] == [0, 3, 6]
    for round_index, rows in enumerate(tables):
        folder = trainer.run.folder(round_index)
        assert len(rows) == trainer.run.lines[round_index]["metrics"]["play/completions"]
        assert {row["outcome"] for row in rows} > {"kept"}
        assert all(row["contains_solution"] == row["reward"] for row in rows)
        assert folder.exists()

    run(3, True)  # finished: nothing is logged
    assert len(read_trackio(project)) == len(lines)
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    assert not list(tmp_path.glob("run/_rounds/**/events*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [e.step for e in events.Scalars("eval/accuracy")] == [0, 3, 6, 9]


def test_two_runs_in_folders_of_the_same_name_have_two_names(build_star, tmp_path) -> None:
    names = []
    for folder in ("a/run", "b/run"):
        trainer = build_star(folder, report_to=["tensorboard"])
        trackers = TrackerRun(trainer)
        trackers.begin()
        trackers.end()
        trackers.release()
        names.append(trainer.args.run_name)
    assert len(set(names)) == 2
    assert all(name.startswith("run-") for name in names)


@pytest.mark.slow
def test_an_interrupted_run_is_one_run_in_mlflow_and_wandb(
    build_star, tmp_path, monkeypatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for num_rounds, resume in ((1, None), (3, True)):
        trainer = build_star(num_rounds=num_rounds, report_to=["mlflow", "wandb"])
        trainer.train(resume_from_checkpoint=resume)
        wandb.finish()
    mlflow.flush_async_logging()
    (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    client = mlflow.MlflowClient()
    losses = client.get_metric_history(found.info.run_id, "loss")
    assert [point.step for point in losses] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    ids = {folder.name.split("-")[-1] for folder in tmp_path.glob("wandb/offline-run-*")}
    assert ids == {trainer.args.run_name.split("-")[-1]}
