"""Tokens per second on a GPU by batch size, against `generate`: 0.5B and 8B, bfloat16 and nf4.

The weights are random and the sizes those of public models, so nothing is downloaded. Prompts of
256 tokens behind a common prefix of 256, 8 samples of 128 tokens each; medians of alternating runs:

    python benchmarks/sampling_gpu.py
"""

import argparse
import datetime
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

RESULTS = Path(__file__).parent / "results" / "sampling_gpu.md"
# The sizes of Qwen2.5-0.5B and Llama-3.1-8B.
CONFIGS = {
    "0.5B": Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096,
    ),
}  # fmt: skip
PREFIX, REST, LENGTH, NUM_SAMPLES = 256, 256, 128, 8


def build_model(size: str, precision: str) -> Any:
    """Return a model with random weights on the GPU, in bfloat16 or quantized to nf4."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(CONFIGS[size], dtype=torch.bfloat16)
    if precision == "bfloat16":
        return model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map="cuda"
        ).eval()


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer that has a token for every id."""
    vocabulary = {f"t{i}": i for i in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), pad_token="t0"
    )


def rate(run: Any, num_tokens: int) -> float:
    """Return tokens per second of one run."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return num_tokens / (time.perf_counter() - started)


def measure(model: Any, batch: int, repeats: int) -> tuple[list[float], list[float]]:
    """Return tokens per second of our sampler and of `generate`, run in alternation."""
    vocab_size = model.config.vocab_size
    sampler = TransformersSampler(model, build_tokenizer(vocab_size))
    prefix = tuple(torch.randint(1, vocab_size, (PREFIX,)).tolist())
    prompts = [
        prefix + tuple(torch.randint(1, vocab_size, (REST,)).tolist())
        for _ in range(max(1, batch // NUM_SAMPLES))
    ]
    num_samples = batch // len(prompts)
    requests = [
        SampleRequest(p, i * 1000 + k) for i, p in enumerate(prompts) for k in range(num_samples)
    ]
    options = SamplingOptions(LENGTH, temperature=1.0)
    ids = torch.tensor(prompts, device="cuda")

    def ours() -> None:
        for _ in sampler.sample(requests, options, batch):
            pass

    @torch.no_grad()
    def theirs() -> None:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
            temperature=1.0, num_return_sequences=num_samples, min_new_tokens=LENGTH,
            max_new_tokens=LENGTH, pad_token_id=0,
        )  # fmt: skip

    rates: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for found, run in zip(rates, (ours, theirs), strict=True):
            measured = rate(run, batch * LENGTH)
            if repeat > 0:  # the first warms up
                found.append(measured)
    return rates


def main() -> None:
    """Measure every size, precision and batch, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128, 256])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device; torch sees none.")
    versions = ", ".join(f"{n} {version(n)}" for n in ("transformers", "torch", "bitsandbytes"))
    lines = [
        "# The sampler against `generate` on a GPU",
        "",
        f"{torch.cuda.get_device_name()}; {versions}; seed 0; {datetime.date.today().isoformat()}. "
        "Script: `benchmarks/sampling_gpu.py`. Tokens per second, medians.",
        "",
        "| model | precision | batch | ours | `generate` | times |",
        "|---|---|---|---|---|---|",
    ]
    for size in args.sizes:
        for precision in ("bfloat16", "nf4"):
            model = build_model(size, precision)
            for batch in args.batches:
                ours, theirs = map(median, measure(model, batch, args.repeats))
                lines.append(
                    f"| {size} | {precision} | {batch} | {ours:.0f} | {theirs:.0f} | "
                    f"{ours / theirs:.2f} |"
                )
                print(lines[-1], flush=True)
            del model
            torch.cuda.empty_cache()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
