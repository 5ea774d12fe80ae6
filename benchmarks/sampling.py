"""Tokens per second of the in-process sampler against `generate`, and against the machine's limits.

The model is the demo's. Both sides sample the same prompts the same number of times at temperature
1, and every completion has a length fixed beforehand, so both produce the same number of tokens.
`generate` gets prompts sorted by length, `num_return_sequences` samples each, and the best of three
batch sizes, found in a first pass. Ours has the batch size that it would choose itself. The arms
alternate in one process. Finished shapes are in results/sampling/ and are not measured again:

    OMP_NUM_THREADS=1 python benchmarks/sampling.py --repeats 3

Shapes: the demo's 4-shot prompts with 8 samples each; the same without examples; ragged completions
(log-normal, mean 48, at most 256 tokens); one sample a prompt.
"""

import argparse
import datetime
import json
import math
import platform
import random
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from trl_selfplay.demos.words import demo_split, load_demo_model_path
from trl_selfplay.generation import cpu_linear, transformers_sampler
from trl_selfplay.generation.decode_batch import TokenChooser
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.rollouts.rendering import PromptFormatter, load_few_shot_examples

RESULTS = Path(__file__).parent / "results" / "sampling"
# Prompts, samples a prompt, few-shot examples shown, ragged completions.
SHAPES = {
    "4-shot, K = 8": (8, 8, True, False),
    "0-shot, K = 8": (8, 8, False, False),
    "0-shot, K = 8, ragged": (8, 8, False, True),
    "4-shot, K = 1": (24, 1, True, False),
    "0-shot, K = 1": (32, 1, False, False),
}
GENERATE_BATCHES = (8, 32, 64)
FIXED_LENGTH, MEAN_LENGTH, MOST_LENGTH = 32, 48, 256


class EndsWhereTold(TokenChooser):
    """Chooses as always, and then ends each completion at the length set for its stream key."""

    lengths: dict[int, int]
    eos: int

    def choose(self, logits: Any, keys: Any, steps: Any, seen: Any) -> Any:
        """Return tokens (B,), EOS exactly where a completion shall end."""
        logits[:, self.eos] = -torch.inf
        tokens, logprobs = super().choose(logits, keys, steps, seen)
        ends = [step + 1 >= self.lengths[key] for key, step in zip(keys, steps, strict=True)]
        return tokens.masked_fill(torch.tensor(ends), self.eos), logprobs


class EndRowsWhereTold(LogitsProcessor):
    """The same for `generate`: row i ends at its length."""

    def __init__(self, lengths: list[int], prompt_length: int, eos: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.prompt_length = prompt_length
        self.eos = eos

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Let nothing but EOS through where a row ends, and no EOS elsewhere."""
        ends = input_ids.shape[1] - self.prompt_length + 1 >= self.lengths
        scores[:, self.eos] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, self.eos] = 0.0
        return scores


def draw_lengths(count: int, ragged: bool) -> list[int]:
    """Return completion lengths: fixed, or log-normal with the given mean and maximum."""
    if not ragged:
        return [FIXED_LENGTH] * count
    generator, sigma = random.Random(0), 0.8
    mu = math.log(MEAN_LENGTH) - sigma**2 / 2
    drawn = [generator.lognormvariate(mu, sigma) for _ in range(count)]
    return [min(MOST_LENGTH, max(1, round(length))) for length in drawn]


def sample_ours(
    model: Any,
    tokenizer: Any,
    prompts: list[tuple[int, ...]],
    lengths: list[list[int]],
    with_onednn: bool = True,
) -> int:
    """Sample with our sampler, with oneDNN where it chooses that; return the number of tokens."""
    requests, EndsWhereTold.lengths = [], {}
    for i, (prompt, row) in enumerate(zip(prompts, lengths, strict=True)):
        for k, length in enumerate(row):
            key = i * 1000 + k
            EndsWhereTold.lengths[key] = length
            requests.append(SampleRequest(prompt, key))
    EndsWhereTold.eos = tokenizer.eos_token_id
    options = SamplingOptions(MOST_LENGTH, temperature=1.0, eos_token_ids=(tokenizer.eos_token_id,))
    plain, transformers_sampler.TokenChooser = transformers_sampler.TokenChooser, EndsWhereTold
    chosen = cpu_linear.is_onednn_faster
    if not with_onednn:
        cpu_linear.is_onednn_faster = lambda: False
    try:
        sampler = TransformersSampler(model, tokenizer)
        batch_size = sampler.suggest_batch_size(max(map(len, prompts)), max(map(max, lengths)))
        return sum(len(c.completion_ids) for _, c in sampler.sample(requests, options, batch_size))
    finally:
        transformers_sampler.TokenChooser = plain
        cpu_linear.is_onednn_faster = chosen


@torch.no_grad()
def sample_by_generate(
    model: Any,
    tokenizer: Any,
    prompts: list[tuple[int, ...]],
    lengths: list[list[int]],
    num_sequences: int,
) -> int:
    """Sample with `generate` in batches of `num_sequences`; return the number of tokens."""
    num_samples, total = len(lengths[0]), 0
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = max(1, num_sequences // num_samples)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        width = max(len(prompts[i]) for i in chosen)
        pads = [width - len(prompts[i]) for i in chosen]
        eos = tokenizer.eos_token_id
        ids = torch.tensor(
            [[eos] * pad + list(prompts[i]) for pad, i in zip(pads, chosen, strict=True)]
        )
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        told = [length for i in chosen for length in lengths[i]]
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
            num_return_sequences=num_samples, max_new_tokens=max(told), pad_token_id=eos,
            logits_processor=[EndRowsWhereTold(told, width, eos)],
        )  # fmt: skip
        assert out.shape[1] - width == max(told)
        total += sum(told)
    return total


def timed(run: Callable[[], int]) -> float:
    """Return tokens per second of one run."""
    started = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - started)


def machine_limits() -> dict[str, float]:
    """Measure float32 matrix products (GFLOP/s) and reading of memory (GB/s)."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    big = torch.randn(64 * 2**20)  # 256 MiB, beyond every cache
    products, reads = [], []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        products.append(2 * 1536**3 / (time.perf_counter() - started) / 1e9)
        started = time.perf_counter()
        big.sum()
        reads.append(big.numel() * 4 / (time.perf_counter() - started) / 1e9)
    return {"gflops": max(products), "gbytes": max(reads)}


@torch.no_grad()
def share_of_limits(model: Any, tokenizer: Any, limits: dict[str, float]) -> dict[str, Any]:
    """Return the share of the roofline that prefill and decoding at batch 32 and 64 reach."""
    num_weights = sum(p.numel() for p in model.parameters())
    ids = torch.randint(100, 1000, (8, 192))
    model(input_ids=ids, logits_to_keep=1)
    started = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1)
    flops = 2 * num_weights * ids.numel() / (time.perf_counter() - started)
    shares: dict[str, Any] = {"prefill": flops / 1e9 / limits["gflops"]}
    for batch in (32, 64):
        prompts = [tuple(range(100 + i, 130 + i)) for i in range(batch)]
        lengths = [[FIXED_LENGTH]] * batch
        sample_ours(model, tokenizer, prompts, [[2]] * batch)
        rate = median(
            timed(lambda p=prompts, n=lengths: sample_ours(model, tokenizer, p, n))
            for _ in range(3)
        )
        # A step reads every weight once and does two operations with each for each row.
        least = max(
            2 * num_weights * batch / (limits["gflops"] * 1e9),
            4 * num_weights / (limits["gbytes"] * 1e9),
        )
        shares[f"decode, B = {batch}"] = rate * least / batch
        shares[f"tokens/s, B = {batch}"] = rate
    return shares


def share_of_differing_tokens(model: Any, tokenizer: Any, prompts: list[tuple[int, ...]]) -> float:
    """Sample the same requests alone and 64 at a time; return the share of tokens that differ.

    Tokens after the first difference of a completion follow from it and count as well.
    """
    requests = [SampleRequest(p, i * 1000 + k) for i, p in enumerate(prompts) for k in range(4)]
    options = SamplingOptions(FIXED_LENGTH, temperature=1.0)
    sampler = TransformersSampler(model, tokenizer)
    alone, together = (dict(sampler.sample(requests, options, size)) for size in (1, 64))
    pairs = [
        (a, b)
        for i in alone
        for a, b in zip(alone[i].completion_ids, together[i].completion_ids, strict=True)
    ]
    return sum(a != b for a, b in pairs) / len(pairs)


def where_time_goes(model: Any, tokenizer: Any) -> list[tuple[str, float]]:
    """Return the operations with the most time of their own while decoding at batch 64."""
    prompts = [tuple(range(100 + i, 130 + i)) for i in range(64)]
    with torch.profiler.profile() as profiler:
        sample_ours(model, tokenizer, prompts, [[FIXED_LENGTH]] * 64)
    events = profiler.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    events = sorted(events, key=lambda e: -e.self_cpu_time_total)[:8]
    return [(e.key, e.self_cpu_time_total / total) for e in events]


def main() -> None:
    """Measure every shape in alternation and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    path = load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    split = demo_split(0)
    rows = load_prompt_rows(split.train, "train")
    formatter = PromptFormatter(tokenizer, load_few_shot_examples(split.few_shot, False))
    for name, shape in SHAPES.items():
        keep(
            name,
            lambda shape=shape: measure_shape(
                model, tokenizer, formatter, rows, shape, args.repeats
            ),
        )
    limits = keep("limits", machine_limits)
    keep("shares", lambda: share_of_limits(model, tokenizer, limits))
    prompts = [formatter.token_ids(row, few_shot=True) for row in rows[:8]]
    keep("differing", lambda: share_of_differing_tokens(model, tokenizer, prompts))
    keep("profile", lambda: where_time_goes(model, tokenizer))
    write_summary(args.repeats)


def path_of(name: str) -> Path:
    """Return where a measurement is kept."""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"


def keep(name: str, measure: Callable[[], Any]) -> Any:
    """Return a measurement from its file; measure and write it first if it isn't there."""
    path = path_of(name)
    if not path.exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measure(), indent=1))
    found = json.loads(path.read_text())
    print(name, found, flush=True)
    return found


def measure_shape(
    model: Any,
    tokenizer: Any,
    formatter: PromptFormatter,
    rows: list[Any],
    shape: tuple[int, int, bool, bool],
    repeats: int,
) -> dict[str, list[float]]:
    """Return tokens per second of ours and of `generate` at its best batch, `repeats` runs each.

    The first pass runs every batch size of `generate` once; the best goes on.
    """
    num_prompts, num_samples, few_shot, ragged = shape
    prompts = [formatter.token_ids(row, few_shot=few_shot) for row in rows[:num_prompts]]
    flat = draw_lengths(num_prompts * num_samples, ragged)
    lengths = [flat[i * num_samples : (i + 1) * num_samples] for i in range(num_prompts)]
    rates: dict[str, list[float]] = {"ours": [], "ours-mkl": []}
    for size in GENERATE_BATCHES:
        if size < 2 * num_prompts * num_samples:  # beyond, all go in one batch as before
            rates[f"generate-{size}"] = [
                timed(lambda s=size: sample_by_generate(model, tokenizer, prompts, lengths, s))
            ]
    best = max((arm for arm in rates if arm[:4] != "ours"), key=lambda arm: rates[arm][0])
    size = int(best.removeprefix("generate-"))
    for repeat in range(repeats):
        rates["ours"].append(timed(lambda: sample_ours(model, tokenizer, prompts, lengths)))
        rates["ours-mkl"].append(
            timed(lambda: sample_ours(model, tokenizer, prompts, lengths, with_onednn=False))
        )
        if repeat > 0:
            rates[best].append(
                timed(lambda: sample_by_generate(model, tokenizer, prompts, lengths, size))
            )
    return rates


def write_summary(repeats: int) -> None:
    """Write results/sampling.md from what results/sampling/ holds."""
    names = (*SHAPES, "limits", "shares", "differing", "profile")
    record = {n: json.loads(path_of(n).read_text()) for n in names if path_of(n).exists()}
    versions = ", ".join(f"{n} {version(n)}" for n in ("transformers", "torch"))
    lines = [
        "# The sampler against `generate`",
        "",
        f"SmolLM2-135M-Instruct, float32, {torch.get_num_threads()} threads. {platform.machine()}, "
        f"{platform.system()}; {versions}; seed 0; {datetime.date.today().isoformat()}. Script: "
        f"`benchmarks/sampling.py`. Tokens per second: median [minimum, maximum] of {repeats} "
        "alternating runs. `generate` has its best of batches of 8, 32 and 64 sequences, each tried once.",
        "",
        "Linear layers of ours go through oneDNN on this CPU, an AMD EPYC with AVX-512, and through "
        "torch's default, MKL, in the third column and in `generate`. On a CPU of Intel's, the third "
        "column is ours.",
        "",
        "| shape | ours | ours, MKL | `generate` | times | times, MKL |",
        "|---|---|---|---|---|---|",
    ]
    for name, (num_prompts, num_samples, *_) in SHAPES.items():
        rates = record.get(name)
        if rates is None:
            lines.append(f"| {name}, {num_prompts * num_samples} rows | not measured | | | | |")
            continue
        generates = [arm for arm in rates if arm[:4] != "ours"]
        best = max(generates, key=lambda a: (len(rates[a]), rates[a][0]))
        arms = [rates[arm] for arm in ("ours", "ours-mkl", best)]
        cells = " | ".join(f"{median(r):.1f} [{min(r):.1f}, {max(r):.1f}]" for r in arms)
        ratios = " | ".join(f"{median(r) / median(rates[best]):.2f}" for r in arms[:2])
        lines.append(
            f"| {name}, {num_prompts * num_samples} rows | {cells} (batch {best[9:]}) | {ratios} |"
        )
    if "limits" in record and "shares" in record:
        limits, shares = record["limits"], record["shares"]
        lines += [
            "",
            f"Limits measured beside it: {limits['gflops']:.0f} GFLOP/s in a float32 matrix product, "
            f"{limits['gbytes']:.1f} GB/s reading memory. Reached of that roofline: "
            + ", ".join(f"{n} {100 * v:.0f} %" for n, v in shares.items() if "tokens" not in n)
            + ".",
        ]
    if "differing" in record:
        lines += [
            "",
            f"Of {8 * 4 * FIXED_LENGTH} tokens sampled alone and again in batches of 64 (4-shot "
            f"prompts), {100 * record['differing']:.2f} % differ.",
        ]
    if "profile" in record:
        shown = ", ".join(f"`{name}` {100 * share:.0f} %" for name, share in record["profile"])
        lines += ["", f"Time of their own while decoding at batch 64: {shown}."]
    lines += ["", "On a GPU: `python benchmarks/gpu.py`."]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
