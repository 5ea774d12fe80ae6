"""Does decoding through CUDA graphs work on this card, and how fast is it? A first look, not a result.

python benchmarks/decoding_smoke.py > graphs_output.txt 2>&1
python benchmarks/decoding_smoke.py --device cpu      # toy sizes, nothing captured
"""

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from decoding import (
    build_requests,
    build_tokenizer,
    differing,
    generate,
    generate_batch,
    measured,
    sample,
)
from gpu_parts import models
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.generation.static_decoding import StaticDecoder
from trl_selfplay.generation.transformers_sampler import TransformersSampler

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--device", default="cuda")
parser.add_argument("--seconds", type=float, default=105.0, help="begin no check after this")
ARGS = parser.parse_args()
GPU = ARGS.device == "cuda"
STARTED = time.perf_counter()
LENGTH = 64 if GPU else 12
BATCHES = (8, 32, 128) if GPU else (2, 4)
PREFIX, REST = (128, 64) if GPU else (20, 6)
TINY = LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
    initializer_range=0.3,
)  # fmt: skip
SIZES = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24} if GPU else {
    "hidden_size": 112, "intermediate_size": 64, "num_hidden_layers": 2}  # fmt: skip
HALF_B = Qwen2Config(
    vocab_size=151_936 if GPU else 500, num_attention_heads=14, num_key_value_heads=2,
    max_position_embeddings=4096, tie_word_embeddings=True, **SIZES,
)  # fmt: skip
EIGHT_B = LlamaConfig(
    vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=8,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096,
)  # fmt: skip
TOKENIZERS: dict[int, Any] = {}


def say(*parts: Any) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f}]", *parts, flush=True)


def check(name: str, run: Callable[[], Any]) -> Any:
    """Run a check; print its error and go on."""
    if time.perf_counter() - STARTED > ARGS.seconds:
        say("SKIPPED, no time left:", name)
        return None
    say("===", name)
    try:
        return run()
    except BaseException:
        say("FAILED", name)
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        return None


def build(config: Any, dtype: torch.dtype, nf4: bool = False, lora: bool = False) -> Any:
    """Return a model with random weights."""
    models.CONFIGS["tried"] = config
    if nf4:
        model = models.build_model("tried", ARGS.device, is_quantized=True)
    else:
        torch.manual_seed(0)
        with torch.device(ARGS.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if lora:
        config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    return model.eval()


def samplers(
    model: Any, accelerator: Any = None
) -> tuple[TransformersSampler, TransformersSampler]:
    """Return the eager sampler and the one that captures steps."""
    vocab_size = model.config.vocab_size
    if vocab_size not in TOKENIZERS:
        TOKENIZERS[vocab_size] = build_tokenizer(vocab_size)
    tokenizer = TOKENIZERS[vocab_size]
    eager = TransformersSampler(model, tokenizer, accelerator, cuda_graphs=False)
    graphs = TransformersSampler(model, tokenizer, accelerator)
    if not GPU:
        graphs._static = StaticDecoder("cpu")
    return eager, graphs


def compare(model: Any, batch: int, theirs: bool, accelerator: Any = None, **changes: Any) -> None:
    """Print speed, memory and differing tokens of one batch size."""
    options = SamplingOptions(LENGTH, temperature=1.0, **changes)
    requests = build_requests(model.config.vocab_size, batch, PREFIX, REST)
    eager, graphs = samplers(model, accelerator)
    measured(lambda: sample(eager, requests, SamplingOptions(4)))  # warms up
    e = measured(lambda: sample(eager, requests, options))
    captured = measured(lambda: sample(graphs, requests, options))
    g = measured(lambda: sample(graphs, requests, options))
    static = graphs._static
    obstacle = static._obstacle or ("no buffers" if static._buffers is None else None)
    num_graphs = 0 if static._buffers is None else len(static._buffers._graphs)
    line = (
        f"batch {batch:3d}: eager {e.rate:7.0f} tok/s {e.peak_bytes / 2**30:.2f} GiB | graphs "
        f"{g.rate:7.0f} tok/s {batch / g.rate * 1000:.2f} ms per step {g.peak_bytes / 2**30:.2f} GiB (x{g.rate / e.rate:.2f}), {num_graphs} "
        f"captured in about {captured.seconds - g.seconds:.2f} s, differing "
        f"{differing(e.completions, g.completions):.2%}, run to run "
        f"{differing(captured.completions, g.completions):.2%}"
    )
    if theirs:
        measured(lambda: generate(model, requests, 4))
        t = measured(lambda: generate(model, requests, LENGTH))
        line += f" | generate {t.rate:7.0f} tok/s {t.peak_bytes / 2**30:.2f} GiB"
    say(line)
    if obstacle:
        say("NOT CAPTURED:", obstacle)
    graphs.release()


def whole_sampler(model: Any) -> None:
    """Compare samples where rows are dropped and refilled, with EOS and ragged prompts."""
    requests = build_requests(model.config.vocab_size, 48, 20, 5)
    requests += build_requests(model.config.vocab_size, 24, 20, 150)[:21]
    options = SamplingOptions(
        LENGTH, eos_token_ids=tuple(range(3, 40)), top_k=40, repetition_penalty=1.1
    )
    eager, graphs = samplers(model)
    for batch in (7, 32):
        found = [dict(s.sample(requests, options, batch)) for s in (eager, graphs)]
        ids = [[f[i].completion_ids for i in range(len(requests))] for f in found]
        say(
            f"batch {batch}: equal {ids[0] == ids[1]}, differing {differing(*ids):.3%},",
            "obstacle", graphs._static._obstacle,
            "captured", sorted(graphs._static._buffers._graphs),
        )  # fmt: skip
    graphs.release()


def failing_capture() -> None:
    """Check that a capture that fails leaves the device usable."""
    model = build(TINY, torch.float32)
    requests = build_requests(1000, 8, 20, 5)
    options = SamplingOptions(LENGTH)
    eager, graphs = samplers(model)
    expected = sample(eager, requests, options)
    model.model.layers[1].register_forward_hook(lambda m, a, out: out[0].sum().item() and None)
    say("same samples:", sample(graphs, requests, options) == expected)
    say("obstacle:", graphs._static._obstacle)
    if GPU:
        before = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        say(
            f"empty_cache works; reserved {before >> 20} -> {torch.cuda.memory_reserved() >> 20} MiB"
        )
        say("current stream is the default one:", torch.cuda.current_stream().cuda_stream == 0)
        say("random numbers and pinned memory:", torch.rand(1, device="cuda").item(),
            torch.ones(9).pin_memory().sum().item())  # fmt: skip
    _, graphs = samplers(build(TINY, torch.float32))
    say("another model is captured afterwards:", sample(graphs, requests, options) == expected,
        graphs._static._obstacle)  # fmt: skip


def released(model: Any) -> None:
    """Print the memory that `release` gives back."""
    _, graphs = samplers(model)
    requests = build_requests(model.config.vocab_size, BATCHES[-1], PREFIX, REST)

    def allocated() -> str:
        torch.cuda.empty_cache()
        a, r = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return f"allocated {a >> 20} MiB, reserved {r >> 20} MiB"

    say("before:", allocated())
    sample(graphs, requests, SamplingOptions(LENGTH))
    say("held:  ", allocated())
    graphs.release()
    say("after: ", allocated())
    say("suggested batch sizes, eager and graphs:",
        [s.suggest_batch_size(192, LENGTH) for s in samplers(model)])  # fmt: skip


def profile(model: Any, batch: int) -> None:
    """Print where the time of captured steps goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    _, graphs = samplers(model)
    requests = build_requests(model.config.vocab_size, batch, PREFIX, REST)
    options = SamplingOptions(40)
    sample(graphs, requests, options)
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run = measured(lambda: sample(graphs, requests, options))
    say(f"{run.seconds / 40 * 1000:.2f} ms per step under the profiler")
    averages = recorded.key_averages()
    print(averages.table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=60))
    print(averages.table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=60))
    graphs.release()


def continuous(model: Any, batch: int) -> None:
    """Print the speed of transformers' continuous batching."""
    requests = build_requests(model.config.vocab_size, batch, PREFIX, REST)
    for _ in range(2):
        run = measured(lambda: generate_batch(model, requests, LENGTH))
        say(f"generate_batch, batch {batch}: {run.rate:.0f} tok/s, {run.num_tokens} tokens, "
            f"{run.peak_bytes / 2**30:.2f} GiB")  # fmt: skip


FUSED = """
template <typename T> T gumbel(T word, T first, T second) {
  unsigned int x = (unsigned int)word ^ (unsigned int)first;
  x ^= x >> 16; x *= 0x7FEB352Du;
  x ^= (unsigned int)second;
  x ^= x >> 15; x *= 0x846CA68Bu;
  x ^= x >> 16; x &= 0x7FFFFFFFu;
  float v = (float)x * -4.656612873077393e-10f - 2.3283064365386963e-10f;
  v = v < -0.999999940395355225f ? -0.999999940395355225f : v;
  return __float_as_int(-logf(-log1pf(v)));
}
"""


def noise(batch: int) -> None:
    """Time the noise of one step, as it is and in one kernel, and the other parts of a choice."""
    from trl_selfplay.generation.random_streams import _row_words, gumbel_noise, token_words
    from trl_selfplay.generation.token_filters import keep_top_k, keep_top_p

    words = token_words(151_936, "cuda")
    keys = list(range(batch))
    rows = torch.from_numpy(_row_words(keys, 3)).to("cuda")
    fused = torch.cuda.jiterator._create_jit_fn(FUSED)
    logits = torch.randn(batch, 151_936, device="cuda")

    def milliseconds(run: Callable[[], Any]) -> str:
        run()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            run()
        torch.cuda.synchronize()
        return f"{(time.perf_counter() - started) * 100:.3f} ms"

    def in_one() -> torch.Tensor:
        return fused(words, rows[:, :1], rows[:, 1:]).view(torch.float32)

    say(f"noise, batch {batch}:", milliseconds(lambda: gumbel_noise(words, keys, 3)),
        "in one kernel", milliseconds(in_one),
        "equal", torch.equal(in_one(), gumbel_noise(words, keys, 3)),
        "top-k", milliseconds(lambda: keep_top_k(logits.clone(), 40)),
        "top-p", milliseconds(lambda: keep_top_p(logits, 0.9)),
        "argmax", milliseconds(lambda: logits.max(dim=-1)),
        "words", milliseconds(lambda: _row_words(keys, keys)))  # fmt: skip


def main() -> None:
    """Run the checks in the order of what they tell."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("trl_selfplay").setLevel(logging.INFO)
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name() if GPU else "cpu"
    say(name, "torch", torch.__version__, "transformers", transformers.__version__)
    dtype = torch.bfloat16 if GPU else torch.float32
    model = check("0.5B, 16-bit: build", lambda: build(HALF_B, dtype))
    for batch in BATCHES:
        check(f"0.5B, 16-bit, batch {batch}", lambda b=batch: compare(model, b, theirs=True))
    if GPU:
        for batch in (8, 128):
            check(f"noise, batch {batch}", lambda b=batch: noise(b))
        check("profile, batch 32", lambda: profile(model, 32))
        check("memory", lambda: released(model))
    model = None
    model = check("0.5B, nf4, LoRA: build", lambda: build(HALF_B, dtype, nf4=GPU, lora=True))
    for batch in BATCHES[:2]:
        check(f"0.5B, nf4, LoRA, batch {batch}", lambda b=batch: compare(model, b, theirs=False))
    if GPU:
        model = None
        model = check("8B, 8 layers, nf4, LoRA: build", lambda: build(EIGHT_B, dtype, True, True))
        mixed = Accelerator(mixed_precision="bf16")
        for batch in (4, 32):
            check(f"8B, 8 layers, autocast, batch {batch}",
                  lambda b=batch: compare(model, b, False, mixed))  # fmt: skip
        check("profile, nf4, batch 4", lambda: profile(model, 4))
    model = None
    model = check("0.5B, 16-bit: build", lambda: build(HALF_B, dtype))
    check("0.5B, top-k 40", lambda: compare(model, BATCHES[1], theirs=False, top_k=40))
    check("0.5B, 16-bit: rows leave and come", lambda: whole_sampler(model))
    for batch in BATCHES[1:]:
        check(f"continuous batching, batch {batch}", lambda b=batch: continuous(model, b))
    model = None
    model = check("0.5B, float32: build", lambda: build(HALF_B, torch.float32))
    check("0.5B, float32", lambda: compare(model, BATCHES[1], theirs=False))
    model = None
    check("tiny, float32: rows leave and come", lambda: whole_sampler(build(TINY, torch.float32)))
    check("a capture that fails", failing_capture)
    say("end")


if __name__ == "__main__":
    main()
