"""A run in a process of its own that keeps its rounds on a store, and may kill itself."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from peft import LoraConfig
from tiny_rewards import contains_solution
from transformers import TrainerCallback

from trl_selfplay import SPINConfig, SPINTrainer, STaRConfig, STaRTrainer
from trl_selfplay.rounds.store import RoundsStore

_SETTINGS: dict[str, Any] = {
    "num_rounds": 2, "max_completion_length": 8, "max_steps": 3, "save_steps": 1,
    "save_total_limit": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [],
    "disable_tqdm": True, "gradient_checkpointing": False, "use_cpu": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kill:
    """The end of a process: after so many events of a phase, with the next one."""

    phase: Literal["sampling", "training", "putting"]
    after: int


class Killer(TrainerCallback):
    """Counts the events of a phase, and kills this process."""

    def __init__(self, kill: Kill | None) -> None:
        self._kill, self._count = kill, 0

    def event(self, phase: str) -> None:
        if self._kill is not None and self._kill.phase == phase:
            self._count += 1
            if self._count > self._kill.after:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.event("training")


def run(
    method: str, folder: str, model: str, rows: str, rounds_dir: str | None, kill: Kill | None
) -> None:
    """Run, or go on with, two rounds in `folder`, kept in `rounds_dir`; die where `kill` says.

    The phase "putting" counts what is put on the store, file by file.
    """
    killer = Killer(kill)
    put_file = RoundsStore._put_file

    def watched_put(self: Any, name: str, path: Path) -> None:
        killer.event("putting")
        put_file(self, name, path)

    RoundsStore._put_file = watched_put  # type: ignore[method-assign]
    table = json.loads(Path(rows).read_text())
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    shared: dict[str, Any] = {"peft_config": lora, "callbacks": [killer]}
    settings = {**_SETTINGS, "rounds_dir": rounds_dir}
    if method == "SPIN":
        pairs = [{"prompt": row["prompt"], "completion": row["solution"]} for row in table["train"]]
        trainer: Any = SPINTrainer(
            model,
            args=SPINConfig(folder, **settings),
            train_dataset=Dataset.from_list(pairs),
            **shared,
        )
    else:
        trainer = STaRTrainer(
            model,
            STaRConfig(folder, num_generations=4, temperature=1.0, **settings),
            train_dataset=Dataset.from_list(table["train"]),
            eval_dataset=Dataset.from_list(table["heldout"]),
            reward_funcs=contains_solution,
            **shared,
        )
    sampler = trainer.self_play.collector.sampler
    sample = sampler.sample

    def watched_sample(*args: Any) -> Iterator[Any]:
        for finished in sample(*args):
            killer.event("sampling")
            yield finished

    sampler.sample = watched_sample
    sampler.suggest_batch_size = lambda longest_prompt, max_completion_length: 3
    trainer.train(resume_from_checkpoint=True)
