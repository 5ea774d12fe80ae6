"""A sampling phase in a vLLM engine of its own against the same phase in process: where does it pay?

The model is the demo's, the prompts are the demo's without examples, four samples each, and every
completion has the same length, so that both sides make the same number of tokens. A phase of vLLM
is what a trainer sees: the engine starts, samples, and is gone. In process, sampling begins at once.
The arms alternate in one run. `--adapter` gives the model a LoRA adapter, as in most runs.

    python benchmarks/vllm_phase.py --vllm-python /path/to/venv/bin/python --samples 100 1000

Prints a table for results/vllm_phase.md. What a larger phase would take is computed from the start
and from the seconds per sample of the largest phase, and marked so.
"""

import argparse
import datetime
import logging
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_selfplay.demos.words import demo_split, load_demo_model_path
from trl_selfplay.generation.engine import EngineSettings, EngineWeights
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.sampler import SampledCompletion, SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.generation.vllm_sampler import VLLMSampler

SAMPLES_PER_PROMPT = 4
EXTRAPOLATED = (100, 1_000, 5_000)
RANK = 16


def build_requests(tokenizer: Any, count: int) -> list[SampleRequest]:
    """Return requests for the demo's prompts, the first ones again where they don't suffice."""
    split = demo_split()
    texts = [row["prompt"] for part in (split.train, split.report) for row in part]
    prompts = [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
        for text in texts
    ]
    numbers = range(count)
    return [SampleRequest(prompts[i // SAMPLES_PER_PROMPT % len(prompts)], i) for i in numbers]


def build_samplers(arguments: Any, folder: Path) -> tuple[VLLMSampler, TransformersSampler, Any]:
    """Return both samplers over the same weights in float32, and the tokenizer."""
    source = load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    adapter = None
    if arguments.adapter:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
        adapter = folder / "adapter"
        model.save_pretrained(adapter)
    settings = EngineSettings(python=arguments.vllm_python, dtype="float32")
    weights = EngineWeights(str(source), adapter, RANK if adapter else 0, 0)
    engine = VLLMSampler(settings, lambda: weights, tokenizer, describe_model(model))
    return engine, TransformersSampler(model, tokenizer), tokenizer


def time_phase(sampler: Any, requests: list[SampleRequest], length: int) -> dict[str, float]:
    """Sample a phase; return the seconds of the start, of sampling and of all with the end."""
    options = SamplingOptions(length)  # nothing ends a completion but its length
    batch_size = sampler.suggest_batch_size(max(len(r.prompt_ids) for r in requests), length)
    began = time.monotonic()
    if isinstance(sampler, VLLMSampler):
        list(sampler.sample(requests[:1], SamplingOptions(1), 1))
    started = time.monotonic()
    completions = list(sampler.sample(requests, options, batch_size))
    sampled = time.monotonic()
    assert sum(len(c.completion_ids) for _, c in completions) == length * len(requests)
    sampler.release()
    ended = time.monotonic()
    return {"start": started - began, "sampled": sampled - started, "all": ended - began}


def largest_gap(engine: VLLMSampler, own: TransformersSampler, requests: Any) -> tuple[float, int]:
    """Compare greedy completions: the largest gap of log-prob sums, and how many are the same."""
    options = SamplingOptions(16, temperature=0.0, return_logprobs=True)
    theirs: dict[int, SampledCompletion] = dict(engine.sample(requests, options, 8))
    ours = dict(own.sample(requests, options, 8))
    same = [i for i in ours if ours[i].completion_ids == theirs[i].completion_ids]
    gaps = [abs(float(ours[i].logprob or 0) - float(theirs[i].logprob or 0)) for i in same]
    return max(gaps, default=float("nan")), len(same)


def main() -> None:
    """Measure the phases that are asked for, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vllm-python", default=os.environ.get("TRL_SELFPLAY_VLLM_PYTHON"))
    parser.add_argument("--samples", type=int, nargs="+", default=[100])
    parser.add_argument("--length", type=int, default=32, help="tokens per completion")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--adapter", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        engine, own, tokenizer = build_samplers(arguments, Path(folder))
        gap, num_same = largest_gap(engine, own, build_requests(tokenizer, 32)[::4])
        engine.release()
        measured: dict[int, dict[str, list[dict[str, float]]]] = {}
        for count in arguments.samples:
            requests = build_requests(tokenizer, count)
            measured[count] = {"engine": [], "own": []}
            for _ in range(arguments.repeats):
                measured[count]["engine"].append(time_phase(engine, requests, arguments.length))
                measured[count]["own"].append(time_phase(own, requests, arguments.length))
                print(count, {k: v[-1] for k, v in measured[count].items()}, flush=True)
    print_table(arguments, measured, engine.engine_record, gap, num_same)


def print_table(arguments: Any, measured: Any, record: Any, gap: float, num_same: int) -> None:
    """Print what was measured, and what follows for other sizes."""
    print(
        f"\n{datetime.date.today()}; {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {version('transformers')}; {record}; adapter: {arguments.adapter}; "
        f"{arguments.length} tokens a completion; medians of {arguments.repeats}."
    )
    print(f"Greedy: {num_same} of 8 completions the same, log-prob sums within {gap:.1e}.\n")
    print(
        "| samples | engine: start, s | sampling, s | samples/s | whole phase, s | in process, s | samples/s |"
    )
    print("|---|---|---|---|---|---|---|")
    for count, arms in measured.items():
        start, sampled, all_s = (
            median(x[k] for x in arms["engine"]) for k in ("start", "sampled", "all")
        )
        own = median(x["all"] for x in arms["own"])
        print(
            f"| {count} | {start:.0f} | {sampled:.0f} | {count / sampled:.2f} | {all_s:.0f} | "
            f"{own:.0f} | {count / own:.2f} |"
        )
    count = max(measured)
    arms = measured[count]
    around = median(x["all"] - x["sampled"] for x in arms["engine"])
    per_sample = median(x["sampled"] for x in arms["engine"]) / count
    own_per_sample = median(x["all"] for x in arms["own"]) / count
    for other in EXTRAPOLATED:
        if other not in measured:
            print(
                f"| {other} (computed) | {around:.0f} | {other * per_sample:.0f} | | "
                f"{around + other * per_sample:.0f} | {other * own_per_sample:.0f} | |"
            )
    saved = own_per_sample - per_sample
    if saved > 0:
        print(f"\nStarting an engine pays from {around / saved:.0f} samples on.")
    else:
        print("\nStarting an engine pays at no size here: it samples no faster than in process.")


if __name__ == "__main__":
    main()
