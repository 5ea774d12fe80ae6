"""What a run reports as it goes: the plan of each round, events, log lines.

In: a trainer over rounds. Out: log lines whose steps continue over rounds, calls of the callbacks'
`on_round_begin` and `on_round_end`.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_selfplay.disk import RESUME
from trl_selfplay.evaluation.progress import say
from trl_selfplay.rounds.run import RoundProgress, Run
from trl_selfplay.rounds.watch import Watch
from trl_selfplay.termination import Terminated

logger = logging.getLogger(__name__)

_KEPT = "Finished rounds, complete shards of samples and complete checkpoints are kept."


def log_with_round(
    trainer: Any, log_parent: Callable[..., None], logs: dict[str, float], start_time: float | None
) -> None:
    """Log with the round, and with steps that continue over rounds.

    The parent and its trackers see a copy of the state with those steps. What they change in it
    is the state's own.
    """
    progress: RoundProgress | None = trainer.progress
    if progress is None or progress.round_index is None:
        log_parent(logs, start_time)
        return
    logs["round"] = progress.round_index
    state = trainer.state
    trainer.state = shifted = copy.copy(state)
    shifted.global_step += progress.steps_before
    try:
        log_parent(logs, start_time)
    finally:
        vars(state).update({**vars(shifted), "global_step": state.global_step})
        trainer.state = state


def load_log_history(run: Run, num_finished: int) -> list[dict[str, Any]]:
    """Return what the finished rounds logged, the warm-up first, from their states on disk."""
    if not num_finished:
        return []  # the warm-up, if there is one, is logged again
    folders = [run.warm_up_folder, *map(run.folder, range(num_finished))]
    history: list[dict[str, Any]] = []
    for path in (folder / "trainer_state.json" for folder in folders):
        try:
            history += TrainerState.load_from_json(str(path)).log_history
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s can't be read (%s); log_history lacks its lines.", path, error)
    return history


def call_round_event(trainer: Any, event: str, progress: RoundProgress) -> bool:
    """Call the callbacks that handle the event; return whether one asked to stop the run.

    They get the control and may return it, as for the parent's events.
    """
    trainer.control.should_training_stop = False  # the parent sets it at the end of every training
    for callback in trainer.callback_handler.callbacks:
        if handler := getattr(callback, event, None):
            control = handler(
                trainer.args,
                trainer.state,
                trainer.control,
                model=trainer.model,
                processing_class=trainer.processing_class,
                round_index=progress.round_index,
                lines=progress.lines,
            )
            trainer.control = control if control is not None else trainer.control
    return trainer.control.should_training_stop


@contextmanager
def say_where_interrupted(place: Callable[[], str]) -> Iterator[None]:
    """Say, when the run is interrupted or fails, where, what is kept and how to go on.

    An interruption is logged, and an error gets a note, unless it says itself how to go on.

    Args:
        place: Returns where the run is, such as "in round 0".
    """
    try:
        yield
    # Terminated as well; an exit with code 0 would look like the end of the run.
    except (KeyboardInterrupt, SystemExit) as stop:
        by = " by SIGTERM" if isinstance(stop, Terminated) else ""
        logger.warning(
            "interrupted%s %s; %s, on the same output_dir. %s", by, place(), RESUME, _KEPT
        )
        raise
    except Exception as error:
        if RESUME not in str(error):
            error.add_note(
                f"The run stopped {place()}. {_KEPT} Once the cause is mended, {RESUME}."
            )
        raise


def place_of(progress: RoundProgress) -> str:
    """Return where a run is, in words that follow "it stopped"."""
    if len(progress.lines) == len(progress.plans):
        return "after the last round"
    if progress.round_index is None:
        return f"before round {len(progress.lines)}"
    return f"in round {progress.round_index}"


class RoundCallback(TrainerCallback):
    """Reports a round's plan, and logs what has waited, once the parent's training has begun."""

    def __init__(self, trainer: Any, progress: RoundProgress, watch: Watch) -> None:
        self.trainer = trainer
        self.progress = progress
        self.watch = watch

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the plan, warn of a round shorter than its warm-up, and log what has waited."""
        progress = self.progress
        round_index = progress.round_index
        if round_index is None:
            return
        start = "base" if args.start_from == "base" else progress.weights_before(round_index)
        if state.is_world_process_zero:
            plan = progress.plans[round_index]
            sampled_from = progress.weights_before(plan.sampling_round)
            source = sampled_from if round_index == 0 else f"{sampled_from}'s model"
            say(
                f"round {round_index}: sample from {source}, train from {start}, "
                f"{progress.num_examples} examples, {state.max_steps} steps"
            )
        self.watch.see_steps(state.max_steps, args.get_warmup_steps(state.max_steps))
        for logs in progress.pending_logs:
            self.trainer.log(logs)
        progress.pending_logs.clear()
