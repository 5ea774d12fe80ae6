"""How much of Quiet-STaR fits a GPU, and how fast is it? Models with random weights of public sizes.

- 0.5B in bfloat16, all weights trained, batch 1, 2 thoughts: peak memory and tokens of text per
  second of a whole step (sampling, loss, gradients, AdamW) at S = 256 with thoughts of 8 tokens and
  4 ahead, and of 12 tokens and 8 ahead; the same gradients with a dense mask and a growing cache
  (benchmarks/quiet_star_cost.py); the largest S that fits 24 GB and this card.
- 8B in 4 bits with LoRA: the largest S that fits 24 GB and this card.

Nothing is downloaded. A measurement is a process of its own, because a failed allocation leaves the
allocator's memory in pieces:

    python benchmarks/quiet_star_gpu.py
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_selfplay import QuietSTaRConfig, QuietSTaRTrainer

sys.path.insert(0, str(Path(__file__).parent))
from quiet_star_cost import dense_step
from sampling_gpu import CONFIGS, build_tokenizer

RESULTS = Path(__file__).parent / "results" / "quiet_star_gpu"
GB = 10**9
SEARCHED = (92, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
# What is measured: model, text length, thought length, tokens ahead, arm.
FIXED = (
    ("0.5B", 256, 8, 4, "split"),
    ("0.5B", 256, 8, 4, "dense"),
    ("0.5B", 256, 12, 8, "split"),
    ("0.5B", 256, 12, 8, "dense"),
)
NUM_STEPS = 6


def build_trainer(size: str, text_length: int, thought_length: int, ahead: int) -> Any:
    """Return a trainer on random text: 0.5B with all weights, 8B in 4 bits with LoRA."""
    config = CONFIGS[size]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, config.vocab_size, (NUM_STEPS, text_length), generator=generator)
    folder = tempfile.mkdtemp()
    model: Any = None
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    peft_config = None
    if size == "8B":
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map="cuda", dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            ),
        )  # fmt: skip
        peft_config = LoraConfig(r=16, target_modules="all-linear")
    args = QuietSTaRConfig(
        tempfile.mkdtemp(), max_steps=NUM_STEPS, per_device_train_batch_size=1, max_length=None,
        thought_length=thought_length, num_ahead_tokens=ahead, num_thoughts=2, bf16=True,
        report_to=[], save_strategy="no", logging_steps=NUM_STEPS, gradient_checkpointing=True,
        learning_rate=1e-5, disable_tqdm=True,
    )  # fmt: skip
    return QuietSTaRTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=build_tokenizer(config.vocab_size),
        peft_config=peft_config,
    )


def measure(
    size: str, text_length: int, thought_length: int, ahead: int, arm: str, limit: float | None
) -> dict[str, float]:
    """Train a few steps in this process; return seconds a step and the peak, or raise out of memory.

    Args:
        size: Of `CONFIGS`.
        text_length: S.
        thought_length: n.
        ahead: n_true.
        arm: "split" is the trainer's step; "dense" replaces sampling, loss and gradients by the
            official scheme's on the same model, without AdamW.
        limit: Bytes that may be used; None is all of the card.
    """
    if limit is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    trainer = build_trainer(size, text_length, thought_length, ahead)
    torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    if arm == "dense":
        model = trainer.causal_lm.to("cuda").eval()
        for row in trainer.train_dataset["input_ids"]:
            seconds.append(timed(lambda row=row: dense_row(model, row, thought_length, ahead)))
    else:
        step = trainer.training_step

        def timed_step(*args: Any, **kwargs: Any) -> Any:
            found: list[Any] = []
            seconds.append(timed(lambda: found.append(step(*args, **kwargs))))
            return found[0]

        trainer.training_step = timed_step
        trainer.train()
    return {
        "seconds": median(seconds[1:]),  # the first warms up
        "peak_gb": torch.cuda.max_memory_allocated() / GB,
        "reserved_gb": torch.cuda.max_memory_reserved() / GB,
    }


def dense_row(model: Any, row: list[int], thought_length: int, ahead: int) -> None:
    """Compute one text's gradients with the dense scheme."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        dense_step(model, torch.tensor([row], device="cuda"), thought_length, ahead)


def timed(run: Any) -> float:
    """Return the seconds that a call takes on the GPU."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measured(*cell: Any) -> dict[str, float] | None:
    """Return a cell's record, from its file or a new process; None if it is out of memory."""
    path = RESULTS / f"{'-'.join(map(str, cell))}.json"
    if not path.exists():
        command = [sys.executable, __file__, "--cell", *map(str, cell)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            path.write_text(done.stdout.strip().splitlines()[-1])
        elif "OutOfMemoryError" in done.stderr or "out of memory" in done.stderr:
            path.write_text("null")
        else:
            raise SystemExit(done.stderr[-3000:])
    record: dict[str, float] | None = json.loads(path.read_text())
    return record


def largest(size: str, limit_gb: float | None) -> int:
    """Return the largest of `SEARCHED` that fits, 0 if none does."""
    fits = 0
    for text_length in SEARCHED:
        if measured(size, text_length, 8, 4, "split", limit_gb) is None:
            break
        fits = text_length
    return fits


def main() -> None:
    """Measure what is missing and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cell", nargs=6, help="SIZE S N AHEAD ARM LIMIT_GB (or None): measure here"
    )
    parser.add_argument("--sizes", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device; torch sees none.")
    if args.cell:
        size, text_length, thought_length, ahead, arm, limit = args.cell
        bound = None if limit == "None" else float(limit) * GB
        print(json.dumps(
            measure(size, int(text_length), int(thought_length), int(ahead), arm, bound)
        ))  # fmt: skip
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(
        f"{n} {version(n)}" for n in ("trl", "transformers", "torch", "bitsandbytes")
    )
    text = [
        "# Quiet-STaR on a GPU",
        "",
        f"{torch.cuda.get_device_name()}; {versions}; seed 0; {datetime.date.today().isoformat()}. "
        "Script: `benchmarks/quiet_star_gpu.py`. Batch 1, 2 thoughts a token, activations "
        "recomputed; split: a training step without AdamW's update in its time; dense: its "
        "gradients alone.",
        "",
        "| model | S | thought | ahead | arm | peak GB | text tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in FIXED:
        if cell[0] in args.sizes:
            record = measured(*cell, None)
            found = "out of memory | –"
            if record is not None:
                found = f"{record['peak_gb']:.1f} | {cell[1] / record['seconds']:.0f}"
            text.append(f"| {' | '.join(map(str, cell))} | {found} |")
    text += ["", "Largest S that fits, thoughts of 8, 4 ahead:", ""]
    card = torch.cuda.get_device_properties(0).total_memory / GB
    for size in args.sizes:
        for limit in (24.0, None):
            name = f"{card:.0f} GB (this card)" if limit is None else f"{limit:.0f} GB"
            text.append(f"- {size}, {name}: {largest(size, limit)} of {SEARCHED}")
        RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
