"""Part e: Quiet-STaR on a 0.5B model: memory, tokens per second, the longest text that fits.

In: the size of the measurement. Out: items. A training step (sampling, loss, gradients, AdamW) on one
text of 256 tokens, 2 thoughts of 8 tokens per token, 4 tokens ahead, all weights in bfloat16; the
gradients of the same step with one pass per token and a dense mask (quiet_star_cost.py); longer texts,
until one doesn't fit a card of 24 GB.
"""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from gpu_parts import models
from gpu_parts.items import Item, is_done, is_out_of_memory
from gpu_parts.measuring import card_of, clean_up, read_peak, restart_peak, seconds_of

from trl_selfplay import QuietSTaRConfig, QuietSTaRTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from quiet_star_cost import dense_step

CARD_GB = 24
NUM_THOUGHTS, THOUGHT_LENGTH, NUM_AHEAD = 2, 8, 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        model: Of `models.CONFIGS`.
        length: Tokens of the text that both schemes are timed on.
        searched: Longer texts, in ascending order.
        steps: Optimizer steps, the first of which isn't counted.
    """

    model: str
    length: int
    searched: tuple[int, ...]
    steps: int


FULL = Sizes("0.5B", 256, (384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096), 5)
TOY = Sizes("toy", 24, (32, 40), 2)


def build_items(device: str, results: Path) -> list[Item]:
    """Return the items of this part; of the longer texts, those that halve what is unknown first."""
    sizes = FULL if device == "cuda" else TOY
    items = [
        Item(f"split {sizes.length}", partial(measure_split, sizes, device, sizes.length), 10),
        Item(f"dense {sizes.length}", partial(measure_dense, sizes, device), 10),
    ]
    return items + [
        Item(
            f"split {length}",
            partial(measure_split, sizes, device, length),
            10,
            partial(is_unknown, length),
        )
        for length in bisecting(sizes.searched)
    ]


def bisecting(values: tuple[int, ...]) -> list[int]:
    """Return sorted values in the order of a bisection.

    >>> bisecting((1, 2, 3, 4, 5))
    [3, 2, 5, 1, 4]
    """
    ordered, parts = [], [values]
    while parts:
        part, *parts = parts
        if part:
            middle = len(part) // 2
            ordered.append(part[middle])
            parts += [part[:middle], part[middle + 1 :]]
    return ordered


def is_unknown(length: int, records: Mapping[str, Any]) -> bool:
    """Return whether no shorter text was too long, and no longer one fitted."""
    for name, record in records.items():
        arm, _, other = name.partition(" ")
        if arm != "split":
            continue
        if is_done(record) and int(other) > length:
            return False
        if is_out_of_memory(record) and int(other) <= length:
            return False
    return True


def quiet_star_config(sizes: Sizes, device: str, folder: str) -> QuietSTaRConfig:
    """Return the trainer's settings."""
    return QuietSTaRConfig(
        folder, max_steps=sizes.steps, per_device_train_batch_size=1, max_length=None,
        thought_length=THOUGHT_LENGTH, num_ahead_tokens=NUM_AHEAD, num_thoughts=NUM_THOUGHTS,
        bf16=device == "cuda", report_to=[], save_strategy="no", logging_steps=1000,
        gradient_checkpointing=True, learning_rate=1e-5, disable_tqdm=True,
    )  # fmt: skip


def build_trainer(sizes: Sizes, device: str, length: int, folder: str) -> Any:
    """Return a trainer of all weights on random texts."""
    vocab_size = models.CONFIGS[sizes.model].vocab_size
    ids = torch.randint(
        10, vocab_size, (sizes.steps, length), generator=torch.Generator().manual_seed(1)
    )
    return QuietSTaRTrainer(
        models.build_model(sizes.model, device),
        quiet_star_config(sizes, device, folder),
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        processing_class=models.build_tokenizer(vocab_size),
    )


def measure_split(sizes: Sizes, device: str, length: int) -> dict[str, Any]:
    """Train a few steps on a card of 24 GB."""
    clean_up(device)
    with card_of(device, CARD_GB), tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(sizes, device, length, folder)
        seconds: list[float] = []
        step = trainer.training_step

        def timed_step(*args: Any, **kwargs: Any) -> Any:
            found: list[Any] = []
            seconds.append(seconds_of(device, lambda: found.append(step(*args, **kwargs))))
            return found[0]

        trainer.training_step = timed_step
        restart_peak(device)
        trainer.train()
        return summarize(seconds, length, device)


def measure_dense(sizes: Sizes, device: str) -> dict[str, Any]:
    """Compute the gradients of the same texts with the dense scheme, on the whole card."""
    clean_up(device)
    with card_of(device, None), tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(sizes, device, sizes.length, folder)
        model = trainer.causal_lm.to(device).eval()
        seconds: list[float] = []
        restart_peak(device)
        for row in trainer.train_dataset["input_ids"]:
            ids = torch.tensor([list(row)], device=device)
            model.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                step = partial(dense_step, model, ids, THOUGHT_LENGTH, NUM_AHEAD)
                seconds.append(seconds_of(device, step))
        return summarize(seconds, sizes.length, device) | {"card_gb": None}


def summarize(seconds: list[float], length: int, device: str) -> dict[str, Any]:
    """Return seconds of a step after the first, tokens of text per second, and the peak."""
    step = median(seconds[1:] or seconds)
    return {
        "step_seconds": step,
        "text_tokens_per_second": length / step,
        "peak": read_peak(device),
        "length": length,
        "card_gb": CARD_GB,
    }
