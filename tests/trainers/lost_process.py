"""A run of `graded_process`, of which one process is slow, is killed or raises an error."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import graded_process
import torch
from transformers import TrainerCallback

from trl_selfplay import peers

COLLECTIVE_S = 20  # for which the processes of a busy machine may be apart


class KillsAfterAStep(TrainerCallback):
    """Ends the process by SIGKILL when it has trained for a step."""

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def add_fault(fault: str, trainer: Any) -> None:
    sampler = trainer.self_play.collector.sampler
    sample, calls = sampler.sample, []
    # Which of several processes takes a second shard is open.
    last = 1 if trainer.accelerator.num_processes > 1 else 4
    begun = has_begun(trainer)

    def sample_with_fault(*arguments: Any) -> Iterator[Any]:
        calls.append(arguments)
        begun.touch()
        for number, sampled in enumerate(sample(*arguments)):
            if fault == "slow" and len(calls) == last and number == 0:
                Event().wait(COLLECTIVE_S + 5.0)
            if fault == "killed while sampling" and len(calls) == last and number == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "out of memory" and len(calls) == last and number == 0:
                raise torch.OutOfMemoryError("tried to allocate 3 GiB")
            yield sampled

    sampler.sample = sample_with_fault
    if fault == "killed while training":
        trainer.add_callback(KillsAfterAStep())


def let_the_other_begin(trainer: Any) -> None:
    """Sample once the other process does, which would otherwise find all shards taken."""
    sampler = trainer.self_play.collector.sampler
    sample, begun = sampler.sample, has_begun(trainer)

    def sample_later(*arguments: Any) -> Iterator[Any]:
        while not begun.exists():
            Event().wait(0.01)
        yield from sample(*arguments)

    sampler.sample = sample_later


def has_begun(trainer: Any) -> Path:
    """Return the file that is there once the faulty process samples."""
    folder = Path(trainer.args.output_dir)
    return folder.with_name(f"{folder.name}-has-begun")


def main(fault: str, rank: str, model: str, folder: str, changes: str) -> None:
    """Run STaR with a fault in the process of a rank."""
    # Read here, since the module may have been imported before the ranks were known.
    is_faulty = os.environ.get("RANK", "0") == rank
    prepare: Callable[[Any], None] | None = partial(add_fault, fault) if is_faulty else None
    if fault != "none" and not is_faulty:
        prepare = let_the_other_begin
    peers._NEWS_S = 120.0  # however late a busy machine lets the thread run that hears of an end
    graded_process.main("STaR", model, folder, changes, prepare)
