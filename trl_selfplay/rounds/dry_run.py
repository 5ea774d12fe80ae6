"""Try one training step before hours are spent on sampling, and undo it.

In: a trainer, and rows in the form that its parent trains on. Out: nothing, or the parent's own error:
an unknown optimizer, wrong arguments of a scheduler, an unknown loss, an unsuitable collator. Weights,
gradients, random states, modes and the trainer are restored.

Failures that need the wrapped model (DDP, FSDP, DeepSpeed, compilation) or the memory of real rows
aren't covered: the step is that of the whole model.
"""

import copy
import random
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from trl_selfplay.generation.model_traits import has_whole_weights
from trl_selfplay.memory import is_out_of_memory
from trl_selfplay.rounds.gathered import whole_weights_in_place
from trl_selfplay.rounds.named_settings import naming_settings
from trl_selfplay.rounds.training import free_optimizer

# Steps of the schedule where their number isn't known before there are rows.
_USUAL_STEPS = 1000


def try_step(trainer: Any, rows: Dataset) -> float | None:
    """Collate a batch, compute loss and gradients, create optimizer and scheduler, and undo it all.

    This costs a forward and a backward over a few tokens, and temporarily the memory of gradients.

    Args:
        trainer: A `transformers.Trainer` that has not begun to train.
        rows: As the trainer's own dataset holds them; one is enough, since a batch repeats them.

    Returns:
        The seconds of forward and backward; None if an earlier training divided the model (FSDP), or if
        memory doesn't suffice for the batch and `auto_find_batch_size` is set.

    Raises:
        Exception: Whatever the parent raises, with a note that says when and names the settings.
        ValueError: In place of an error that says nothing by itself, such as a KeyError.
    """
    with _undone(trainer):
        copies = trainer.args.train_batch_size * trainer.accelerator.num_processes
        trainer.train_dataset = Dataset.from_list(rows.to_list() * copies)
        batches = iter(trainer.get_train_dataloader())
        [inputs], num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
        deque(batches, maxlen=0)  # else accelerate goes on counting the loader as the current one
        if trainer.is_fsdp_enabled and not has_whole_weights(trainer.model):
            return None
        trainer.current_gradient_accumulation_steps = 1
        _switch_checkpointing_on(trainer)
        with whole_weights_in_place(trainer), _backward_without_engine(trainer):
            started = time.monotonic()
            try:
                trainer.training_step(trainer.model, inputs, num_items)
            except RuntimeError as error:
                if trainer.args.auto_find_batch_size and is_out_of_memory(error):
                    return None  # the parent will try smaller batches
                raise
            if trainer.args.device.type == "cuda":
                torch.cuda.synchronize(trainer.args.device)
            seconds = time.monotonic() - started
            trainer.create_optimizer_and_scheduler(_num_steps(trainer.args))
    return seconds


class _PlainBackward:
    """Stands where accelerate expects DeepSpeed's engine."""

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Compute gradients as without DeepSpeed."""
        loss.backward()


@contextmanager
def _backward_without_engine(trainer: Any) -> Iterator[None]:
    """Let accelerate compute gradients before there is an engine."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    accelerator = trainer.accelerator
    accelerator.deepspeed_engine_wrapped = _PlainBackward()
    try:
        yield
    finally:
        accelerator.deepspeed_engine_wrapped = None


def _switch_checkpointing_on(trainer: Any) -> None:
    """Checkpoint activations like the parent's `train`, so that wrong arguments are found."""
    args = trainer.args
    if not args.gradient_checkpointing:
        return
    options = dict(args.gradient_checkpointing_kwargs or {})
    own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    # The name before transformers 5.23; the other one alone once 5.23 is the oldest.
    old_name = getattr(trainer.model, "gradient_checkpointing_enable", None)
    enable = getattr(trainer.model, "activation_checkpointing_enable", old_name)
    if enable is not None:
        enable(options or None, **own)


def _num_steps(args: Any) -> int:
    steps = args.plan_rounds()[0].settings.get("max_steps", args.max_steps)
    return steps if steps > 0 else _USUAL_STEPS


@contextmanager
def _undone(trainer: Any) -> Iterator[None]:
    """Restore trainer, modes and random states, even after an exception."""
    attributes = dict(vars(trainer))
    # Flags of train mode and of checkpointing are attributes of each module.
    modules = [(module, dict(vars(module))) for module in trainer.model.modules()]
    states = random.getstate(), np.random.get_state()
    trainer._metrics = copy.deepcopy(trainer._metrics)  # the loss appends to it
    try:
        # Only this process's device: the machine's other devices belong to other processes.
        device = trainer.args.device
        with (
            naming_settings(
                trainer.args,
                "This came up in a trial step on a placeholder row, before anything was sampled.",
            ),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, values in modules:
            vars(module).clear()
            vars(module).update(values)
        vars(trainer).clear()
        vars(trainer).update(attributes)
        free_optimizer(trainer)
