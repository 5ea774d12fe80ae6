"""What fits a card? The longest rows that each method can train on, by model, way of training and card.

Lengths of 1,024 and 4,096 tokens (Quiet-STaR: 256 and 1,024) are tried with `trl_selfplay.estimate`, one
row (or pair) at a time, with gradient checkpointing and bfloat16 weights. Nothing is loaded or
downloaded. It takes a few minutes on one core.

    python benchmarks/memory_table.py
"""

import argparse
import datetime
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig, Qwen2Config

from trl_selfplay import QuietSTaRConfig, SPINConfig, STaRConfig, estimate
from trl_selfplay.estimation.record import usable_bytes

RESULTS = Path(__file__).parent / "results" / "memory_table.md"
CARDS = (8, 16, 24, 80)
LENGTHS, THINKING_LENGTHS = (1024, 4096), (256, 1024)


def qwen(hidden: int, inner: int, layers: int, heads: int, key_heads: int, tied: bool) -> Any:
    """Return a configuration of Qwen2.5."""
    return Qwen2Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied,
        max_position_embeddings=32_768,
    )  # fmt: skip


MODELS = {
    "0.5B": qwen(896, 4864, 24, 14, 2, True),
    "3B": qwen(2048, 11_008, 36, 16, 2, True),
    "8B": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072,
    ),
}  # fmt: skip
METHODS = {
    "STaR, ReST^EM": STaRConfig,
    "SPIN, IRPO, V-STaR": SPINConfig,
    "Quiet-STaR": QuietSTaRConfig,
}
NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Way:
    """A way of training.

    Attributes:
        name: In the table.
        loading: Arguments of `from_pretrained`.
        has_adapters: LoRA of rank 16 on all linear layers; else all weights are trained.
        optim: The optimizer.
    """

    name: str
    loading: dict[str, Any]
    has_adapters: bool
    optim: str = "adamw_torch_fused"


WAYS = (
    Way("QLoRA", {"dtype": "bfloat16", "quantization_config": NF4}, True),
    Way("LoRA", {"dtype": "bfloat16"}, True),
    Way("all weights, 8-bit Adam", {"dtype": "bfloat16"}, False, "adamw_8bit"),
)


def training_bytes(model: str, config_class: type, way: Way, length: int, folder: str) -> int:
    """Return the estimated peak of training."""
    config = config_class(
        folder, max_length=length, per_device_train_batch_size=1, optim=way.optim,
        model_init_kwargs=dict(way.loading), report_to=[],
    )  # fmt: skip
    lora = LoraConfig(r=16, target_modules="all-linear") if way.has_adapters else None
    found = estimate(MODELS[model], config, peft_config=lora, device="cuda")
    return found.phase("training").total


def build_row(model: str, method: str, way: Way, folder: str) -> str | None:
    """Return a row of the table: the longest rows by card, and the peak at 1,024 tokens (256)."""
    config_class = METHODS[method]
    thinks = config_class is QuietSTaRConfig
    lengths = THINKING_LENGTHS if thinks else LENGTHS
    peaks: dict[int, int] = {}

    def peak(length: int) -> int:
        if length not in peaks:
            peaks[length] = training_bytes(model, config_class, way, length, folder)
        return peaks[length]

    if peak(lengths[0]) > usable_bytes(CARDS[-1]):
        return None
    cells = []
    for card in CARDS:
        longest = 0
        for length in lengths:
            if peak(length) > usable_bytes(card):
                break
            longest = length
        cells.append(f"{longest:,}" if longest else "–")
    return (
        f"| {model} | {method} | {way.name} | {peak(lengths[0]) / 1e9:.1f} | {' | '.join(cells)} |"
    )


def main() -> None:
    """Print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    chosen = parser.parse_args().models
    lines = [
        "| Model | Method | Training | GB at 1,024 tokens (Quiet-STaR: 256) | "
        + " | ".join(f"{card} GB" for card in CARDS)
        + " |",
        "|---|---|---|---|" + "---|" * len(CARDS),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for model in chosen:
            for method, config_class in METHODS.items():
                if config_class is QuietSTaRConfig and model != "0.5B":
                    continue  # minutes for each row
                for way in WAYS:
                    row = build_row(model, method, way, folder)
                    if row is not None:
                        lines.append(row)
                        print(row, flush=True)
    packages = ("torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    date = datetime.date.today().isoformat()
    title = f"# What fits a card\n\nEstimated, not measured. {versions}, {date}.\n\n"
    if chosen == list(MODELS):
        RESULTS.write_text(title + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
