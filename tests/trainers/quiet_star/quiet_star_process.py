"""A Quiet-STaR run in a process of its own.

Four rows make a step, however many processes there are. The losses and the trained weights go to
losses.json and weights.safetensors; a run in FOLDER goes on from its checkpoint.
"""

import json
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers.trainer_utils import get_last_checkpoint

from trl_selfplay import QuietSTaRConfig, QuietSTaRTrainer


def main(folder: str, model: str, peft: str, steps: str = "3") -> None:
    """Train on rows of different lengths, some of which think at few tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [12, 5, 9, 4, 11, 7, 3, 12, 10, 6, 8, 12, 5, 12, 9, 11]
    rows = [torch.randint(3, 20, (n,), generator=generator).tolist() for n in lengths]
    processes = PartialState(cpu=True).num_processes
    trainer = QuietSTaRTrainer(
        model,
        QuietSTaRConfig(
            folder, max_steps=int(steps), save_steps=2, logging_steps=1, use_cpu=True,
            per_device_train_batch_size=4 // processes, learning_rate=0.05, optim="sgd",
            max_grad_norm=0.0, report_to=[], disable_tqdm=True, thought_length=3,
            num_ahead_tokens=2, thought_fraction=0.6, reinforce_weight=0.5, lr_scheduler_type="constant",
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if peft == "lora" else None,
    )  # fmt: skip
    with torch.no_grad():  # a head that has woken up, so that thoughts count from the first step
        last = trainer.causal_lm.quiet_star.head[-1].weight
        last.copy_(torch.randn(last.shape, generator=generator))
    checkpoint = get_last_checkpoint(folder) if Path(folder).exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
        weights = {
            name: p.detach().clone()
            for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
            if p.requires_grad
        }
        save_file(weights, Path(folder) / "weights.safetensors")
