"""Run the parent's training once: into a folder, resumable, with its memory freed afterwards.

In: final rows, and the parent's arguments that this training changes. Out: `model/` and
`trainer_state.json` in the folder, and the same weights in the trainer.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput

from trl_selfplay.disk import (
    BRING_BACK,
    RESUME,
    DamagedFileError,
    naming_damage,
    replace_folder,
    save_checksums,
    save_file_with,
)
from trl_selfplay.memory import is_out_of_memory, return_freed_memory
from trl_selfplay.peers import wait_for_all
from trl_selfplay.rounds.checkpoints import last_whole_checkpoint, pass_over_checkpoints
from trl_selfplay.rounds.early_stopping import note_patience, restore_patience, stopped_early
from trl_selfplay.rounds.weights import (
    adapters_keep_dtypes,
    load_saved_model,
    nonfinite_weights,
)

logger = logging.getLogger(__name__)


def train_on(
    trainer: Any,
    train_parent: Callable[..., TrainOutput],
    rows: Dataset | None,
    folder: Path,
    seed: int,
) -> TrainOutput | None:
    """Train on rows (None: not at all), from the folder's last whole checkpoint.

    Model and state are saved in the folder; nothing is pushed from it.

    Raises:
        FloatingPointError: The weights are no longer finite. No model is kept.
    """
    wait_for_all(trainer.accelerator)  # all have looked before one writes
    folder.mkdir(parents=True, exist_ok=True)
    free_optimizer(trainer)
    trainer.self_play.collector.sampler.release()
    trainer.self_play.collector.park_models()
    # Dropout must not depend on what happened in this process before: a resumed round starts alike.
    set_seed(seed)
    output = None
    settings = {"output_dir": str(folder), "push_to_hub": False}
    with changed_settings(trainer.args, settings), saying_what_saves_memory():
        checkpoint = last_whole_checkpoint(folder, trainer.accelerator)
        if rows is None:
            trainer.state = _load_state(trainer, None)
        elif checkpoint is None or not _load_if_last(trainer, Path(checkpoint)):
            _refuse_less_than_a_batch(trainer, rows)
            trainer.train_dataset = rows
            callbacks = trainer.callback_handler.callbacks
            saved = None if checkpoint is None else _load_state(trainer, _state_in(checkpoint))
            restore_patience(callbacks, saved)
            with adapters_keep_dtypes(trainer.model):
                output = train_parent(resume_from_checkpoint=checkpoint)
            note_patience(callbacks, trainer.state)
            _check_finite(trainer, folder)
        free_optimizer(trainer)
        temporary = folder / ".model"
        trainer.save_model(str(temporary))
        if trainer.is_world_process_zero():
            save_state(trainer.state, folder)
            save_checksums(temporary)
            replace_folder(temporary, folder / "model")
    wait_for_all(trainer.accelerator)
    return output


@contextmanager
def saying_what_saves_memory() -> Iterator[None]:
    """Say, when training runs out of memory, which settings need less."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            error.add_note(
                "Training is out of memory. Lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps as much, which trains alike; or set "
                "gradient_checkpointing=True, or a lower max_length."
            )
        raise


class SameOrderOnResume(TrainerCallback):
    """Seeds the order that `train_sampling_strategy="group_by_length"` draws in each epoch.

    The parent draws it from the global generator, whose state at the start of a later epoch a resumed
    run doesn't know: some rows would be trained on twice, others never.
    """

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Seed the generator with the seed and the epoch."""
        if args.train_sampling_strategy == "group_by_length":
            torch.manual_seed(args.seed + int(state.epoch or 0))


def save_state(state: TrainerState, folder: Path) -> None:
    """Save the state that a training into `folder` ended with."""
    save_file_with(folder / "trainer_state.json", lambda path: state.save_to_json(str(path)))


def load_outcome(trainer: Any, folder: Path) -> bool:
    """Restore what a training into `folder` ended with; return whether there is such a result."""
    if not (folder / "model").exists():
        return False
    try:
        state = _load_state(trainer, folder / "trainer_state.json")
        load_saved_model(trainer.model, folder / "model")  # last: nothing is changed by a failure
    except DamagedFileError as error:
        logger.warning("%s", str(error).removesuffix(BRING_BACK) + "That training is done again.")
        return False
    trainer.state = state
    return True


def _check_finite(trainer: Any, folder: Path) -> None:
    """Raise FloatingPointError for weights that training made infinite or NaN."""
    broken = nonfinite_weights(trainer.model)
    if not broken:
        return
    if trainer.is_world_process_zero():
        pass_over_checkpoints(folder)
    raise FloatingPointError(
        f"training in {folder} diverged: {len(broken)} trained weights hold NaN "
        f"or infinity, {broken[0]} among them. No model was saved; samples and scores are kept. "
        "Lower the learning rate (learning_rate in round 0, later this round's value in "
        f"round_learning_rates), or set bf16=True instead of fp16, and {RESUME}."
    )


def _refuse_less_than_a_batch(trainer: Any, rows: Dataset) -> None:
    """Raise ValueError for so few rows that the parent would drop all of them."""
    args = trainer.args
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(rows) < batch:
        raise ValueError(
            f"this round has {len(rows)} rows to train on, fewer than one batch of {batch}, which "
            "dataloader_drop_last=True drops. What was sampled is kept: set "
            f"dataloader_drop_last=False or a smaller per_device_train_batch_size, and {RESUME}."
        )


def _load_if_last(trainer: Any, checkpoint: Path) -> bool:
    """Restore what the parent would have ended with, if no step is left after a checkpoint.

    The parent, resumed there amid an epoch or after early stopping, would take one more step.
    """
    state = _load_state(trainer, _state_in(checkpoint))
    max_steps = trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps
    if state.global_step < max_steps and not stopped_early(state):
        return False
    state.max_steps = max_steps  # steps of a round that hasn't ended may have changed
    trainer.state = state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        best = checkpoint.with_name(Path(state.best_model_checkpoint).name)
        checkpoint = best if best.is_dir() else checkpoint
    load_saved_model(trainer.model, checkpoint)
    return True


def _state_in(checkpoint: str | Path) -> Path:
    return Path(checkpoint) / "trainer_state.json"


def _load_state(trainer: Any, path: Path | None) -> TrainerState:
    """Return a saved state (None: a new one) as this process's own."""
    state = TrainerState()
    if path is not None:
        with naming_damage(path, BRING_BACK):
            state = TrainerState.load_from_json(str(path))
    state.is_world_process_zero = trainer.is_world_process_zero()
    state.is_local_process_zero = trainer.is_local_process_zero()
    return state


@contextmanager
def changed_settings(args: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Set arguments of the trainer to other values within this context."""
    previous = {name: getattr(args, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in previous.items():
            setattr(args, name, value)


def free_optimizer(trainer: Any) -> None:
    """Drop every reference to optimizer and scheduler, so that their memory is free.

    `accelerator.free_memory` alone leaves those that the callback handler holds.
    """
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    trainer.accelerator.free_memory()
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed, trainer.model_wrapped = None, trainer.model  # the engine is gone
    trainer.model.zero_grad(set_to_none=True)
    return_freed_memory()
