"""Sampling from a small model on a GPU: with and without CUDA graphs, `generate` and `generate_batch`.

A 0.5B model of random weights in 16 bits, in nf4 with adapters, and in float32. Prompts of 192 tokens,
128 of which all share, 8 samples of 32 tokens each. Results are written after every case, within a
minute on a data-centre card:

    python benchmarks/decoding.py
    python benchmarks/decoding.py --device cpu      # toy sizes; nothing is captured or written

Every way is run once to warm up and once to be timed. `generate` draws from one global stream, and transformers'
continuous batching (`generate_batch`) from one for whatever rows its scheduler has put together.
Neither can give each sample a stream of its own, so their samples depend on the batch.
"""

import argparse
import datetime
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_parts import models
from gpu_parts.measuring import GB, clean_up, read_peak, restart_peak, wait_for
from peft import get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from trl_selfplay.generation import token_filters
from trl_selfplay.generation.decode_batch import TokenChooser
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.static_decoding import StaticDecoder
from trl_selfplay.generation.transformers_sampler import TransformersSampler

RESULTS = Path(__file__).parent / "results" / "decoding.md"
SHARED, REST, LENGTH, NUM_SAMPLES = 128, 64, 32, 8

Completions = list[tuple[int, ...]]


@dataclass
class Case:
    """One model and batch size.

    Attributes:
        model: As in the table.
        batch: Sequences that are decoded together.
        rates: Tokens per second by way of sampling, or why there are none.
        peaks: Bytes by way of sampling.
        capture_seconds: What the first run through graphs took longer than the next.
        differing: Share of tokens that graphs choose differently.
    """

    model: str
    batch: int
    rates: dict[str, float | str] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    capture_seconds: float = 0.0
    differing: float = 0.0


def build_requests(vocab_size: int, batch: int) -> list[SampleRequest]:
    """Return `batch` requests, 8 samples per prompt; all prompts begin with the same tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocab_size, (length,), generator=generator).tolist())

    shared = draw(SHARED)
    prompts = [shared + draw(REST) for _ in range(-(-batch // NUM_SAMPLES))]
    return [SampleRequest(prompts[i // NUM_SAMPLES], i) for i in range(batch)]


def sample(sampler: TransformersSampler, requests: Sequence[SampleRequest]) -> Completions:
    """Sample with this package's sampler."""
    done = dict(sampler.sample(requests, SamplingOptions(LENGTH), len(requests)))
    return [done[i].completion_ids for i in range(len(requests))]


@torch.no_grad()
def generate(model: Any, requests: Sequence[SampleRequest], length: int = LENGTH) -> Completions:
    """Sample with `generate`."""
    ids = torch.tensor([r.prompt_ids for r in requests], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
        temperature=1.0, min_new_tokens=length, max_new_tokens=length, pad_token_id=models.PAD,
    )  # fmt: skip
    return [tuple(row) for row in out[:, ids.shape[1] :].tolist()]


@torch.no_grad()
def generate_batch(model: Any, requests: Sequence[SampleRequest]) -> Completions:
    """Sample with transformers' continuous batching."""
    found = model.generate_batch(
        inputs=[list(r.prompt_ids) for r in requests],
        generation_config=GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=LENGTH,
            eos_token_id=-1, pad_token_id=models.PAD,
        ),
        continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.2, seed=0),
    )  # fmt: skip
    return [tuple(output.generated_tokens) for output in found.values()]


def differing(first: Completions, second: Completions) -> float:
    """Return the share of tokens that differ when they are chosen after equal ones.

    Where two completions part, what follows has other tokens before it and isn't counted.
    """
    chosen = parted = 0
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            chosen += 1
            if a != b:
                parted += 1
                break
    return parted / chosen


def timed(
    case: Case, way: str, device: str, run: Callable[[], Completions]
) -> tuple[float, Completions]:
    """Run a way of sampling once and note its speed and memory; return seconds and what it gave."""
    clean_up(device)
    restart_peak(device)
    started = time.perf_counter()
    found = run()  # lists: the device has finished
    seconds = time.perf_counter() - started
    case.rates[way] = sum(map(len, found)) / seconds
    case.peaks[way] = read_peak(device)["allocated"]
    return seconds, found


def measure(case: Case, model: Any, device: str) -> None:
    """Time the sampler without and with graphs, and `generate`."""
    requests = build_requests(model.config.vocab_size, case.batch)
    tokenizer = models.build_tokenizer(model.config.vocab_size)
    found: dict[str, Completions] = {}
    for way in ("eager", "graphs"):
        sampler = TransformersSampler(model, tokenizer, cuda_graphs=way == "graphs")
        if device == "cpu" and way == "graphs":
            sampler._static = StaticDecoder("cpu")
        first, _ = timed(case, way, device, lambda s=sampler: sample(s, requests))
        seconds, found[way] = timed(case, way, device, lambda s=sampler: sample(s, requests))
        static = sampler._static
        if static is not None:
            case.capture_seconds = max(0.0, first - seconds)
            if static._obstacle is not None or static._buffers is None:
                case.rates[way] = f"not captured: {static._obstacle}"
        sampler.release()
    case.differing = differing(found["eager"], found["graphs"])
    generate(model, requests, 2)
    timed(case, "generate", device, lambda: generate(model, requests))


def measure_continuous(case: Case, model: Any, device: str) -> None:
    """Time `generate_batch`, whose setting-up is a part of it."""
    requests = build_requests(model.config.vocab_size, case.batch)
    for _ in range(2):
        timed(case, "generate_batch", device, lambda: generate_batch(model, requests))


def measure_choosing(device: str, batch: int) -> str:
    """Return what the choice of one token per row takes beside the model, by the options."""
    vocab_size = models.CONFIGS["0.5B"].vocab_size
    scale = 4.0  # so that a few tokens have most of the mass
    logits = torch.randn((batch, vocab_size), device=device) * scale
    keys, steps = list(range(batch)), [0] * batch

    def milliseconds(**changes: Any) -> float:
        chooser = TokenChooser(SamplingOptions(1, **changes), range(vocab_size))
        for count in (2, 10):
            wait_for(device)
            started = time.perf_counter()
            for _ in range(count):
                chooser.choose(logits.clone(), keys, steps, None)
            wait_for(device)
        return (time.perf_counter() - started) * 100

    guess, found = token_filters._TOP_P_FIRST_GUESS_ON_DEVICE, []
    for name, changes, first in (
        ("without filters", {}, guess),
        ("top-k 40", {"top_k": 40}, guess),
        ("top-p .9", {"top_p": 0.9}, guess),
        ("top-p .9 by sorting all", {"top_p": 0.9}, vocab_size),
    ):
        token_filters._TOP_P_FIRST_GUESS_ON_DEVICE = first
        found.append(f"{name} {milliseconds(**changes):.2f}")
    token_filters._TOP_P_FIRST_GUESS_ON_DEVICE = guess
    return f"Milliseconds to choose tokens of {batch} rows of logits: {', '.join(found)}."


def attempt(case: Case, way: str, run: Callable[[], Any]) -> None:
    """Run something; note why it failed, and go on."""
    try:
        run()
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        case.rates[way] = f"{type(error).__name__}: {str(error)[:80]}".replace("\n", " ")


def attempt_text(run: Callable[[], str]) -> str:
    """Return what something says, or its error."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        return f"{type(error).__name__}: {str(error)[:200]}"


def check_failing_capture(device: str) -> str:
    """Let a capture fail; return what the device still does afterwards."""
    model = models.build_model("toy", device)
    tokenizer = models.build_tokenizer(model.config.vocab_size)
    requests = build_requests(model.config.vocab_size, 8)
    expected = sample(TransformersSampler(model, tokenizer, cuda_graphs=False), requests)
    hook = model.model.layers[1].register_forward_hook(
        lambda m, a, out: out.sum().item() * 0 or None
    )
    sampler = TransformersSampler(model, tokenizer)
    parted = differing(sample(sampler, requests), expected)
    obstacle = sampler._static._obstacle if sampler._static is not None else None
    hook.remove()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.randn(4, device=device).bernoulli_(0.5)
        torch.ones(4).pin_memory()
    sampler.release()
    again = differing(sample(sampler, requests), expected)
    return (
        f"A capture that fails ({obstacle}): {parted:.2%} of tokens differ; memory is given back and "
        f"random numbers are drawn afterwards; without the fault, {again:.2%} differ."
    )


def render(cases: Sequence[Case], device: str, last: str) -> str:
    """Return the results as Markdown."""
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU, toy sizes"
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "bitsandbytes"))
    lines = [
        "# Sampling from a small model on a GPU", "",
        f"{name}; {versions}; seed 0; {datetime.date.today().isoformat()}. Script: "
        "`benchmarks/decoding.py`. Tokens per second of one run, prompts included: the size of "
        f"Qwen2.5-0.5B with random weights, 8 samples of {LENGTH} tokens of each prompt of "
        f"{SHARED + REST} tokens, {SHARED} of which all share. GB are 10^9 bytes, peaks of tensors. "
        "Differing: share of tokens that graphs choose otherwise than the eager sampler after equal "
        "tokens.", "",
        "| model | batch | eager | graphs | times | `generate` | `generate_batch` | GB eager | "
        "GB graphs | capturing, s | differing |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case in cases:
        eager, graphs = case.rates.get("eager"), case.rates.get("graphs")
        both = isinstance(eager, float) and isinstance(graphs, float)
        cells = [
            case.model, str(case.batch), *(shown(case.rates.get(w)) for w in ("eager", "graphs")),
            f"{graphs / eager:.1f}" if both else "",
            *(shown(case.rates.get(w)) for w in ("generate", "generate_batch")),
            *(f"{case.peaks.get(w, 0) / GB:.2f}" for w in ("eager", "graphs")),
            f"{case.capture_seconds:.2f}", f"{case.differing:.2%}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", last]).rstrip() + "\n"


def shown(rate: float | str | None) -> str:
    """Return a cell of the table."""
    return "not measured" if rate is None else f"{rate:,.0f}" if isinstance(rate, float) else rate


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no case after these")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    device, size = args.device, "0.5B" if args.device == "cuda" else "toy"
    batches = (8, 32, 128) if device == "cuda" else (2, 4)
    started, cases, last = time.perf_counter(), list[Case](), ""

    def show() -> None:
        text = render(cases, device, last)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        print(f"[{time.perf_counter() - started:.1f} s] {rows[-1]} {last}", flush=True)
        if device == "cuda":
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(text)

    def build(precision: str) -> Any:
        model = models.build_model(size, device, is_quantized=precision == "nf4, LoRA")
        if precision == "nf4, LoRA":
            return get_peft_model(model, models.lora()).eval()
        return model.float() if precision == "float32" else model

    for precision, chosen in (("16-bit", batches), ("nf4, LoRA", batches[:2]), ("float32", (32,))):
        model = build(precision)
        first = len(cases)
        for batch in chosen:
            if time.perf_counter() - started > args.seconds:
                break
            cases.append(Case(precision, batch))
            attempt(cases[-1], "graphs", lambda m=model: measure(cases[-1], m, device))
            show()
        if precision == "16-bit":  # last with a model, whose attention it may replace
            for case in cases[first + 1 :]:
                attempt(
                    case, "generate_batch", lambda c=case, m=model: measure_continuous(c, m, device)
                )
            show()
            last = attempt_text(lambda: measure_choosing(device, batches[-1]))
            show()
            last += "\n\n" + attempt_text(lambda: check_failing_capture(device))
            show()
        del model
        clean_up(device)


if __name__ == "__main__":
    main()
