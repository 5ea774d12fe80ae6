"""Part b: one round with a 0.5B model, against the plain pieces of TRL, at equal samples.

In: the size of the measurement. Out: items, one for each way. ReST^EM samples, filters and trains in a
round of its own; by hand, `generate` in batches sorted by length and then SFTTrainer; GRPOTrainer
samples and trains as many completions of the same prompts. Weights are random, in bfloat16 with LoRA;
completions end at random after 100 tokens on average; the reward keeps half of them. ReST^EM and
SFTTrainer take the same number of steps on rows that passed, GRPOTrainer one on each batch of completions.
"""

import random
import tempfile
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from gpu_parts import models
from gpu_parts.items import Item
from gpu_parts.measuring import card_of, clean_up, read_peak, restart_peak, seconds_of, wait_for
from gpu_parts.phases import PhaseClock
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        model: Of `models.CONFIGS`.
        num_prompts: Prompts of a round.
        num_generations: Completions of a prompt.
        prompts: Least and most tokens of a prompt.
        mean: Tokens of a completion on average.
        most: Tokens of a completion at most.
        rows: Rows or completions of an optimizer step.
        generated: Sequences that `generate` decodes together.
    """

    model: str
    num_prompts: int
    num_generations: int
    prompts: tuple[int, int]
    mean: int
    most: int
    rows: int
    generated: int

    @property
    def steps(self) -> int:
        """Optimizer steps on the half of the completions that passes."""
        return max(1, self.num_prompts * self.num_generations // 2 // self.rows)


FULL = Sizes("0.5B", 64, 8, (64, 192), 100, 256, 16, 256)
TOY = Sizes("toy", 4, 4, (8, 16), 8, 16, 4, 8)
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-6, "lr_scheduler_type": "constant", "gradient_checkpointing": True,
    "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1000,
}  # fmt: skip
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def build_items(device: str, results: Path) -> list[Item]:
    """Return the items of this part."""
    sizes = FULL if device == "cuda" else TOY
    ways = {"rest_em": run_rest_em, "generate and SFT": run_by_hand, "GRPO": run_grpo}
    return [Item(name, partial(measure_warm, run, sizes, device), 20) for name, run in ways.items()]


def measure_warm(run: Any, sizes: Sizes, device: str) -> dict[str, Any]:
    """Run one way in a process that has compiled and loaded what all of them use."""
    warm_up(sizes, device)
    return measure(run, sizes, device)


@lru_cache(maxsize=1)
def warm_up(sizes: Sizes, device: str) -> None:
    """Sample and train a little by hand, once in a process."""
    measure(run_by_hand, replace(sizes, num_prompts=8, mean=8, most=32), device)


def measure(run: Any, sizes: Sizes, device: str) -> dict[str, Any]:
    """Run one way with a new model; return its seconds and peak, without loading and construction."""
    models.kept_model.cache_clear()
    clean_up(device)
    model = models.build_model(sizes.model, device)
    models.let_end(model, sizes.mean)
    vocab_size = model.config.vocab_size
    rng = random.Random(0)
    prompts = [
        models.words(rng, rng.randint(*sizes.prompts), vocab_size) for _ in range(sizes.num_prompts)
    ]
    tokenizer = models.build_tokenizer(vocab_size)
    with card_of(device, None), tempfile.TemporaryDirectory() as folder:
        return run(model, tokenizer, prompts, sizes, device, folder)


def half(completions: list[str], **columns: Any) -> list[float]:
    """Give 1.0 to completions whose first word has an even number."""
    firsts = [completion.split()[:1] for completion in completions]
    return [float(bool(first) and int(first[0][1:]) % 2 == 0) for first in firsts]


def rest_em_config(sizes: Sizes, device: str, folder: str) -> ReSTEMConfig:
    """Return the settings of the round of ReST^EM."""
    return ReSTEMConfig(
        folder, num_rounds=1, num_generations=sizes.num_generations,
        max_completion_length=sizes.most, max_length=sizes.prompts[1] + sizes.most,
        per_device_train_batch_size=sizes.rows, max_steps=sizes.steps, bf16=device == "cuda",
        **SAMPLING, **SETTINGS,
    )  # fmt: skip


def run_rest_em(
    model: Any, tokenizer: Any, prompts: list[str], sizes: Sizes, device: str, folder: str
) -> dict[str, Any]:
    """Run a round of ReST^EM."""
    rows = Dataset.from_dict({"prompt": prompts, "solution": [""] * len(prompts)})
    trainer = ReSTEMTrainer(
        model,
        rest_em_config(sizes, device, folder),
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=half,
        peft_config=models.lora(),
    )
    clock = PhaseClock(trainer, device)
    seconds = seconds_of(device, trainer.train)
    summary = clock.summarize(tokens_per_step=0)
    line = trainer.run.lines[0]
    return {
        "seconds": seconds, "phases": line["seconds"], "examples": line["examples"],
        "steps": line["steps"], "sampled_tokens": sum(tokens for tokens, _ in clock.sampled),
        "sampling_seconds": sum(s for _, s in clock.sampled), "peaks": summary["peaks"],
    }  # fmt: skip


def run_by_hand(
    model: Any, tokenizer: Any, prompts: list[str], sizes: Sizes, device: str, folder: str
) -> dict[str, Any]:
    """Sample with `generate`, filter, and train with SFTTrainer."""
    restart_peak(device)
    started = time.perf_counter()
    ordered = sorted(prompts, key=lambda prompt: len(prompt.split()))
    num_prompts = max(1, sizes.generated // sizes.num_generations)
    examples, tokens = [], 0
    for start in range(0, len(ordered), num_prompts):
        encoded = tokenizer(
            ordered[start : start + num_prompts], return_tensors="pt", padding=True,
            return_token_type_ids=False,
        ).to(device)  # fmt: skip
        with torch.no_grad():
            output = model.generate(
                **encoded, do_sample=True, num_return_sequences=sizes.num_generations,
                max_new_tokens=sizes.most, pad_token_id=models.PAD, eos_token_id=models.EOS,
                **SAMPLING,
            )  # fmt: skip
        width = encoded["input_ids"].shape[1]
        repeated = encoded["input_ids"].repeat_interleave(sizes.num_generations, 0).tolist()
        for prompt, completion in zip(repeated, output[:, width:].tolist(), strict=True):
            is_ended = models.EOS in completion
            ids = completion[: completion.index(models.EOS) + 1] if is_ended else completion
            tokens += len(ids)
            if is_ended and half([tokenizer.decode(ids, skip_special_tokens=True)]) == [1.0]:
                start_ids = [i for i in prompt if i != models.PAD]
                labels = [-100] * len(start_ids) + ids
                examples.append({"input_ids": start_ids + ids, "labels": labels})
    wait_for(device)
    sampled = time.perf_counter()
    peaks = {"sampling": read_peak(device)}
    restart_peak(device)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            folder, max_steps=sizes.steps, per_device_train_batch_size=sizes.rows,
            bf16=device == "cuda", **SETTINGS,
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=models.lora(),
    )  # fmt: skip
    constructed = time.perf_counter()
    trainer.train()
    trainer.save_model(folder)
    wait_for(device)
    ended = time.perf_counter()
    peaks["training"] = read_peak(device)
    phases = {"sample": sampled - started, "train": ended - constructed}
    return {
        "seconds": sum(phases.values()), "phases": phases, "examples": len(examples),
        "steps": trainer.state.global_step, "sampled_tokens": tokens,
        "sampling_seconds": phases["sample"], "peaks": peaks,
    }  # fmt: skip


def run_grpo(
    model: Any, tokenizer: Any, prompts: list[str], sizes: Sizes, device: str, folder: str
) -> dict[str, Any]:
    """Sample and train on as many completions with GRPOTrainer, as many at a time as by hand."""
    completions = len(prompts) * sizes.num_generations
    trainer = GRPOTrainer(
        model,
        half,
        GRPOConfig(
            folder, num_generations=sizes.num_generations, max_completion_length=sizes.most,
            per_device_train_batch_size=sizes.rows, generation_batch_size=sizes.generated,
            max_steps=completions // sizes.rows, bf16=device == "cuda", **SAMPLING, **SETTINGS,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        peft_config=models.lora(),
    )  # fmt: skip
    restart_peak(device)
    seconds = seconds_of(device, trainer.train)
    return {
        "seconds": seconds, "phases": {}, "examples": completions,
        "steps": trainer.state.global_step, "peaks": {"all": read_peak(device)},
    }  # fmt: skip
