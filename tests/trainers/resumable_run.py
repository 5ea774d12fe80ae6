"""A STaR, ReST or IRPO run in a process of its own, which may kill itself with SIGKILL at a chosen moment."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_selfplay import (
    IRPOConfig,
    IRPOTrainer,
    ReSTEMConfig,
    ReSTEMTrainer,
    STaRConfig,
    STaRTrainer,
)
from trl_selfplay.rewards import JudgeReward


@dataclass(frozen=True)
class Kill:
    """When to die: at the n-th event of a phase, or after so many seconds (phase "any")."""

    phase: str
    after: float


class Killer(TrainerCallback):
    """Counts down the events of one phase and kills this process at zero."""

    def __init__(self, kill: Kill | None) -> None:
        self.kill, self.count = kill, 0
        if kill is not None and kill.phase == "any":
            timer = threading.Timer(kill.after, self.die)
            timer.daemon = True
            timer.start()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def event(self, phase: str) -> None:
        if self.kill is not None and self.kill.phase == phase:
            self.count += 1
            if self.count > self.kill.after:
                self.die()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.event("training")

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.event("training")


def run(
    folder: str,
    model: str,
    rows: str,
    kill: Kill | None,
    scorer: str | None = None,
    method: str = "STaR",
) -> None:
    """Run, or go on with, two rounds in `folder`; die where `kill` says.

    With a `scorer` (a reward model's folder) it is ReST: two Improve steps after each sampling. With
    the method "judge" it is STaR whose policy judges its samples and the held-out ones.
    """
    killer = Killer(kill)

    def reward(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
        killer.event("evaluating" if evaluating[0] else "grading")
        return [float(s in c.split()) for c, s in zip(completions, solution, strict=True)]

    table = json.loads(Path(rows).read_text())
    settings: dict[str, Any] = {
        "num_rounds": 2, "num_generations": 4, "temperature": 1.0, "max_completion_length": 8,
        "max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False, "use_cpu": True,
        "num_generations_eval": 2, "load_best_round_at_end": False, "eval_strategy": "steps",
        "eval_steps": 2,
    }  # fmt: skip
    datasets = {
        "train_dataset": Dataset.from_list(table["train"]),
        "eval_dataset": Dataset.from_list(table["heldout"]),
    }
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    if method == "IRPO":
        settings |= {"max_completion_length": 32, "max_per_prompt": 2}
        trainer: Any = IRPOTrainer(
            model, args=IRPOConfig(folder, **settings), **datasets, reward_funcs=reward,
            peft_config=lora, callbacks=[killer],
        )  # fmt: skip
    elif method == "judge":
        judge = JudgeReward(  # a random model names no tag: any number counts
            "policy", template="{prompt} {completion} so", verdict=r".*?(\d).*", scale=(0, 9),
            temperature=1.0, max_completion_length=40,
        )  # fmt: skip
        settings |= {"reward_weights": [1.0, 0.5], "reward_threshold": 0.4}
        trainer = STaRTrainer(
            model, STaRConfig(folder, **settings), **datasets, reward_funcs=[reward, judge],
            peft_config=lora, callbacks=[killer],
        )  # fmt: skip
    elif scorer is None:
        trainer = STaRTrainer(
            model, STaRConfig(folder, **settings), **datasets, reward_funcs=reward,
            peft_config=lora, callbacks=[killer],
        )  # fmt: skip
    else:
        rest = {"improve_thresholds": [25.0, 60.0], "threshold_kind": "percentile",
                "start_from": "previous", "reward_weights": [1.0, 0.0], "top_k": 0}  # fmt: skip
        trainer = ReSTEMTrainer(
            model, ReSTEMConfig(folder, **settings, **rest), **datasets,
            reward_funcs=[scorer, reward], peft_config=lora, callbacks=[killer],
        )  # fmt: skip
    evaluating, judging = [False], [False]
    play, collector = trainer.self_play, trainer.self_play.collector
    sampler, score, ask = collector.sampler, type(play).score, type(play).ask
    sample = sampler.sample

    def watched_sample(*args: Any) -> Iterator[Any]:
        for finished in sample(*args):
            killer.event("judging" if judging[0] else "evaluating" if evaluating[0] else "sampling")
            yield finished

    def watched_ask(
        self: Any, rows: Any, round_index: int, phase: str, *args: Any, **kw: Any
    ) -> Any:
        judging[0] = phase == "judge"
        try:
            return ask(self, rows, round_index, phase, *args, **kw)
        finally:
            judging[0] = False

    def watched_score(*args: Any, **kwargs: Any) -> Any:
        evaluating[0] = True
        try:
            return score(*args, **kwargs)
        finally:
            evaluating[0] = False

    sampler.sample = watched_sample
    # Small batches make several shards of a dozen prompts.
    sampler.suggest_batch_size = lambda longest_prompt, max_completion_length: 3
    type(play).score = watched_score
    type(play).ask = watched_ask
    trainer.train(resume_from_checkpoint=True)
