"""Time a whole round, sampling to trained adapter, against a script written by hand on TRL.

Both arms do a round in the demo's form: 12 prompts with the few-shot examples, 8 samples each,
grading, LoRA training for 12 steps on the same kept examples (those of the first STaR run). The
reward asks for an answer in the right form alone, so that a round keeps enough to train on. The
hand-written arm calls `generate(num_return_sequences=8)` on prompts sorted by length in batches of
8, 32 or 64 sequences and then SFTTrainer; its best batch size counts. Each measurement is a process
of its own; arms alternate. Finished measurements are kept in the results folder and not repeated:

    OMP_NUM_THREADS=1 python benchmarks/whole_round.py --repeats 3
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recipe_demos import demo_flags, demo_lora

RESULTS = Path(__file__).parent / "results" / "whole_round"
ARMS = ("selfplay", "generate-8", "generate-32", "generate-64")
NUM_GENERATIONS = 8
SAMPLING = ("temperature", "top_p", "max_completion_length", "stop_strings")
TRAINING = {
    "learning_rate": 1e-4,
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 50,
    "disable_tqdm": True,
}


def has_answer(completions: list[str], **kwargs: Any) -> list[float]:
    """Give 1.0 to a completion with an answer in the right form."""
    from trl_selfplay.rewards import extract_answer

    return [float(extract_answer(completion) is not None) for completion in completions]


def run_selfplay(num_prompts: int, kept_path: Path) -> dict[str, float]:
    """One round of STaRTrainer without rationalization and evaluation."""
    from trl_selfplay import STaRConfig, STaRTrainer
    from trl_selfplay.demos.words import demo_split, load_demo_model_path

    split = demo_split(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = STaRTrainer(
            load_demo_model_path(),
            STaRConfig(
                folder,
                num_rounds=1,
                num_generations=NUM_GENERATIONS,
                rationalize=False,
                **{name: demo_flags("star")[name] for name in SAMPLING},
                **TRAINING,
            ),
            train_dataset=split.train.select(range(num_prompts)),
            reward_funcs=has_answer,
            few_shot_examples=split.few_shot,
            peft_config=demo_lora("star"),
        )
        trainer.train()
        line = trainer.run.lines[0]
        rows = trainer.train_dataset.to_list()
    if not kept_path.exists():
        kept_path.parent.mkdir(parents=True, exist_ok=True)
        kept_path.write_text(json.dumps(rows))
    return {"sample_s": line["seconds"]["sample"], "train_s": line["seconds"]["train"],
            "examples": len(rows), "steps": line["steps"]}  # fmt: skip


def run_by_hand(num_prompts: int, batch: int, kept_path: Path) -> dict[str, float]:
    """What a careful person writes: generate in sorted batches, filter, SFTTrainer."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    from trl_selfplay.demos.words import demo_split, load_demo_model_path

    set_seed(42)
    demo = demo_flags("star")
    split = demo_split(0)
    path = load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path, dtype="float32"), demo_lora("star")
    )
    shots = "".join(f"{e['prompt']}{e['completion']}\n\n" for e in split.few_shot)
    rows = split.train.select(range(num_prompts)).to_list()
    texts = [shots + row["prompt"] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(tokenizer(texts[i])["input_ids"]))
    started = time.monotonic()
    model.eval()
    completions: list[str] = []
    prompts_a_batch = max(1, batch // NUM_GENERATIONS)
    for start in range(0, len(order), prompts_a_batch):
        chosen = order[start : start + prompts_a_batch]
        encoded = tokenizer(
            [texts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.no_grad():
            output = model.generate(
                **encoded,
                do_sample=True,
                temperature=demo["temperature"],
                top_k=0,
                top_p=demo["top_p"],
                num_return_sequences=NUM_GENERATIONS,
                max_new_tokens=demo["max_completion_length"],
                stop_strings=demo["stop_strings"],
                tokenizer=tokenizer,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[:, encoded["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(new, skip_special_tokens=True)
    scores = has_answer(completions)
    sampled = time.monotonic()
    kept = json.loads(kept_path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(folder, bf16=False, **TRAINING),
            train_dataset=Dataset.from_list(kept),
            processing_class=tokenizer,
        )
        trainer.train()
        steps = trainer.state.global_step
        trainer.save_model(folder)
    return {"sample_s": sampled - started, "train_s": time.monotonic() - sampled,
            "examples": len(kept), "steps": steps, "correct": sum(s == 1.0 for s in scores)}  # fmt: skip


def measure(arm: str, num_prompts: int, kept_path: Path) -> dict[str, float]:
    """Run one arm in this process; add wall time without imports and the peak memory."""
    import torch
    import trl  # noqa: F401  # imports are not part of a round
    from trl import SFTTrainer  # noqa: F401

    import trl_selfplay.trainers.star.trainer  # noqa: F401

    torch.manual_seed(0)
    started = time.monotonic()
    if arm == "selfplay":
        measured = run_selfplay(num_prompts, kept_path)
    else:
        measured = run_by_hand(num_prompts, int(arm.removeprefix("generate-")), kept_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**measured, "wall_s": time.monotonic() - started, "peak_gib": peak}


def write_summary(num_prompts: int) -> None:
    """Write results/whole_round.md from the measurements present."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for path in sorted(RESULTS.glob("*-*.json")):
        record = json.loads(path.read_text())
        if record.get("num_prompts") == num_prompts:
            found[record["arm"]].append(record)
    medians = {
        arm: {k: statistics.median(r[k] for r in records) for k in records[0] if k != "arm"}
        for arm, records in found.items()
        if records
    }
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    lines = [
        "# A whole round against a script by hand",
        "",
        f"{num_prompts} prompts × {NUM_GENERATIONS} samples of the demo, float32, LoRA; medians. "
        f"{platform.machine()}, {platform.system()}, {os.environ.get('OMP_NUM_THREADS', 'all')} "
        f"threads; {versions}; "
        f"{datetime.date.today().isoformat()}. Script: `benchmarks/whole_round.py`.",
        "",
        "| arm | runs | wall s | sampling s | training s | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {arm} | {len(found[arm])} | {m['wall_s']:.0f} | {m['sample_s']:.0f} | "
        f"{m['train_s']:.0f} | {m['peak_gib']:.2f} |"
        for arm, m in medians.items()
    ]
    by_hand = {a: m for a, m in medians.items() if a != "selfplay"}
    if by_hand and "selfplay" in medians:
        best = min(by_hand, key=lambda a: by_hand[a]["wall_s"])
        ours = medians["selfplay"]
        lines += [
            "",
            f"Best by hand: {best}. Wall time {by_hand[best]['wall_s'] / ours['wall_s']:.2f}× ours, "
            f"sampling {by_hand[best]['sample_s'] / ours['sample_s']:.2f}×, peak memory "
            f"{by_hand[best]['peak_gib'] / ours['peak_gib']:.2f}×.",
            "",
            "Of each run, the fastest by hand of that run: " + "; ".join(compare_runs(found)) + ".",
        ]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def compare_runs(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return how the fastest script by hand compares with ours, run by run."""
    compared = []
    for ours in found["selfplay"]:
        same_run = [
            record
            for arm, records in found.items()
            for record in records
            if arm != "selfplay" and record["repeat"] == ours["repeat"]
        ]
        if same_run:
            best = min(same_run, key=lambda record: record["wall_s"])
            compared.append(
                f"{best['wall_s']:.0f} s against {ours['wall_s']:.0f} s, "
                f"{best['wall_s'] / ours['wall_s']:.2f}×, with {best['peak_gib']:.2f} GiB against "
                f"{ours['peak_gib']:.2f} GiB"
            )
    return compared


def main() -> None:
    """Measure what is missing, in alternation, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=12)
    parser.add_argument("--arm", choices=ARMS, help="run one arm here and print its record")
    args = parser.parse_args()
    kept_path = RESULTS / f"rows_of_{args.num_prompts}.json"
    if args.arm:
        print(json.dumps(measure(args.arm, args.num_prompts, kept_path)))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for repeat in range(args.repeats):
        for arm in ARMS:
            path = RESULTS / f"{arm}-{args.num_prompts}-{repeat}.json"
            if path.exists():
                continue
            command = [
                sys.executable,
                __file__,
                "--arm",
                arm,
                "--num-prompts",
                str(args.num_prompts),
            ]
            finished = subprocess.run(command, check=True, capture_output=True, text=True)
            record = json.loads(finished.stdout.strip().splitlines()[-1])
            record |= {"arm": arm, "num_prompts": args.num_prompts, "repeat": repeat}
            path.write_text(json.dumps(record, indent=1))
            write_summary(args.num_prompts)
    write_summary(args.num_prompts)


if __name__ == "__main__":
    main()
