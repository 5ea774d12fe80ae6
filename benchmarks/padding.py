"""Padding in the training batches of short rollouts: as they come, grouped by length, without padding.

A random decoder of 0.1 M parameters samples completions that end by chance, so that their lengths are
spread geometrically up to 128 tokens after prompts of 8. STaR and SPIN train one round on them. Counted
are the slots of each batch, and those that hold padding; seconds are those of the training alone. The
arms take turns, and train on the same rows.

    OMP_NUM_THREADS=1 python benchmarks/padding.py > benchmarks/results/padding.md
"""

import argparse
import contextlib
import io
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from trl_selfplay import SPINConfig, SPINTrainer, STaRConfig, STaRTrainer
from trl_selfplay.demos.sums import build_tokenizer

DATE = "2026-11-26"
NUM_PROMPTS = 48
GROUPED = {"train_sampling_strategy": "group_by_length"}
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "STaR": {
        "as they come": {},
        "grouped by length": GROUPED,
        "padding-free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True, "max_length": 256},
    },
    "SPIN": {"as they come": {}, "grouped by length": GROUPED},
}
SETTINGS: dict[str, Any] = {
    "num_rounds": 1, "max_completion_length": 128, "temperature": 1.0, "num_train_epochs": 1,
    "report_to": [], "disable_tqdm": True, "use_cpu": True, "gradient_checkpointing": False,
    "save_strategy": "no", "logging_strategy": "no",
}  # fmt: skip


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Call every completion right."""
    return [1.0] * len(completions)


def build_model(tokenizer: Any) -> LlamaForCausalLM:
    """Return a random decoder whose completions end with a probability of 1 in 32 at each token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    torch.nn.init.zeros_(model.lm_head.weight)  # all 32 tokens are equally likely
    return model.float()


def build_trainer(method: str, tokenizer: Any, folder: str, options: dict[str, Any]) -> Any:
    """Return a trainer of one round."""
    rows = {"prompt": [f"{a:02}+{b:02}=" for a in range(8) for b in range(12)][:NUM_PROMPTS]}
    settings = {**SETTINGS, **options}
    if method == "STaR":
        return STaRTrainer(
            build_model(tokenizer),
            STaRConfig(folder, num_generations=4, deduplicate=False, rationalize=False, **settings),
            train_dataset=Dataset.from_dict({**rows, "solution": rows["prompt"]}),
            reward_funcs=reward,
            processing_class=tokenizer,
        )
    answers = [f"{i % 100:02}" * (1 + i % 40) for i in range(NUM_PROMPTS)]
    return SPINTrainer(
        build_model(tokenizer),
        args=SPINConfig(folder, **settings),
        train_dataset=Dataset.from_dict({**rows, "completion": answers}),
        processing_class=tokenizer,
    )


def measure(method: str, tokenizer: Any, options: dict[str, Any]) -> tuple[int, float, float]:
    """Return rows, the share of padding among all slots, and seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(method, tokenizer, str(Path(folder) / "run"), options)
        step, slots, padding = trainer.training_step, 0, 0

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal slots, padding
            if trainer.progress is not None and trainer.state.max_steps:
                slots += inputs["input_ids"].numel()
                mask = inputs.get("attention_mask")
                padding += 0 if mask is None else int((mask == 0).sum())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = counted
        with contextlib.redirect_stdout(io.StringIO()):  # the lines of the round
            trainer.train()
        (line,) = trainer.run.lines
        return line["examples"], padding / slots, line["seconds"]["train"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 32])
    given = parser.parse_args()
    tokenizer = build_tokenizer()
    print(
        f"# Padding in training batches\n\nTwo shared {platform.machine()} cores that were busy with ",
        end="",
    )
    print(f"other work, one thread; torch {version('torch')}, transformers ", end="")
    print(f"{version('transformers')}; medians of {given.repeats}; {DATE}.\n")
    print(
        "| Trainer | Rows per batch | Batches | Rows | Padding | Seconds |\n|---|---|---|---|---|---|"
    )
    for method, arms in ARMS.items():
        for batch in given.batches:
            found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in arms}
            for _ in range(given.repeats):
                for name, options in arms.items():
                    size = {"per_device_train_batch_size": batch}
                    if name == "packed":  # a packed row holds about four
                        size = {"per_device_train_batch_size": batch // 4}
                    found[name].append(measure(method, tokenizer, {**options, **size}))
            for name, runs in found.items():
                rows, padding, _ = runs[0]
                seconds = median(run[2] for run in runs)
                print(
                    f"| {method} | {batch} | {name} | {rows} | {padding:.0%} | {seconds:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
