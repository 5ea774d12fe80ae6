"""Wall time of sampling with a slow grader: graded at the end, shard by shard, or prompt by prompt.

A random decoder of 0.8 M parameters samples 48 prompts 8 times, in three shards. The grader waits for
some milliseconds per completion, as one does that asks a server or other processes. Arms, which take
turns and whose rewards must be equal:

- at the end: all is sampled, then all is graded.
- by shard: the next shard is sampled while one is graded; completions are held back until their
  shard is sampled.
- by prompt: finished prompts are graded while their own shard is still sampled, as the trainers do.

    OMP_NUM_THREADS=1 python benchmarks/grading_overlap.py > benchmarks/results/grading_overlap.md
"""

import argparse
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from trl_selfplay.demos.sums import build_tokenizer
from trl_selfplay.evaluation.progress import SamplingProgress
from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.collection import Collector
from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.shards import BATCHES_PER_SHARD, Assignment

DATE = "2026-11-26"
NUM_PROMPTS, NUM_SAMPLES, NUM_SHARDS, NUM_TOKENS = 48, 8, 3, 48
MILLISECONDS = (0, 2, 5, 10, 20)


class HoldsBack:
    """A sampler that gives a shard's completions all at once."""

    def __init__(self, sampler: TransformersSampler) -> None:
        self.suggest_batch_size = sampler.suggest_batch_size
        self._sampler = sampler

    def sample(self, *arguments: Any) -> Iterator[Any]:
        """Yield the pairs of the sampler, once it has made the last one."""
        yield from list(self._sampler.sample(*arguments))


def build() -> tuple[TransformersSampler, Any, list[Assignment]]:
    """Return a sampler of a random model, its tokenizer, and what to sample."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344,
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    sampler = TransformersSampler(model.eval(), tokenizer)
    batch_size = NUM_PROMPTS * NUM_SAMPLES // NUM_SHARDS // BATCHES_PER_SHARD
    sampler.suggest_batch_size = lambda *_: batch_size  # type: ignore[method-assign]
    prompts = [{"prompt": f"{a}+{a + 7}="} for a in range(100, 100 + NUM_PROMPTS)]
    rows = load_prompt_rows(Dataset.from_list(prompts), "prompts")
    indices = tuple(range(NUM_SAMPLES))
    return (
        sampler,
        tokenizer,
        [Assignment(row, tuple(tokenizer(row.prompt)["input_ids"]), indices) for row in rows],
    )


def run(arm: str, milliseconds: float) -> tuple[float, int, list[Rollout]]:
    """Return the seconds of an arm, how often the grader was called, and the graded samples."""
    sampler, tokenizer, assignments = build()
    calls = []

    def waits(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        time.sleep(milliseconds / 1000 * len(completions))
        return [float(len(c) % 2) for c in completions]

    used: Any = HoldsBack(sampler) if arm == "by shard" else sampler
    collector = Collector(used, Scorer(waits), tokenizer, Accelerator(cpu=True), 0)
    options = SamplingOptions(NUM_TOKENS, temperature=1.0, eos_token_ids=(1,))
    how: dict[str, Any] = {
        "round_index": 0,
        "phase": "train",
        "progress": SamplingProgress(
            NUM_PROMPTS * NUM_SAMPLES, arm, options.max_completion_length, disable=True
        ),
    }
    started = time.monotonic()
    if arm == "at the end":
        sampled = replace(collector, scorer=None).collect(assignments, options, **how)
        rollouts = collector.grade(sampled, {a.row.prompt_id: a.row for a in assignments})
    else:
        rollouts = collector.collect(assignments, options, **how)
    return time.monotonic() - started, len(calls), rollouts


def main() -> None:
    """Measure all arms in turns, and print a Markdown page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    arms = ("at the end", "by shard", "by prompt")
    run(arms[-1], 0)  # warm up
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"""# Grading while sampling

{NUM_PROMPTS} prompts × {NUM_SAMPLES} samples of up to {NUM_TOKENS} tokens in {NUM_SHARDS} shards, a random
decoder of 0.8 M parameters, a grader that waits for some milliseconds per completion; medians of
{args.repeats} turns with the range, in seconds, and the median number of calls of the grader. Rewards were equal
in all arms. Two shared {platform.machine()} cores that were busy with other work, one thread; {versions}; seed 0; {DATE}.
Script: `benchmarks/grading_overlap.py`.

| ms per completion | grading alone | {" | ".join(arms)} | calls by prompt |
|---|---|{"---|" * len(arms)}---|""")
    for milliseconds in MILLISECONDS:
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        calls = []
        for _ in range(args.repeats):
            found = []
            for arm in arms:
                seconds, count, rollouts = run(arm, milliseconds)
                times[arm].append(seconds)
                found.append(rollouts)
            calls.append(count)
            if not found[0] == found[1] == found[2]:
                raise RuntimeError("the arms differ in their samples or rewards")
        cells = [f"{median(t):.1f} [{min(t):.1f}, {max(t):.1f}]" for t in times.values()]
        grading = milliseconds / 1000 * NUM_PROMPTS * NUM_SAMPLES
        print(f"| {milliseconds} | {grading:.1f} | {' | '.join(cells)} | {median(calls):.0f} |")


if __name__ == "__main__":
    main()
