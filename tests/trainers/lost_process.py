"""A run of `graded_process`, of which one process is slow, is killed or raises an error."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from threading import Event
from typing import Any

import graded_process
import torch
from transformers import TrainerCallback


class KillsAfterAStep(TrainerCallback):
    """Ends the process by SIGKILL when it has trained for a step."""

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def add_fault(fault: str, trainer: Any) -> None:
    sampler = trainer.self_play.collector.sampler
    sample, calls = sampler.sample, []
    # Which of several processes takes a second shard is open.
    last = 1 if trainer.accelerator.num_processes > 1 else 4

    def sample_with_fault(*arguments: Any) -> Iterator[Any]:
        calls.append(arguments)
        for number, sampled in enumerate(sample(*arguments)):
            if fault == "slow" and len(calls) == last and number == 0:
                Event().wait(7.0)  # longer than any collective may take
            if fault == "killed while sampling" and len(calls) == last and number == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "out of memory" and len(calls) == last and number == 0:
                raise torch.OutOfMemoryError("tried to allocate 3 GiB")
            yield sampled

    sampler.sample = sample_with_fault
    if fault == "killed while training":
        trainer.add_callback(KillsAfterAStep())


def main(fault: str, rank: str, model: str, folder: str, changes: str) -> None:
    """Run STaR with a fault in the process of a rank."""
    # Read here, since the module may have been imported before the ranks were known.
    is_faulty = os.environ.get("RANK", "0") == rank
    prepare = partial(add_fault, fault) if is_faulty else None
    graded_process.main("STaR", model, folder, changes, prepare)
