"""Quiet-STaR runs that are killed while a checkpoint is written, each in a process of its own.

Weights after the last step go to FOLDER/<name>.safetensors: of a run that was never stopped, and of
runs that SIGKILL stopped in the middle of their third checkpoint and that went on.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file

from trl_selfplay import QuietSTaRConfig, QuietSTaRTrainer

# The file in whose midst a run dies. Files are written in this order.
MOMENTS = ("quiet_star.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def train(folder: Path, model: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 20, (10,), generator=generator).tolist() for _ in range(16)]
    trainer = QuietSTaRTrainer(
        model,
        QuietSTaRConfig(
            str(folder), max_steps=4, save_steps=1, use_cpu=True, bf16=False, report_to=[],
            per_device_train_batch_size=4, learning_rate=0.05, disable_tqdm=True,
            thought_length=3, num_ahead_tokens=2, thought_fraction=0.6, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    with torch.no_grad():
        trainer.causal_lm.quiet_star.head[-1].weight.fill_(0.02)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def die_at(moment: str) -> None:
    """Let this process write half of one file of checkpoint-3, and kill it."""

    def half(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(module: Any, name: str, place: int | None) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            path = Path(str(args[place])) if place is not None else Path()
            if path.name == moment and path.parent.name == "checkpoint-3":
                half(path)
            return result

        setattr(module, name, watched)

    from transformers import TrainerState

    watch(torch, "save", 1)
    watch(TrainerState, "save_to_json", 1)
    watch(Path, "write_text", 0)


def finish(folder: str, model: str, name: str) -> None:
    """Run to the end, or go on to it, and keep the trained weights."""
    trainer = train(Path(folder) / name, model)
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    save_file(
        {n: p for n, p in weights.items() if "lora" in n or "quiet" in n},
        Path(folder) / f"{name}.safetensors",
    )


def die(folder: str, model: str, moment: str) -> None:
    """Run until the process dies while it writes the file of this name."""
    die_at(moment)
    train(Path(folder) / moment, model)
