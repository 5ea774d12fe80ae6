"""Count what one round of a million prompts with 32 samples each costs on 64 GPUs, on paper.

    python benchmarks/cluster_cost.py

In: the sizes below, and what `growth.md` and `maths_speed.md` measured per completion on one core. Out:
`results/cluster_cost.md` with tokens, seconds and bytes by phase. Nothing is measured here.

Sampling on a GPU is bounded by its memory: each step of decoding reads the weights once, and the keys and
values of all sequences in the batch. Training is bounded by arithmetic: 6 FLOP per parameter and token for full
fine-tuning, 4 with LoRA, which needs no gradient of the frozen weights.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from plots import RESULTS, table

MODEL = "Llama-3.1-8B in bfloat16"
PARAMETERS = 8.03e9
# Keys and values of 32 layers with 8 heads of 128 values.
CACHE_BYTES_PER_TOKEN = 2 * 32 * 8 * 128 * 2
GPU = "H100 SXM, 80 GB"
BYTES_PER_SECOND = 3.35e12
FLOP_PER_SECOND = 989e12
GPUS, CORES_PER_GPU = 64, 16
PROMPTS, SAMPLES = 1_000_000, 32
PROMPT_TOKENS, COMPLETION_TOKENS = 150, 300
KEPT_PER_PROMPT = 10  # 2308.01825 and 2312.06585 keep at most so many
SHARE_RIGHT = 0.5
BATCH = 256
# Assumed, not measured: what engines reach of the bounds.
SAMPLING_EFFICIENCY, TRAINING_EFFICIENCY = 0.5, 0.4
NETWORK_BYTES_PER_SECOND = 1.25e9  # 10 Gbit/s to the store, all machines together


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of the round: its hours, and from what they follow."""

    name: str
    hours: float
    reason: str


def count() -> tuple[list[tuple[str, str]], list[Phase]]:
    """Return the sizes of the round, and its phases in order."""
    completions = PROMPTS * SAMPLES
    tokens = completions * COMPLETION_TOKENS
    kept = PROMPTS * min(KEPT_PER_PROMPT, SAMPLES * SHARE_RIGHT)
    trained = kept * (PROMPT_TOKENS + COMPLETION_TOKENS)

    cache = BATCH * (PROMPT_TOKENS + COMPLETION_TOKENS / 2) * CACHE_BYTES_PER_TOKEN
    step = (2 * PARAMETERS + cache) / BYTES_PER_SECOND
    per_gpu = SAMPLING_EFFICIENCY * BATCH / step
    prefill = 2 * PARAMETERS * PROMPTS * PROMPT_TOKENS / (FLOP_PER_SECOND * TRAINING_EFFICIENCY)

    # What one busy core took for a million completions of 100 to 300 tokens.
    million = table("growth", "read and grade, s")[-1]
    assert million["completions"] == "1,000,000"
    smaller = table("growth", "read and grade, s")[-2]
    more = float(million["peak, MB"].replace(",", "")) - float(smaller["peak, MB"].replace(",", ""))
    memory = float(million["peak, MB"].replace(",", "")) * 1e6 + more * 1e6 / 9e5 * (
        completions - 1e6
    )
    stages = ("prompts, s", "select, s", "diversity, s", "rows and report, s")
    one_core = {name: float(million[name]) * completions / 1e6 for name in stages}
    bytes_each = float(million["disk, MB"].replace(",", "")) * 1e6 / 1e6
    stored = bytes_each * completions
    row = next(
        r
        for r in table("maths_speed", "math_reward, pairs/s")
        if (r["Processes"], r["Mix"], r["Completions per prompt"]) == ("1", "all", "8")
    )
    graded = float(row["math_reward, pairs/s"])

    sizes = [
        ("completions", f"{completions / 1e6:,.0f} million"),
        ("sampled tokens", f"{tokens / 1e9:,.1f} billion"),
        ("sampled tokens per second and GPU", f"{per_gpu:,.0f}"),
        ("cache of a batch", f"{cache / 1e9:,.1f} GB"),
        ("kept completions", f"{kept / 1e6:,.0f} million"),
        ("trained tokens", f"{trained / 1e9:,.1f} billion"),
        ("samples on disk", f"{stored / 1e9:,.0f} GB ({bytes_each:,.0f} bytes each)"),
        ("memory of the main process", f"{memory / 1e9:,.0f} GB"),
    ]
    arithmetic = GPUS * FLOP_PER_SECOND * TRAINING_EFFICIENCY
    phases = [
        Phase("sample: prompts", prefill / GPUS / 3600, "each prompt is read once"),
        Phase(
            "sample: completions",
            tokens / per_gpu / GPUS / 3600,
            f"batches of {BATCH}, {SAMPLING_EFFICIENCY:.0%} of what memory allows",
        ),
        Phase(
            "grade, beside sampling",
            completions / graded / (GPUS * CORES_PER_GPU) / 3600,
            f"{graded:,.0f} completions per second and core, on {GPUS * CORES_PER_GPU:,} cores",
        ),
        Phase("write samples", stored / NETWORK_BYTES_PER_SECOND / 3600, "10 Gbit/s to the store"),
        *(
            Phase(
                f"{name.removesuffix(', s')}, in the main process",
                seconds / 3600,
                "measured on one core",
            )
            for name, seconds in one_core.items()
        ),
        Phase(
            "train with LoRA",
            4 * PARAMETERS * trained / arithmetic / 3600,
            f"one epoch, {TRAINING_EFFICIENCY:.0%} of the GPU's arithmetic",
        ),
        Phase("train all weights", 6 * PARAMETERS * trained / arithmetic / 3600, "one epoch"),
    ]
    return sizes, phases


def write(path: Path) -> None:
    """Write the result file."""
    sizes, phases = count()
    lines = [
        "# A million prompts on 64 GPUs, on paper",
        "",
        f"One round of {PROMPTS:,} prompts × {SAMPLES} samples with {MODEL} on {GPUS} GPUs ({GPU}: "
        f"{BYTES_PER_SECOND / 1e12:.2f} TB/s, {FLOP_PER_SECOND / 1e12:,.0f} TFLOP/s). Prompts of "
        f"{PROMPT_TOKENS} tokens, completions of {COMPLETION_TOKENS}. **Never run.** Computed by "
        "`python benchmarks/cluster_cost.py` from data sheets, assumed efficiencies (its constants) and what",
        "[growth.md](growth.md) and [maths_speed.md](maths_speed.md) measured on a core that ten processes shared: "
        "the seconds of the main process are upper bounds. 2026-11-26.",
        "",
        "| size | |",
        "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in sizes),
        "",
        "| phase | hours | from |",
        "| --- | ---: | --- |",
        *(f"| {p.name} | {p.hours:.2f} | {p.reason} |" for p in phases),
    ]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Read the flags, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "cluster_cost.md")
    write(parser.parse_args().output)


if __name__ == "__main__":
    main()
