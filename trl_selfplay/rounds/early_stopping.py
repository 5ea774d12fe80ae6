"""Determine why the parent's training ended before its last step, even after a kill.

In: the parent's callbacks and its state. Out: the patience of an `EarlyStoppingCallback`, counted
within one training and written into the state; whether a round or the whole run ends.

An `EarlyStoppingCallback`, or a subclass, ends the training of its round: the M-step of ReST and
ReST^EM, "while the reward on D_val improves". Any other callback that stops training ends the run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

_COUNT, _PATIENCE = "early_stopping_patience_counter", "early_stopping_patience"


def restore_patience(callbacks: Sequence[TrainerCallback], state: TrainerState | None) -> None:
    """Set how many evaluations brought no gain: as many as in a checkpoint's state, or none."""
    states = {} if state is None else _callback_states(state)
    for callback in callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            saved = states.get(type(callback).__name__, {}).get("attributes", {})
            callback.early_stopping_patience_counter = saved.get(_COUNT, 0)


def note_patience(callbacks: Sequence[TrainerCallback], state: TrainerState) -> None:
    """Write the callbacks' counts into the state, as the parent does in checkpoints alone."""
    counts = {
        type(c).__name__: c.state() for c in callbacks if isinstance(c, EarlyStoppingCallback)
    }
    state.stateful_callbacks = _callback_states(state) | counts  # type: ignore[assignment]


def stopped_early(state: TrainerState) -> bool:
    """Return whether an `EarlyStoppingCallback` ended the training that left this state."""
    return any(
        _PATIENCE in saved.get("args", {})
        and saved.get("attributes", {}).get(_COUNT, 0) >= saved["args"][_PATIENCE]
        for saved in _callback_states(state).values()
    )


def ends_run(state: TrainerState) -> bool:
    """Return whether a callback cut the training short, other than by early stopping."""
    return state.global_step < state.max_steps and not stopped_early(state)


def _callback_states(state: TrainerState) -> dict[str, Mapping[str, Any]]:
    """Return what callbacks saved of themselves, by class; of several of a class the newest."""
    states: Any = state.stateful_callbacks or {}
    return {name: s[-1] if isinstance(s, list) else s for name, s in states.items()}
