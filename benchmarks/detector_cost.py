"""What the detectors of collapse cost: log-probs while sampling, and summarizing a round's samples.

- Sampling: a decoder with the sizes of SmolLM2-135M and random weights continues 16 prompts by 16 tokens, with
  and without log-probs, alternating. CPU seconds, medians.
- Summarizing: 2,000 completions of 200 tokens, of which half are kept. CPU microseconds per completion: all of
  it; without final answers, of which a round reads at most 4,000; the repetition of kept ones alone.

    OMP_NUM_THREADS=1 python benchmarks/detector_cost.py
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_selfplay.evaluation.diversity import summarize_samples
from trl_selfplay.evaluation.repetition import is_repetitive
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.rewards.vote import answer_form
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.selection import default_normal_form

DATE = "2026-11-26"
NUM_PROMPTS, NUM_TOKENS, NUM_TIMES = 16, 16, 5
WORDS = "the of and to in is that we have so number total apples each times 3 4 12 48 = + costs then add"


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def sampling_cost() -> dict[str, float]:
    """Return CPU seconds of sampling with and without log-probs."""
    vocabulary = {f"w{i}": i for i in range(49152)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )
    )  # fmt: skip
    sampler = TransformersSampler(model, tokenizer)
    rng = random.Random(0)
    requests = [
        SampleRequest(tuple(rng.randrange(2, 49152) for _ in range(16)), i)
        for i in range(NUM_PROMPTS)
    ]
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(NUM_TIMES + 1):
        for with_log_probs, seconds in found.items():
            options = SamplingOptions(NUM_TOKENS, return_logprobs=with_log_probs)
            seconds.append(
                cpu_seconds(lambda how=options: list(sampler.sample(requests, how, NUM_PROMPTS)))
            )
    return {
        "without log-probs, s": median(found[False][1:]),
        "with log-probs, s": median(found[True][1:]),
    }


def summarizing_cost() -> dict[str, float]:
    """Return CPU microseconds per completion of reading a round's samples."""
    rng = random.Random(0)
    rollouts = [
        Rollout(
            0, "train", f"{prompt:032x}", sample, (1,) * 50,
            tuple(rng.randrange(50_000) for _ in range(200)), "",
            f"{' '.join(rng.choices(WORDS.split(), k=150))}. So the answer is {rng.randrange(5)}.",
            "eos", logprob=-50.0, reward=float(sample % 2), rewards=(float(sample % 2),),
        )
        for prompt in range(250)
        for sample in range(8)
    ]  # fmt: skip
    outcomes = ["kept" if rollout.reward else "failed" for rollout in rollouts]

    def summarize(reads_answers: bool) -> None:
        form = answer_form if reads_answers else None
        summarize_samples(rollouts, default_normal_form, 1.0, form, outcomes)

    calls: dict[str, Callable[[], object]] = {
        "all, µs": lambda: summarize(True),
        "without answers, µs": lambda: summarize(False),
        "repetition, µs": lambda: [is_repetitive(r.completion_ids, r.completion) for r in rollouts],
    }
    return {
        name: median(cpu_seconds(call) for _ in range(NUM_TIMES)) / len(rollouts) * 1e6
        for name, call in calls.items()
    }


def main() -> None:
    """Measure, and write the numbers down."""
    parser = argparse.ArgumentParser(description=__doc__)
    path = Path(__file__).parent / "results" / "detector_cost.md"
    parser.add_argument("--results", type=Path, default=path)
    args = parser.parse_args()
    found = {**sampling_cost(), **summarizing_cost()}
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "torch"))
    lines = [
        "# What the detectors of collapse cost",
        "",
        f"Two shared {platform.machine()} cores, one thread; {versions}; {DATE}. Script: "
        "`benchmarks/detector_cost.py`, which explains the rows.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value:.3g} |" for name, value in found.items()),
    ]
    args.results.write_text("\n".join(lines) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
