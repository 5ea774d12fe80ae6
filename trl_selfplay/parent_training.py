"""Run the parent's own training once: into a folder, resumable, with its memory freed after it.

In: rows that are final, and arguments of the parent that this training changes. Out: `model/` and
`trainer_state.json` in the folder, and the same weights in the trainer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerState, set_seed
from transformers.trainer_utils import TrainOutput

from trl_selfplay.checkpoints import last_whole_checkpoint
from trl_selfplay.early_stopping import note_patience, restore_patience, stopped_early
from trl_selfplay.memory import return_freed_memory
from trl_selfplay.weights import load_saved_model, replace_folder


def train_on(
    trainer: Any,
    train_parent: Callable[..., TrainOutput],
    rows: Dataset | None,
    settings: Mapping[str, Any],
    seed: int,
) -> TrainOutput | None:
    """Train on rows (None: not at all) and keep model and state; load them if they are there."""
    folder = Path(settings["output_dir"])
    model_folder, state_path = folder / "model", folder / "trainer_state.json"
    if model_folder.exists():
        load_saved_model(trainer.model, model_folder)
        trainer.state = _load_state(trainer, state_path)
        return None
    trainer.accelerator.wait_for_everyone()  # all have looked before one writes
    folder.mkdir(parents=True, exist_ok=True)
    free_optimizer(trainer)
    # Dropout must not depend on what happened in this process before: a resumed round starts alike.
    set_seed(seed)
    output = None
    with _changed_settings(trainer.args, settings):
        checkpoint = last_whole_checkpoint(folder, trainer.accelerator)
        if rows is None:
            trainer.state = _load_state(trainer, None)
        elif checkpoint is None or not _load_if_last(trainer, Path(checkpoint)):
            trainer.train_dataset = rows
            callbacks = trainer.callback_handler.callbacks
            saved = None if checkpoint is None else _load_state(trainer, _state_in(checkpoint))
            restore_patience(callbacks, saved)
            output = train_parent(resume_from_checkpoint=checkpoint)
            note_patience(callbacks, trainer.state)
        free_optimizer(trainer)
        temporary = folder / ".model"
        trainer.save_model(str(temporary))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(state_path))
        replace_folder(temporary, model_folder)
    trainer.accelerator.wait_for_everyone()
    return output


def _load_if_last(trainer: Any, checkpoint: Path) -> bool:
    """Put in place what the parent would have ended with, if no step is left after a checkpoint.

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
    """Return a state as it was saved (None: a new one), and as this process's own."""
    state = TrainerState() if path is None else TrainerState.load_from_json(str(path))
    state.is_world_process_zero = trainer.is_world_process_zero()
    state.is_local_process_zero = trainer.is_local_process_zero()
    return state


@contextmanager
def _changed_settings(args: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Give the parent other arguments while it trains; nothing is pushed from a round's folder."""
    changed = {**settings, "push_to_hub": False}
    previous = {name: getattr(args, name) for name in changed}
    try:
        for name, value in changed.items():
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
    trainer.model.zero_grad(set_to_none=True)
    return_freed_memory()
