"""Idle time of 64 processes that share the sampling of a round: a fixed split against the hand-out.

Two steps. `--measure` samples 24 questions 8 times with SmolLM2-135M-Instruct in the package's sampler,
and writes down the lengths of prompts and completions, and the seconds of decoding steps by the number
of rows in them. The simulation then draws prompts from these, with all their completions, plans their
shards with `rollouts.shards.plan_shards`, and lets each worker take the next shard of
`rollouts.hand_out.take_shards` when it is free. A shard takes the seconds of its steps: rows are refilled as
completions end. "Idle" is the share of the workers' time between the start and the end of the phase in which
they have nothing to do.

    OMP_NUM_THREADS=1 python benchmarks/hand_out.py --measure
    python benchmarks/hand_out.py > benchmarks/results/hand_out.md
"""

import argparse
import heapq
import json
import platform
import random
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

from trl_selfplay.rollouts.hand_out import take_shards
from trl_selfplay.rollouts.shards import Assignment, Shard, plan_shards

DATE = "2026-11-26"
MEASURED = Path(__file__).parent / "results/hand_out/smollm2.json"
NUM_SAMPLES, MOST_TOKENS, BATCH = 8, 192, 48
# The simulated workers decode this many rows together, as a GPU would.
ROWS = 256
PHASES = ((1_000_000, 32, 64), (100_000, 8, 64), (10_000, 8, 8), (1_000, 8, 8), (200, 8, 8))
QUESTIONS = (
    "What is 17 + 25?", "What is 6 times 7? Answer with the number alone.", "Is 91 a prime number? Explain.",
    "A train goes 60 km in 45 minutes. How fast is it in km/h? Think step by step.",
    "Tom has 3 boxes with 12 pens each and gives 7 pens away. How many are left?",
    "Solve x + 5 = 12.", "Solve 2x - 3 = 11 and show each step.", "Name the capital of France.",
    "Name three colours.", "List the planets of the solar system.", "Write a haiku about rain.",
    "Write a short story about a lighthouse keeper.", "Translate 'good morning' into Spanish.",
    "What is the opposite of 'hot'?", "Why is the sky blue?", "Explain photosynthesis to a child.",
    "Write a Python function that reverses a string.", "What does HTTP stand for?",
    "Sort these numbers: 5, 3, 9, 1.", "How many days does a leap year have?", "Say yes or no: is water wet?",
    "Give me a recipe for pancakes.", "Compare cats and dogs as pets.", "What is the square root of 144?",
)  # fmt: skip


def measure() -> None:
    """Sample the questions, and write down lengths and the seconds of each step."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_selfplay.demos.words import load_demo_model_path
    from trl_selfplay.generation.random_streams import stream_key
    from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
    from trl_selfplay.generation.transformers_sampler import TransformersSampler

    folder = load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    sampler = TransformersSampler(model, tokenizer, Accelerator(cpu=True))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    requests = [
        SampleRequest(tuple(ids), stream_key(0, 0, "train", question, index))
        for ids, question in zip(prompts, QUESTIONS, strict=True)
        for index in range(NUM_SAMPLES)
    ]
    steps: list[tuple[int, float]] = []
    last = time.process_time()

    def on_tokens(num_tokens: int) -> None:
        nonlocal last
        now = time.process_time()
        steps.append((num_tokens, now - last))
        last = now

    options = SamplingOptions(MOST_TOKENS, eos_token_ids=(tokenizer.eos_token_id,))
    lengths: list[list[int]] = [[] for _ in QUESTIONS]
    for index, sampled in sampler.sample(requests, options, BATCH, on_tokens):
        lengths[index // NUM_SAMPLES].append(len(sampled.completion_ids))
    MEASURED.parent.mkdir(parents=True, exist_ok=True)
    content = {"prompts": [len(ids) for ids in prompts], "completions": lengths, "steps": steps}
    MEASURED.write_text(json.dumps(content))


def fit_step(steps: list[tuple[int, float]]) -> tuple[float, float]:
    """Return a and b of `seconds = a + b * rows`, by least squares over the decoding steps."""
    rows = [r for r, _ in steps]
    seconds = [s for _, s in steps]
    mean_r, mean_s = sum(rows) / len(rows), sum(seconds) / len(seconds)
    slope = sum((r - mean_r) * (s - mean_s) for r, s in steps) / sum(
        (r - mean_r) ** 2 for r in rows
    )
    return mean_s - slope * mean_r, slope


class Phase:
    """The shards of a phase over prompts drawn from the measured ones, and the seconds of each.

    Args:
        measured: From `measure`.
        num_prompts: Number of prompts.
        num_samples: Completions per prompt, drawn from those of one question.
        num_processes: As `plan_shards` takes it: 1 cuts all shards to the same size.
    """

    def __init__(
        self, measured: dict[str, Any], num_prompts: int, num_samples: int, num_processes: int
    ) -> None:
        draw = random.Random(0)
        self._completions = measured["completions"]
        self._draw, self._num_samples = draw, num_samples
        self._questions = [draw.randrange(len(QUESTIONS)) for _ in range(num_prompts)]
        rows = [SimpleNamespace(prompt_id=f"{i:07d}") for i in range(num_prompts)]
        tokens = [(0,) * length for length in measured["prompts"]]
        indices = tuple(range(num_samples))
        work: Any = [
            Assignment(row, tokens[question], indices)  # type: ignore[arg-type]
            for row, question in zip(rows, self._questions, strict=True)
        ]
        sampler: Any = SimpleNamespace(suggest_batch_size=lambda *lengths: ROWS)
        self.shards = plan_shards(work, MOST_TOKENS, sampler, num_processes=num_processes)
        self._steps = [self._steps_of(shard) for shard in self.shards]

    def seconds(self, step: tuple[float, float]) -> list[float]:
        """Return the seconds of each shard, if a step takes `a + b * rows`."""
        return [step[0] * num_steps + step[1] * tokens for num_steps, tokens in self._steps]

    def _steps_of(self, shard: Shard) -> tuple[int, int]:
        """Return a shard's steps and tokens: a row takes the next completion when its own has ended."""
        lengths = [
            length
            for prompt_id in shard.prompt_ids
            for length in self._draw.choices(
                self._completions[self._questions[int(prompt_id)]], k=self._num_samples
            )
        ]
        ends = sorted(lengths[: shard.batch_size])
        for length in lengths[shard.batch_size :]:
            heapq.heapreplace(ends, ends[0] + length)
        return max(ends), sum(lengths)


def idle_if_split(seconds: list[float], speeds: list[float]) -> tuple[float, float]:
    """Return the idle share and the seconds of the phase if worker n takes every n-th shard."""
    busy = [sum(seconds[n :: len(speeds)]) / speed for n, speed in enumerate(speeds)]
    return 1.0 - sum(busy) / (len(busy) * max(busy)), max(busy)


def idle_if_handed_out(seconds: list[float], speeds: list[float]) -> tuple[float, float]:
    """Return the idle share and the seconds of the phase if each takes the next shard when free."""
    counter: Callable[[], int] = count().__next__
    taking: list[Iterator[int]] = [take_shards(len(seconds), counter) for _ in speeds]
    busy = [0.0] * len(speeds)
    free = [(0.0, worker) for worker in range(len(speeds))]
    while free:
        now, worker = heapq.heappop(free)
        if (number := next(taking[worker], None)) is not None:
            busy[worker] = now + seconds[number] / speeds[worker]
            heapq.heappush(free, (busy[worker], worker))
    return 1.0 - sum(busy) / (len(busy) * max(busy)), max(busy)


def simulate() -> None:
    """Print the table."""
    measured = json.loads(MEASURED.read_text())
    # Steps with few rows are rare and begin with a prompt: those of a full batch and its decline.
    steps = [(rows, seconds) for rows, seconds in measured["steps"] if rows > 0]
    on_cpu = fit_step(steps)
    lengths = [length for lengths in measured["completions"] for length in lengths]
    print(__doc__.split("\n\n")[0] if __doc__ else "")
    print(
        f"\nMeasured: {len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens, mean "
        f"{sum(lengths) / len(lengths):.0f}; means of the questions from "
        f"{min(map(mean, measured['completions'])):.0f} to {max(map(mean, measured['completions'])):.0f}. "
        f"A step takes {1000 * on_cpu[0]:.1f} ms and {1000 * on_cpu[1]:.2f} ms more for each row.\n"
    )
    print(
        "| prompts × samples | workers | seconds of a step | speeds | shards, all alike | fixed split | "
        "hand-out | shards, small at the end | hand-out of those | its time beside the fixed split's |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for num_prompts, num_samples, workers in PHASES:
        alike = Phase(measured, num_prompts, num_samples, 1)
        small = Phase(measured, num_prompts, num_samples, workers)
        for name, step in {"as measured": on_cpu, "the same for any rows": (1.0, 0.0)}.items():
            spread = random.Random(1)
            for speeds_name, speeds in {
                "equal": [1.0] * workers,
                "within 10%": [spread.uniform(0.9, 1.0) for _ in range(workers)],
                "one at half": [0.5, *[1.0] * (workers - 1)],
            }.items():
                fixed, fixed_s = idle_if_split(alike.seconds(step), speeds)
                handed, _ = idle_if_handed_out(alike.seconds(step), speeds)
                best, best_s = idle_if_handed_out(small.seconds(step), speeds)
                print(
                    f"| {num_prompts:,} × {num_samples} | {workers} | {name} | {speeds_name} | "
                    f"{len(alike.shards):,} | {fixed:.1%} | {handed:.1%} | {len(small.shards):,} | "
                    f"{best:.1%} | {best_s / fixed_s:.2f} |"
                )
    print(
        f"\n`python benchmarks/hand_out.py`, {ROWS} rows per batch, seeds 0 and 1. Measured on two shared "
        f"{platform.machine()} cores that were busy with other work, one thread, CPU seconds; torch {version('torch')}, "
        f"transformers {version('transformers')}; {DATE}."
    )


def main() -> None:
    """Read the flags, and measure or simulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        measure()
    else:
        simulate()


if __name__ == "__main__":
    main()
