"""One run of each experiment tracker over all rounds of a run, also when it is resumed.

In: the callbacks that `report_to` gave the trainer. Out: trackers that begin once and end once, although every
round's training begins and ends; and each round's completions as a table where GRPOTrainer logs one.

By themselves these callbacks end their run with the first round's training: MLflow then opens another one for
each round, and Trackio publishes a snapshot of its Space after each.
"""

import copy
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
)

from trl_selfplay.disk import naming_damage, save_text
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.stored import read_selection
from trl_selfplay.rounds.run import Run

# Rows of a round's table. Trackers keep and draw whole tables; all samples are on disk.
MOST_ROWS = 1000


class TrackerRun:
    """The trackers of one call of `train`.

    Between `begin` and `release` they take every event of the trainer's but those that would begin and end
    their runs.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        self._has_begun = False
        callbacks: list[Any] = trainer.callback_handler.callbacks
        self._trackers: list[Any] = [c for c in callbacks if isinstance(c, kinds)]

    def begin(self) -> None:
        """Begin each tracker's run, or go on with the one that this run has begun before."""
        trainer, handler = self._trainer, self._trainer.callback_handler
        if not self._trackers:
            return
        record = Record.of(trainer.run, trainer.is_world_process_zero())
        name = f"{Path(trainer.args.output_dir).name}-{record.token}"
        if trainer.args.run_name is None:  # also for what is logged after `train`
            trainer.args.run_name = name
        args = copy.copy(trainer.args)  # rounds change `output_dir`
        for tracker in self._trackers:
            if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
                tracker.logging_dir = str(Path(args.output_dir) / "runs" / name)
            with record.continues(tracker):
                tracker.on_train_begin(
                    args,
                    trainer.state,
                    trainer.control,
                    model=trainer.model,
                    processing_class=trainer.processing_class,
                )
        handler.callbacks = [_Kept(c) if c in self._trackers else c for c in handler.callbacks]
        self._has_begun = True

    def end(self) -> None:
        """End each tracker's run, if it has begun."""
        trainer = self._trainer
        for tracker in self._trackers if self._has_begun else ():
            tracker.on_train_end(
                trainer.args,
                trainer.state,
                trainer.control,
                model=trainer.model,
                processing_class=trainer.processing_class,
            )

    def release(self) -> None:
        """Give the trainer its callbacks back."""
        handler = self._trainer.callback_handler
        handler.callbacks = [c.tracker if isinstance(c, _Kept) else c for c in handler.callbacks]


class _Kept:
    """A tracker that hears neither the begin nor the end of a training."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def __getattr__(self, event: str) -> Any:
        return getattr(self.tracker, event)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the tracker's run open."""

    on_train_end = on_train_begin


class Record:
    """Which runs the trackers have begun for a run on disk.

    Its token tells this run from others of the same name; a run keeps it when it is resumed.
    """

    def __init__(self, path: Path, values: Mapping[str, str]) -> None:
        self._path = path
        self._values = dict(values)

    @classmethod
    def of(cls, run: Run, is_main: bool) -> "Record":
        """Return the record of a run on disk; the main process begins it."""
        path = run.root / "trackers.json"
        values: dict[str, str] = {}
        if path.exists():
            with naming_damage(path, "Delete it: the trackers then begin another run."):
                values = dict(json.loads(path.read_text()))
        if "token" not in values:
            values["token"] = secrets.token_hex(4)
            if is_main:
                save_text(path, json.dumps(values))
        return cls(path, values)

    @property
    def token(self) -> str:
        """Eight hex digits."""
        return self._values["token"]

    @contextmanager
    def continues(self, tracker: Any) -> Iterator[None]:
        """Name, to trackers that read it from the environment, the run to go on with."""
        names: dict[str, str] = {}
        if isinstance(tracker, WandbCallback):
            names = {"WANDB_RUN_ID": self.token, "WANDB_RESUME": "allow"}
        elif isinstance(tracker, MLflowCallback) and "mlflow_run_id" in self._values:
            names = {"MLFLOW_RUN_ID": self._values["mlflow_run_id"]}
        if any(name in os.environ for name in names):
            names = {}  # the user's own choice
        os.environ.update(names)
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name, None)
        if isinstance(tracker, MLflowCallback):
            self._note_mlflow()

    def _note_mlflow(self) -> None:
        import mlflow

        active = mlflow.active_run()
        if active is not None and self._values.get("mlflow_run_id") != active.info.run_id:
            self._values["mlflow_run_id"] = active.info.run_id
            save_text(self._path, json.dumps(self._values))


def log_table(trainer: Any, folder: Path, played: PlayedRound, step: int) -> None:
    """Log a round's first completions, by prompt id, to the trackers to which GRPOTrainer logs them.

    Args:
        trainer: Its config says whether (`log_completions`) and which (`log_unique_prompts`).
        folder: The round's, with its selection.
        played: The round.
        step: Optimizer steps before it.
    """
    args = trainer.args
    if not args.log_completions or not trainer.is_world_process_zero():
        return
    backends: list[Any] = []
    if "wandb" in args.report_to:
        import wandb

        backends += [wandb] if wandb.run is not None else []
    if "trackio" in args.report_to:
        import trackio

        backends.append(trackio)
    if not backends:
        return
    scorer = trainer.self_play.collector.scorer
    names = () if scorer is None else scorer.names
    columns, rows = build_table(folder, played, step, names, args.log_unique_prompts)
    for backend in backends:
        table = backend.Table(columns=columns, data=rows)
        backend.log({"completions": table, "train/global_step": step})


def build_table(
    folder: Path,
    played: PlayedRound,
    step: int,
    reward_names: Sequence[str],
    unique_prompts: bool,
) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of a round's table: at most `MOST_ROWS` completions."""
    columns = ["step", "prompt", "completion", *reward_names, "reward", "hinted", "outcome"]
    rows: list[list[Any]] = []
    shown: set[str] = set()
    outcomes = read_selection(folder / "selection.parquet")
    for rollout, (_, _, outcome) in zip(played.rollouts, outcomes, strict=True):
        if unique_prompts and rollout.prompt_id in shown:
            continue
        shown.add(rollout.prompt_id)
        rewards = rollout.rewards or [None] * len(reward_names)
        texts = [step, rollout.prompt, rollout.completion]
        rows.append([*texts, *rewards, rollout.reward, rollout.hinted, outcome])
        if len(rows) == MOST_ROWS:
            break
    return columns, rows
