"""SPIN on one GPU: peak memory while training, sampling tokens per second, seconds between phases.

- 8B: QLoRA (nf4, all linear layers, r 16) on the sizes of Llama-3.1-8B. Target: 12 GB while
  training.
- 0.5B: full fine-tuning in bfloat16 on the sizes of Qwen2.5-0.5B.

The weights are random, so nothing is downloaded. Prompts and completions have 512 tokens each, one
pair a step, with gradient checkpointing; two rounds, so that the way back to sampling is timed as
well. A random model never ends, so the last token of each completion is set to EOS.

    python benchmarks/spin_gpu.py
"""

import argparse
import datetime
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from sampling_gpu import build_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from trl_selfplay import SPINConfig, SPINTrainer

RESULTS = Path(__file__).parent / "results" / "spin_gpu.md"
CASES = {"8B": "nf4", "0.5B": "bfloat16"}
PROMPT, COMPLETION = 512, 512
NUM_ROUNDS = 2


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer that has a word for every id; no special token is the start of a word."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_rows(num_prompts: int, vocab_size: int) -> Dataset:
    """Return prompts and completions of the fixed lengths; EOS is the completion's last token."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"t{rng.randrange(10, vocab_size)}" for _ in range(count))

    return Dataset.from_list(
        [
            {"prompt": words(PROMPT), "completion": f" {words(COMPLETION - 1)}"}
            for _ in range(num_prompts)
        ]
    )


class PhaseClock(TrainerCallback):
    """Notes when each phase begins and ends, and the memory that it takes at most."""

    def __init__(self, trainer: SPINTrainer) -> None:
        self.trainer = trainer
        self.moments: list[tuple[str, float]] = []
        self.peaks: dict[str, list[float]] = {"sampling": [], "scoring": [], "training": []}
        self.tokens_a_second: list[float] = []
        self._watch_sampler()
        self._watch_scoring()

    def note(self, moment: str) -> float:
        """Add a moment, once everything queued on the GPU has run."""
        torch.cuda.synchronize()
        self.moments.append((moment, time.perf_counter()))
        return self.moments[-1][1]

    def begin(self, phase: str) -> float:
        """Begin a phase with a fresh peak."""
        torch.cuda.reset_peak_memory_stats()
        return self.note(f"{phase} begins")

    def end(self, phase: str) -> float:
        """End a phase; its peak is the memory that the allocator holds, in GiB."""
        self.peaks[phase].append(torch.cuda.max_memory_reserved() / 2**30)
        return self.note(f"{phase} ends")

    def _watch_sampler(self) -> None:
        sampler = self.trainer.self_play.collector.sampler
        sample, eos = sampler.sample, self.trainer.self_play.eos_token_id

        def watched(*arguments: Any) -> Iterator[Any]:
            started, tokens = self.begin("sampling"), 0
            for index, sampled in sample(*arguments):
                tokens += len(sampled.completion_ids)
                ids = (*sampled.completion_ids[:-1], eos)
                yield index, replace(sampled, completion_ids=ids, finish="eos")
            self.tokens_a_second.append(tokens / (self.end("sampling") - started))

        sampler.sample = watched

    def _watch_scoring(self) -> None:
        score = self.trainer.compute_ref_log_probs

        def watched(*arguments: Any) -> Any:
            self.begin("scoring")
            scores = score(*arguments)
            self.end("scoring")
            return scores

        self.trainer.compute_ref_log_probs = watched

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """The parent is ready for its first step."""
        if state.global_step == 0:
            self.begin("training")

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """The last step is done; saving comes after it."""
        if state.global_step == state.max_steps:
            self.end("training")

    def seconds_between(self, first: str, second: str) -> list[float]:
        """Return the seconds from each `first` to the next `second`, if no other came between."""
        return [
            b[1] - a[1]
            for a, b in zip(self.moments, self.moments[1:], strict=False)
            if (a[0], b[0]) == (first, second)
        ]


def measure(size: str, num_prompts: int) -> str:
    """Run two rounds; return a row of the table."""
    precision = CASES[size]
    model = build_model(size, precision)
    vocab_size = model.config.vocab_size
    folder = tempfile.mkdtemp()
    trainer = SPINTrainer(
        model,
        args=SPINConfig(
            folder, num_rounds=NUM_ROUNDS, max_completion_length=COMPLETION,
            max_length=PROMPT + COMPLETION, per_device_train_batch_size=1, max_steps=num_prompts,
            learning_rate=1e-6, bf16=True, gradient_checkpointing=True, save_strategy="no",
            report_to=[], disable_tqdm=True, logging_steps=10,
        ),
        train_dataset=build_rows(num_prompts, vocab_size),
        processing_class=build_tokenizer(vocab_size),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        if precision == "nf4"
        else None,
    )  # fmt: skip
    clock = PhaseClock(trainer)
    trainer.add_callback(clock)
    trainer.train()
    to_score = clock.seconds_between("sampling ends", "scoring begins")
    to_train = clock.seconds_between("scoring ends", "training begins")
    to_sample = clock.seconds_between("training ends", "sampling begins")
    train_s = sum(clock.seconds_between("training begins", "scoring begins"))
    train_s += sum(clock.seconds_between("scoring ends", "training ends"))
    peaks = [max(clock.peaks[phase]) for phase in ("training", "scoring", "sampling")]
    cells = [
        size,
        "QLoRA, nf4" if precision == "nf4" else "full, bfloat16",
        *(f"{peak:.1f}" for peak in peaks),
        f"{train_s / (NUM_ROUNDS * num_prompts):.2f}",
        f"{median(clock.tokens_a_second):.0f}",
        *(f"{median(seconds):.1f}" for seconds in (to_score, to_train, to_sample)),
    ]
    del trainer, clock, model
    torch.cuda.empty_cache()
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure each case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--num-prompts", type=int, default=32)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device; torch sees none.")
    versions = ", ".join(
        f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch", "bitsandbytes")
    )
    lines = [
        "# SPIN on one GPU",
        "",
        f"{torch.cuda.get_device_name()}; {versions}; seed 42; {datetime.date.today().isoformat()}. "
        f"Script: `benchmarks/spin_gpu.py`. {args.num_prompts} prompts, {PROMPT} + {COMPLETION} "
        "tokens, one pair a step, gradient checkpointing, two rounds. Peak GiB that the allocator "
        "holds; medians of seconds.",
        "",
        "| model | tuning | training GiB | scoring GiB | sampling GiB | s a step | sampled tokens/s "
        "| s to scoring | s to training | s to sampling |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in args.sizes:
        lines.append(measure(size, args.num_prompts))
        print(lines[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
