"""Part a: a model of 8B parameters with QLoRA on one card: training, sampling, and the way between.

In: the size of the measurement. Out: items. A round of STaR and of SPIN with rows of 1,024 tokens, of
which the peak of training, tokens per second, and seconds between phases are taken; tokens per second
of sampling by batch in what a card of 24 GB leaves, without and with CUDA graphs and with
transformers' `generate` and `generate_batch`, base weights in 16 and in 4 bits, adapters attached.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_parts import models
from gpu_parts.items import Item
from gpu_parts.measuring import card_of, clean_up, read_peak, restart_peak, seconds_of
from gpu_parts.phases import PhaseClock
from transformers import ContinuousBatchingConfig, GenerationConfig

from trl_selfplay import SPINConfig, SPINTrainer, STaRConfig, STaRTrainer
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

NUM_ROUNDS = 2
SAMPLES_PER_PROMPT = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        model: Of `models.CONFIGS`.
        prompt: Tokens of a prompt; half of them are the same in all prompts when only sampling.
        completion: Tokens of a completion in training.
        steps: Optimizer steps of a round.
        batches: Sequences that are decoded together.
        small_batch: A smaller number of them, of less value.
        sampled: Tokens of a completion when only sampling.
        repeats: Timed runs, after one that warms up.
        rows: Rows of an optimizer step.
        card_gb: The memory of the card.
    """

    model: str
    prompt: int
    completion: int
    steps: int
    batches: tuple[int, ...]
    small_batch: int
    sampled: int
    repeats: int
    rows: int = 1
    card_gb: int = 24


FULL = Sizes("8B", 896, 128, 6, (32, 128), 8, 64, 2)
TOY = Sizes("toy", 24, 8, 2, (8,), 4, 8, 1)


def cards_of(sizes: Sizes) -> dict[str, Sizes]:
    """Return by item a training on a card of another size, with as many rows as should fit."""
    small = "3B" if sizes is FULL else sizes.model
    return {
        "card of 8 GB": replace(sizes, model=small, steps=3, rows=2, card_gb=8),
        "card of 16 GB": replace(sizes, steps=3, rows=4, card_gb=16),
        "card of 24 GB": replace(sizes, steps=3, rows=8, card_gb=24),
    }


def build_items(device: str, results: Path) -> list[Item]:
    """Return the items of this part."""
    sizes = FULL if device == "cuda" else TOY
    items = [
        Item("star", partial(measure_star, sizes, device), 30),
        Item("spin", partial(measure_spin, sizes, device), 30),
    ]
    ways = ["eager", "graphs", "generate"] if device == "cuda" else ["eager", "generate"]
    cases = [(precision, batch) for precision in ("nf4", "16-bit") for batch in sizes.batches]
    cases += [(precision, sizes.small_batch) for precision in ("16-bit", "nf4")]
    items += [
        Item(f"{way} {precision} {batch}", partial(measure_sampling, sizes, device, *case), 12)
        for precision, batch in cases
        for way in ways
        for case in [(way, precision, batch)]
    ]
    items += [
        Item(name, partial(measure_star, other, device), 30)
        for name, other in cards_of(sizes).items()
    ]
    if device == "cuda":  # last: it may replace the model's attention
        case = ("generate_batch", "16-bit", sizes.batches[0])
        items.append(
            Item(" ".join(map(str, case)), partial(measure_sampling, sizes, device, *case), 30)
        )
    return items


def shared_settings(sizes: Sizes, device: str, folder: str) -> dict[str, Any]:
    """Return the fields that both configurations have."""
    return {
        "output_dir": folder, "num_rounds": NUM_ROUNDS, "max_completion_length": sizes.completion,
        "max_length": sizes.prompt + sizes.completion, "per_device_train_batch_size": sizes.rows,
        "max_steps": sizes.steps, "learning_rate": 1e-6, "bf16": device == "cuda",
        "gradient_checkpointing": True, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "logging_steps": 1000, "temperature": 1.0,
    }  # fmt: skip


def star_config(sizes: Sizes, device: str, folder: str) -> STaRConfig:
    """Return STaR's settings."""
    return STaRConfig(**shared_settings(sizes, device, folder), rationalize=False)


def spin_config(sizes: Sizes, device: str, folder: str) -> SPINConfig:
    """Return SPIN's settings."""
    return SPINConfig(**shared_settings(sizes, device, folder))


def all_right(completions: list[str], **columns: Any) -> list[float]:
    """Grade every completion as right."""
    return [1.0] * len(completions)


def measure_star(sizes: Sizes, device: str) -> dict[str, Any]:
    """Run two rounds of STaR."""
    config = models.CONFIGS[sizes.model]
    rows = models.build_rows(
        sizes.steps * sizes.rows, sizes.prompt, sizes.completion, config.vocab_size
    )

    def build(model: Any, folder: str) -> Any:
        return STaRTrainer(
            model,
            star_config(sizes, device, folder),
            train_dataset=rows.rename_column("completion", "solution"),
            processing_class=models.build_tokenizer(config.vocab_size),
            reward_funcs=all_right,
            peft_config=models.lora(),
        )

    return run_rounds(build, sizes, device)


def measure_spin(sizes: Sizes, device: str) -> dict[str, Any]:
    """Run two rounds of SPIN."""
    config = models.CONFIGS[sizes.model]
    rows = models.build_rows(
        sizes.steps * sizes.rows, sizes.prompt, sizes.completion, config.vocab_size
    )

    def build(model: Any, folder: str) -> Any:
        return SPINTrainer(
            model,
            args=spin_config(sizes, device, folder),
            train_dataset=rows,
            processing_class=models.build_tokenizer(config.vocab_size),
            peft_config=models.lora(),
        )

    return run_rounds(build, sizes, device, sides=2)


def run_rounds(
    build: Callable[[Any, str], Any], sizes: Sizes, device: str, sides: int = 1
) -> dict[str, Any]:
    """Run the rounds of a trainer over a 4-bit model; return their summary.

    Args:
        build: Returns the trainer of a model and a folder.
        sizes: How much is measured.
        device: "cuda" or "cpu".
        sides: Sequences in a row: 2 with pairs.
    """
    models.kept_model.cache_clear()
    clean_up(device)
    length = sizes.prompt + sizes.completion
    with card_of(device, sizes.card_gb), tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        model = models.build_model(sizes.model, device, is_quantized=True)
        built = time.perf_counter()
        trainer = build(model, folder)
        constructed = time.perf_counter()
        clock = PhaseClock(trainer, device, ends_all=True)
        trainer.train()
        summary = clock.summarize(sizes.rows * sides * length)
    return {
        **summary, "model": sizes.model, "length": length, "rows": sizes.rows,
        "card_gb": sizes.card_gb, "build_seconds": built - started,
        "construction_seconds": constructed - built,
    }  # fmt: skip


def measure_sampling(
    sizes: Sizes, device: str, way: str, precision: str, batch: int
) -> dict[str, Any]:
    """Time one way of sampling on a card of 24 GB, over a model that is kept for the next."""
    model = models.kept_model(sizes.model, device, precision == "nf4")
    ids = build_prompts(sizes, model.config.vocab_size, batch)
    num_samples = batch // len(ids)
    release: Callable[[], None] = partial(clean_up, device)
    if way in ("eager", "graphs"):
        tokenizer = models.build_tokenizer(model.config.vocab_size)
        sampler = TransformersSampler(model, tokenizer, cuda_graphs=way == "graphs")
        run = partial(sample_all, sampler, ids, batch, sizes.sampled)
        release = sampler.release
    elif way == "generate":
        config = generation_config(sizes.sampled, num_samples, models.EOS)
        run = partial(generate_all, model, ids.to(device), config)
    else:
        config = generation_config(sizes.sampled, num_samples, end=-1)
        pages = batch * (2 + (ids.shape[1] + sizes.sampled) // ContinuousBatchingConfig.page_size)
        batching = ContinuousBatchingConfig(num_blocks=pages)
        run = partial(
            model.generate_batch,
            ids.tolist(),
            generation_config=config,
            continuous_batching_config=batching,
        )
        release = models.kept_model.cache_clear
    try:
        with card_of(device, sizes.card_gb):
            restart_peak(device)
            first = seconds_of(device, run)
            seconds = [seconds_of(device, run) for _ in range(sizes.repeats)]
            peak = read_peak(device)
    finally:
        release()
    num_tokens = batch * sizes.sampled
    return {
        "tokens_per_second": num_tokens / median(seconds), "seconds": seconds,
        "first_seconds": first, "peak": peak, "prompt": ids.shape[1], "sampled": sizes.sampled,
        "card_gb": sizes.card_gb,
    }  # fmt: skip


def build_prompts(sizes: Sizes, vocab_size: int, batch: int) -> torch.Tensor:
    """Return prompts, 8 samples of each fill the batch; the first half of their tokens is the same."""
    num_prompts, length = max(1, batch // SAMPLES_PER_PROMPT), sizes.prompt // 2
    ids = torch.randint(
        10, vocab_size, (num_prompts, length), generator=torch.Generator().manual_seed(0)
    )
    ids[:, : length // 2] = ids[0, : length // 2].clone()
    return ids


def sample_all(sampler: TransformersSampler, ids: torch.Tensor, batch: int, length: int) -> None:
    """Sample a batch of completions with this package's sampler."""
    requests = [
        SampleRequest(tuple(row), i * 1000 + k)
        for i, row in enumerate(ids.tolist())
        for k in range(batch // len(ids))
    ]
    for _ in sampler.sample(requests, SamplingOptions(length), batch):
        pass


def generation_config(length: int, num_samples: int, end: int) -> GenerationConfig:
    """Return settings of transformers that sample as many tokens, from the whole distribution."""
    return GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=length,
        min_new_tokens=length, num_return_sequences=num_samples, pad_token_id=models.PAD,
        eos_token_id=end,
    )  # fmt: skip


@torch.no_grad()
def generate_all(model: Any, ids: torch.Tensor, config: GenerationConfig) -> None:
    """Sample the same with `generate`."""
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
