"""How far an engine's log-probs are from the trainer's, by precision, and whether a stale one is found.

The trainer has the demo's model in float32 with a LoRA adapter. The engine is the same model with its
base weights in another precision, computed in float32: bfloat16 (each module's output is rounded as well),
FP8 (e4m3, a scale per output channel) and nf4. A round is a few optimizer steps on the demo's worked
answers. 16 completions of at most 16 tokens, sampled from the trainer's current weights, are scored as
after each hand-over, once with the engine on the current adapter and once with it on the last one.

    OMP_NUM_THREADS=1 python benchmarks/engine_gap.py
"""

import argparse
import copy
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_selfplay.demos.words import demo_split, load_demo_model_path
from trl_selfplay.generation.completion_scores import score_completions
from trl_selfplay.generation.engine_agreement import compare
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler, collect_eos_token_ids

RESULT = Path(__file__).parent / "results" / "engine_gap.md"
STEPS, LEARNING_RATE, RANK, SEED = (4,), 1e-3, 8, 0
NUM_COMPLETIONS, LENGTH = 16, 16


def rounded(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """Return a weight as a precision represents it, in float32."""
    if precision == "bfloat16":
        return weight.bfloat16().float()
    if precision == "fp8":
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale
    if precision == "nf4":
        return bnb.functional.dequantize_4bit(
            *bnb.functional.quantize_4bit(weight, quant_type="nf4")
        )
    return weight


def as_engine(model: Any, precision: str) -> Any:
    """Return a copy of the model with the base weights of its linear layers in a precision."""
    engine = copy.deepcopy(model)
    for name, module in engine.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora" not in name and "lm_head" not in name:
            module.weight.data = rounded(module.weight.data, precision)
        if precision == "bfloat16" and not list(module.children()):
            module.register_forward_hook(
                lambda _, inputs, out: out.bfloat16().float() if torch.is_tensor(out) else out
            )
    return engine


def train(model: Any, texts: list[torch.Tensor], steps: int) -> Any:
    """Return a copy of the model after some optimizer steps."""
    trained = copy.deepcopy(model)
    weights = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE)
    for step in range(steps):
        for ids in texts[4 * step : 4 * step + 4]:
            (trained(input_ids=ids, labels=ids).loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained


def main() -> None:
    """Measure, and write the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(SEED)
    path = load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    last = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear"))
    traits, eos = describe_model(last), collect_eos_token_ids(base, tokenizer)
    rows = demo_split(seed=SEED).train
    texts = [
        tokenizer(f"{row['prompt']} {row['solution']}", return_tensors="pt")["input_ids"]
        for row in rows
    ]
    prompts = [tuple(tokenizer(row["prompt"])["input_ids"]) for row in rows][-NUM_COMPLETIONS:]
    token_ids = frozenset(tokenizer.get_vocab().values())
    options = SamplingOptions(LENGTH, eos_token_ids=eos, return_logprobs=True)
    lines = []
    for steps in STEPS:
        current = train(last, texts, steps)
        requests = [
            SampleRequest(p, stream_key(SEED, 0, "train", str(i), 0)) for i, p in enumerate(prompts)
        ]
        sampled = dict(TransformersSampler(current, tokenizer).sample(requests, options, 16))
        completions = [(r.prompt_ids, sampled[i].completion_ids) for i, r in enumerate(requests)]
        lengths = [len(completion) for _, completion in completions]

        def score(model: Any, completions: Any = completions) -> list[float]:
            return score_completions(model, None, traits, completions, options, token_ids)

        own, before = score(current), score(last)
        for precision in ("nf4", "fp8", "bfloat16", "float32"):
            cells = []
            for holds in (current, last):
                engine = score(as_engine(holds, precision))
                found = compare(engine, own, before, lengths, limit=float("inf"))
                cells.append(f"{found.gap:.2g} | {found.place:.2f} ± {found.place_error:.2f}")
                cells.append(found.nearer_to)
            lines.append(f"| {steps} | {precision} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    RESULT.write_text(
        "# The gap between an engine and the trainer\n\n"
        f"SmolLM2-135M-Instruct with LoRA (rank {RANK}, learning rate {LEARNING_RATE:g}), two shared "
        f"{platform.machine()} cores; torch {version('torch')}, transformers "
        f"{version('transformers')}, bitsandbytes {version('bitsandbytes')}; seed {SEED}; 2026-11-26. "
        "Script: `benchmarks/engine_gap.py`. The trainer computes in float32; the engine's base weights "
        "are in the precision of the row, emulated on a CPU. Gap: mean difference of log-probs in nats "
        "per token. Place: 0 is the current weights, 1 those before the round. The limits are .001 "
        "(float32), .05 (reduced precision) and 1 (quantized). 7B models and engines on a GPU: not "
        "measured.\n\n"
        "| steps of the round | engine | gap, current adapter | place | told | gap, last adapter | "
        "place | told |\n|---:|---|---:|---:|---|---:|---:|---|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
