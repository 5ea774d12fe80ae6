"""Ways to decode the same prompts: our sampler with and without CUDA graphs, `generate`, `generate_batch`.

In: a model and a batch size. Out: per arm the completions, tokens per second and peak memory. Imported
by the benchmarks that build the models. `generate` draws from one global stream, and transformers'
continuous batching (`generate_batch`) from one stream for whatever rows its scheduler has put together:
neither can give each sample its own, so their samples depend on the batch.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerFast

from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.memory import return_freed_memory

NUM_SAMPLES = 8  # per prompt


@dataclass(frozen=True)
class Run:
    """One run of an arm.

    Attributes:
        seconds: Wall time.
        num_tokens: Sampled tokens.
        peak_bytes: Most memory allocated on the device, with the weights; 0 on a CPU.
        completions: Token ids by request, or None where an arm doesn't keep them in order.
    """

    seconds: float
    num_tokens: int
    peak_bytes: int
    completions: list[tuple[int, ...]] | None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer that has a token for every id."""
    vocabulary = {f"t{i}": i for i in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), pad_token="t0"
    )


def build_requests(
    vocab_size: int, batch: int, prefix_length: int, rest_length: int
) -> list[SampleRequest]:
    """Return `batch` requests, 8 samples per prompt; all prompts begin with the same tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, vocab_size, (length,), generator=generator).tolist())

    prefix = draw(prefix_length)
    prompts = [prefix + draw(rest_length) for _ in range(-(-batch // NUM_SAMPLES))]
    return [SampleRequest(prompts[i // NUM_SAMPLES], i) for i in range(batch)]


def measured(run: Callable[[], Sequence[tuple[int, ...]]]) -> Run:
    """Run an arm once; an arm that is compared should have run once before."""
    on_gpu = torch.cuda.is_available()
    return_freed_memory()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    completions = list(run())
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Run(seconds, sum(map(len, completions)), peak, completions)


def sample(
    sampler: TransformersSampler, requests: Sequence[SampleRequest], options: SamplingOptions
) -> list[tuple[int, ...]]:
    """Sample with our sampler: eagerly, or through graphs, as it was built."""
    done = dict(sampler.sample(requests, options, len(requests)))
    return [done[i].completion_ids for i in range(len(requests))]


@torch.no_grad()
def generate(model: Any, requests: Sequence[SampleRequest], length: int) -> list[tuple[int, ...]]:
    """Sample with `generate`, each prompt computed once per sample as it does."""
    ids = torch.tensor([r.prompt_ids for r in requests], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
        temperature=1.0, min_new_tokens=length, max_new_tokens=length, pad_token_id=0,
    )  # fmt: skip
    return [tuple(row) for row in out[:, ids.shape[1] :].tolist()]


@torch.no_grad()
def generate_batch(
    model: Any, requests: Sequence[SampleRequest], length: int
) -> list[tuple[int, ...]]:
    """Sample with transformers' continuous batching, which shares the blocks of equal prompts."""
    config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=length,
        eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    found = model.generate_batch(
        inputs=[list(r.prompt_ids) for r in requests],
        generation_config=config,
        # Flash attention would be downloaded; and leave memory for the other arms.
        continuous_batching_config=ContinuousBatchingConfig(
            auto_switch_to_flash=False, max_memory_percent=0.3, seed=0
        ),
    )
    return [tuple(output.generated_tokens) for output in found.values()]


def differing(first: Sequence[tuple[int, ...]], second: Sequence[tuple[int, ...]]) -> float:
    """Return the share of tokens that differ when they are chosen after equal ones.

    Where two completions part, what follows has other tokens before it and isn't counted.
    """
    chosen = parted = 0
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=False):
            chosen += 1
            if a != b:
                parted += 1
                break
    return parted / max(chosen, 1)
