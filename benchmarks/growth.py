"""Measure how time, memory and disk of a round grow with the number of its completions.

Two parts, each measurement in a process of its own:

- `round`: one round of STaRTrainer with a tiny model, 100 to 10,000 prompts with 8 samples each: sampling,
  grading, selection, rows, and training for a fixed number of steps.
- `store`: the round folder is filled with completions of 100 to 300 tokens without a model, up to a million;
  then the stages after sampling run as in a round: read and grade, select, rows and report, detectors.
  Seconds and peak memory are told by stage.

"All" is the sum of the stages; for a round, it is building the trainer and `train()`. Exponents are slopes
in log-log scale of what grows: a measurement minus the smallest one's, over the completions minus the
smallest number. Finished measurements are kept and not repeated:

    OMP_NUM_THREADS=1 nice -n 10 python benchmarks/growth.py
"""

import argparse
import datetime
import gc
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

RESULTS = Path(__file__).parent / "results" / "growth"
SIZES = {"round": (800, 8_000, 80_000), "store": (10_000, 100_000, 1_000_000)}
NUM_GENERATIONS = 8
NUM_WORDS = 4000
NUM_TEXTS = 8192  # different completions in a store
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
WORDS = np.array(
    [*SPECIAL.values(), *(f"w{i}{'xyzab'[i % 5] * (i % 5)}" for i in range(NUM_WORDS))]
)


def is_fifth(completions: list[str], **kwargs: Any) -> list[float]:
    """Give 1.0 to two completions in five, by their lengths in characters."""
    return [float(len(completion) % 5 < 2) for completion in completions]


def build_trainer(num_prompts: int, folder: Path, **changes: Any) -> Any:
    """Return a STaRTrainer with a tiny model whose tokens are words."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from trl_selfplay import STaRConfig, STaRTrainer

    vocabulary = {str(word): i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **SPECIAL)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024,
            eos_token_id=1, pad_token_id=0, bos_token_id=None,
        )
    )  # fmt: skip
    draw = random.Random(0)
    length = changes.pop("prompt_length", 100)
    prompts = [
        " ".join([f"w{i % 10}", *draw.choices(WORDS.tolist()[3:], k=length), str(i)])
        for i in range(num_prompts)
    ]
    settings: dict[str, Any] = {
        "num_rounds": 1, "num_generations": NUM_GENERATIONS, "rationalize": False, "temperature": 1.0,
        "max_completion_length": 300, "max_length": None, "bf16": False, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1000,
    }  # fmt: skip
    return STaRTrainer(
        model,
        STaRConfig(str(folder), **settings | changes),
        train_dataset=Dataset.from_dict({"prompt": prompts, "solution": ["yes"] * num_prompts}),
        processing_class=tokenizer,
        reward_funcs=is_fifth,
    )


def fill_store(trainer: Any, batch_size: int = 128) -> None:
    """Write a round's samples, ungraded, as if they had been sampled.

    100 to 300 tokens each, of 8,192 texts; one in twenty is truncated, and one in eight repeats its
    prompt's first.
    """
    from trl_selfplay.disk import save_table
    from trl_selfplay.rollouts.record import SCHEMA
    from trl_selfplay.rollouts.shards import Assignment, plan_shards, save_plan

    class Planner:
        def suggest_batch_size(self, *lengths: int) -> int:
            return batch_size

    play, folder = trainer.self_play, trainer.run.folder(0) / "samples"
    indices = tuple(range(NUM_GENERATIONS))
    assignments = {
        row.prompt_id: Assignment(row, play.formatter.token_ids(row, few_shot=False), indices)
        for row in play.rows
    }
    planner: Any = Planner()
    shards = plan_shards(list(assignments.values()), 300, planner)
    folder.mkdir(parents=True)
    save_plan(folder / "plan.json", shards)
    generator = np.random.default_rng(0)
    words = [
        generator.integers(3, len(WORDS), size) for size in generator.integers(100, 300, NUM_TEXTS)
    ]
    texts = pa.table(
        {
            "completion_ids": pa.array([[*own.tolist(), 1] for own in words], pa.list_(pa.int32())),
            "completion": [" ".join(WORDS[own]) for own in words],
        }
    )
    for number, shard in enumerate(shards):
        of_shard = [assignments[prompt_id] for prompt_id in shard.prompt_ids for _ in indices]
        count = len(of_shard)
        drawn = generator.integers(0, NUM_TEXTS, count)
        firsts = np.arange(count) - np.arange(count) % NUM_GENERATIONS
        drawn = np.where(generator.random(count) < 0.125, drawn[firsts], drawn)
        completions = texts.take(pa.array(drawn))
        columns: dict[str, Any] = {
            "round_index": [0] * count,
            "phase": ["train"] * count,
            "prompt_id": [a.row.prompt_id for a in of_shard],
            "sample_index": list(indices) * len(shard.prompt_ids),
            "prompt_ids": [a.prompt_ids for a in of_shard],
            "completion_ids": completions.column("completion_ids").combine_chunks(),
            "prompt": [a.row.prompt for a in of_shard],
            "completion": completions.column("completion").combine_chunks(),
            "finish": np.where(generator.random(count) < 0.05, "length", "eos").tolist(),
            "hinted": [False] * count,
            "logprob": (-generator.random(count)).tolist(),
            "reward": [None] * count,
            "rewards": [[]] * count,
            "completion_mask": [None] * count,
            "causes": [[]] * count,
        }
        arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
        save_table(folder / f"{number:05d}.parquet", pa.table(arrays, schema=SCHEMA))


def memory_mb(key: str) -> float:
    """Return an entry of this process's memory: VmRSS, RssAnon, or VmHWM, the peak of VmRSS."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(key))


def play_store(trainer: Any) -> dict[str, Any]:
    """Run the stages after sampling on a filled store; return seconds and peak memory of each."""
    from trl_selfplay.rollouts.selection import SelectionRules, select
    from trl_selfplay.rounds.run import RoundProgress
    from trl_selfplay.rounds.watch import Watch

    stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        started = time.monotonic()
        yield
        stages[name] = {"seconds": time.monotonic() - started, "peak_mb": memory_mb("VmHWM")}
        print(name, stages[name], file=sys.stderr, flush=True)

    play, args = trainer.self_play, trainer.args
    rows = play.draw_prompts(0)
    before = memory_mb("VmRSS")
    with stage("read and grade"):
        rollouts = play.sample(rows, 0, "train", trainer.run.folder(0))
    with stage("prompts"):
        prompt_ids = play.training_prompt_ids(rows)
    rules = SelectionRules(
        is_correct=lambda rollout: rollout.passes(args.reward_threshold),
        seed=args.seed,
        fits=lambda rollout: play.fits(rollout, prompt_ids),
        normal_form=trainer.normal_form,
        max_per_prompt=args.max_per_prompt,
    )
    with stage("select"):
        selection = select(rollouts, rules)
    with stage("rows and report"):
        played = play.build_sft_round(0, selection, prompt_ids)
    plans = args.plan_rounds()
    watch = Watch(trainer, RoundProgress(plans))
    watch.begin(plans[0])
    with stage("detectors"):
        played = watch.see_samples(played)
    return {
        "stages": stages,
        "before_mb": before,
        "peak_mb": max(each["peak_mb"] for each in stages.values()),
        "seconds": sum(each["seconds"] for each in stages.values()),
        "examples": played.num_examples,
    }


def measure(part: str, count: int) -> dict[str, Any]:
    """Measure once, in this process."""
    folder = Path(tempfile.mkdtemp(prefix="growth-", dir=os.environ.get("TMPDIR")))
    try:
        if part == "store":
            trainer = build_trainer(count // NUM_GENERATIONS, folder)
            fill_store(trainer)
            found = play_store(trainer)
        else:
            from trl_selfplay import STaRTrainer  # noqa: F401  # imports take no part

            settings = {"max_completion_length": 8, "prompt_length": 8, "max_steps": 20,
                        "stop_strings": ["w1"]}  # fmt: skip
            started = time.monotonic()
            trainer = build_trainer(count // NUM_GENERATIONS, folder, **settings)
            trainer.train()
            line = trainer.run.lines[0]
            found = {
                "seconds": time.monotonic() - started,
                "stages": {name: {"seconds": s} for name, s in line["seconds"].items()},
                "peak_mb": memory_mb("VmHWM"),
                "examples": line["examples"],
            }
        rounds = folder / "_rounds"
        sizes = {p: p.stat().st_size for p in rounds.rglob("*") if p.is_file()}
        found["disk_mb"] = sum(sizes.values()) / 1e6
        return found
    finally:
        shutil.rmtree(folder)


def exponent(counts: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of log(value − first value) over log(count − first count)."""
    points = [
        (math.log(count - counts[0]), math.log(value - values[0]))
        for count, value in zip(counts[1:], values[1:], strict=True)
    ]
    if len(points) < 2:
        return math.nan  # a line through one point
    return float(np.polyfit(*zip(*points, strict=True), deg=1)[0])


def report(parts: Sequence[str]) -> str:
    """Return the tables of all finished measurements."""
    lines = [
        "# How a round grows",
        "",
        __doc__.split("\n\n", 1)[1].split(" Finished measurements")[0],
        "",
        "Command: `OMP_NUM_THREADS=1 nice -n 10 python benchmarks/growth.py`. Two shared x86-64 cores "
        f"with other work on them; Python {platform.python_version()}, torch {version('torch')}, "
        f"datasets {version('datasets')}, pyarrow {version('pyarrow')}; seed 0; "
        f"{datetime.date(2026, 11, 26)}. Memory is the peak resident size of the process, about "
        "0.5 GB of it torch and the other packages. All were measured with 9 to 18 "
        "processes waiting for the two cores, and not equally many each time: seconds are upper bounds, and "
        "their exponents rough. Each number was measured once.",
    ]
    for part in parts:
        found = {
            count: json.loads(path.read_text())
            for count in SIZES[part]
            if (path := RESULTS / f"{part}-{count}.json").exists()
        }
        if not found:
            lines += ["", f"## {part}", "", "Not measured."]
            continue
        names = list(dict.fromkeys(name for each in found.values() for name in each["stages"]))
        header = [
            "completions",
            *(f"{name}, s" for name in names),
            "all, s",
            "peak, MB",
            "disk, MB",
        ]
        lines += ["", f"## {part}", "", f"| {' | '.join(header)} |", "|" + " ---: |" * len(header)]
        for count, each in found.items():
            seconds = [f"{each['stages'][name]['seconds']:.1f}" for name in names]
            cells = [f"{count:,}", *seconds, f"{each['seconds']:.1f}", f"{each['peak_mb']:,.0f}",
                     f"{each['disk_mb']:,.1f}"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        fits = {
            name: exponent(list(found), [each[key] for each in found.values()])
            for name, key in (("seconds", "seconds"), ("memory", "peak_mb"), ("disk", "disk_mb"))
        }
        told = ", ".join(f"{name} {value:.2f}" for name, value in fits.items())
        missing = [f"{count:,}" for count in SIZES[part] if count not in found]
        lines += ["", f"Exponents: {told}." if len(found) > 2 else "Exponents: not measured."]
        lines += ["", f"Not measured: {', '.join(missing)} completions."] if missing else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what isn't measured yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*SIZES], help="Only this part.")
    parser.add_argument("--most", type=int, default=10**9, help="Largest number of completions.")
    parser.add_argument("--measure", type=int, help="Measure this number here, and print it.")
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.part, args.measure)))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in [args.part] if args.part else SIZES:
        for count in SIZES[part]:
            path = RESULTS / f"{part}-{count}.json"
            if count > args.most or path.exists():
                continue
            command = [sys.executable, __file__, "--part", part, "--measure", str(count)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            path.write_text(done.stdout.strip().splitlines()[-1] + "\n")
    (RESULTS.parent / "growth.md").write_text(report([*SIZES]))


if __name__ == "__main__":
    main()
