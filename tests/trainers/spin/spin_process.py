"""A SPIN run in a process of its own: `spin_process.py FOLDER MODEL PHASE COUNT [PEFT]`.

It kills itself with SIGKILL at the COUNTth event of PHASE ("sampling", "scoring" the opponent,
"training", "measuring" held-out pairs), after COUNT seconds of "any" phase, or not at all ("none"),
and writes the first log line of each round to FOLDER/first.json. PEFT is "lora", "full", "user" (a
PeftModel with a trained adapter) or "nf4".
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)

from trl_selfplay import SPINConfig, SPINTrainer


class Witness(TrainerCallback):
    """Counts down to the kill, and keeps each round's first step."""

    def __init__(self, phase: str, count: float) -> None:
        self.phase, self.count = phase, count
        self.measures = False
        self.first: dict[int, dict[str, float]] = {}

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def event(self, phase: str) -> None:
        if phase == self.phase:
            self.count -= 1
            if self.count < 0:
                self.die()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.event("training")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "rewards/margins" in logs and "loss" in logs:
            self.first.setdefault(logs["round"], dict(logs))


def model_arguments(path: str, peft: str) -> dict[str, Any]:
    """Return what the trainer takes in one of the cases of fine-tuning."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    if peft == "user":
        # Another adapter in each process: the trainer takes that of the first.
        torch.manual_seed(1 + int(os.environ.get("RANK", "0")))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.2, generator=generator)
        return {"model": model, "processing_class": AutoTokenizer.from_pretrained(path)}
    arguments: dict[str, Any] = {"model": path}
    if peft == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return arguments | ({} if peft == "full" else {"peft_config": lora})


def main(folder: str, model: str, phase: str, count: str, peft: str = "lora") -> None:
    """Run or go on with three rounds."""
    witness = Witness(phase, float(count))

    class WatchedTrainer(SPINTrainer):
        def compute_policy_log_probs(self, model: Any, inputs: Any) -> Any:
            witness.event("measuring" if witness.measures else "scoring")
            return super().compute_policy_log_probs(model, inputs)

        def score_heldout(self, round_index: int, folder: Path | None) -> Any:
            witness.measures = True
            try:
                return super().score_heldout(round_index, folder)
            finally:
                witness.measures = False

    pairs = [divmod(i, 10) for i in range(24)]
    rows = [
        {"prompt": f"Q {a} + {b} = ?", "completion": f" so {b} + {a} = {(a + b) % 10}"}
        for a, b in pairs
    ]
    trainer = WatchedTrainer(
        **model_arguments(model, peft),
        args=SPINConfig(
            folder, num_rounds=3, max_completion_length=64, max_steps=3, save_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
            logging_steps=1, report_to=[], disable_tqdm=True, gradient_checkpointing=False,
            use_cpu=True, load_best_round_at_end=False,
        ),
        train_dataset=Dataset.from_list(rows[:18]),
        eval_dataset=Dataset.from_list(rows[18:]),
        callbacks=[witness],
    )  # fmt: skip
    sampler = trainer.self_play.collector.sampler
    sample = sampler.sample

    def watched_sample(*args: Any) -> Iterator[Any]:
        for finished in sample(*args):
            witness.event("sampling")
            yield finished

    sampler.sample = watched_sample
    sampler.suggest_batch_size = lambda longest_prompt, max_completion_length: 2
    if phase == "any":
        timer = threading.Timer(witness.count, witness.die)
        timer.daemon = True
        timer.start()
    trainer.train(resume_from_checkpoint=True)
    if trainer.is_world_process_zero():
        (Path(folder) / "first.json").write_text(json.dumps(witness.first))
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
