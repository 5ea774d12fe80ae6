"""Training on majority votes against training on solutions, and against voting without training.

Two-digit addition with a scratchpad, a decoder of 0.8 M parameters with a token per character (see
addition.py). The base of each seed is saved at two points of its training, so that the same model
begins from a low and from a higher accuracy. From each, three rounds of STaR without hints, in which
every round goes on from the last one:

- gold: completions with the right answer are trained on.
- vote: completions with the answer of at least half of their prompt's samples. Solutions are read
  only to report how many labels are right.

Each round is scored on held-out sums: greedily, by the mean sample, and by the majority of 8 samples.
That of the untrained base is the control: what voting gives without training. Agreement is the mean
share of a training prompt's samples that have the most frequent answer. A seed takes some minutes on
one core and is a file under results/vote; what is there isn't run again.

    OMP_NUM_THREADS=1 python benchmarks/vote.py --seeds 0 1 2

Source: "Large Language Models Can Self-Improve", arXiv 2210.11610.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from trl_selfplay.demos.sums import (
    build_tokenizer,
    right_answer,
    row_of,
    rows_of,
    scratchpad,
    training_settings,
)

DATE = "2026-11-26"
ARMS = ("gold", "vote")
BASE_STEPS = {"low": 200, "high": 320}
NUM_BASE, NUM_TRAIN, NUM_HELD_OUT = 400, 150, 100
NUM_ROUNDS, ROUND_STEPS, NUM_SAMPLES = 3, 30, 8


def final_number(text: str) -> str | None:
    """Return what stands after the last step, if it is a number."""
    answer = text.rsplit(";", 1)[-1]
    return answer if answer.isdigit() else None


def draw_sums(seed: int) -> dict[str, list[tuple[int, int]]]:
    """Return different sums of two digits by part."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    held_out = NUM_BASE + NUM_TRAIN
    return {
        "base": pairs[:NUM_BASE],
        "train": pairs[NUM_BASE:held_out],
        "held_out": pairs[held_out : held_out + NUM_HELD_OUT],
    }


def build_bases(folder: Path, seed: int, sums: list[tuple[int, int]]) -> None:
    """Train a model on worked sums, and save it at two numbers of steps with its tokenizer."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    rows = [row_of(tokenizer, f"{a}+{b}=", scratchpad(a, b)) for a, b in sums]
    done = 0
    for name, steps in BASE_STEPS.items():  # the second goes on from the first
        trainer = SFTTrainer(
            model,
            SFTConfig(str(folder / name), **training_settings(seed + done), max_steps=steps - done),
            train_dataset=Dataset.from_list(rows).shuffle(seed=seed + done),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model(str(folder / name))
        model, done = trainer.model, steps


def run_arm(arm: str, base: Path, seed: int, sums: dict[str, list[tuple[int, int]]]) -> list[Any]:
    """Return what was measured before training and after each round."""
    from trl_selfplay import STaRConfig, STaRTrainer
    from trl_selfplay.rewards import VoteReward

    vote = VoteReward(0.5, normal_form=final_number, check_by=right_answer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = STaRTrainer(
            str(base),
            STaRConfig(
                f"{folder}/{arm}",
                **{**training_settings(seed), "learning_rate": 3e-4, "warmup_steps": 5},
                num_rounds=NUM_ROUNDS,
                max_steps=ROUND_STEPS,
                rationalize=False,
                start_from="previous",
                num_generations=NUM_SAMPLES,
                num_generations_eval=NUM_SAMPLES,
                temperature=1.0,
                temperature_eval=1.0,
                max_completion_length=28,
                load_best_round_at_end=False,
                on_empty_round="stop",
            ),
            train_dataset=rows_of(sums["train"]),
            eval_dataset=rows_of(sums["held_out"]),
            reward_funcs=vote if arm == "vote" else right_answer,
            eval_reward_funcs=right_answer,
        )
        trainer.train()
        lines = trainer.run.lines
        before = heldout_scores(lines[0]["eval_before"], trainer.run.root / "before")
        return [before, *(round_record(trainer, line) for line in lines)]


def heldout_scores(metrics: dict[str, float], folder: Path) -> dict[str, float]:
    """Return accuracies on held-out sums, from the samples in a folder."""
    from trl_selfplay.evaluation.estimates import mean_majority_at_k
    from trl_selfplay.rollouts.record import load_rollouts

    samples = [r for path in folder.rglob("sampled-*.parquet") for r in load_rollouts(path)]
    forms = [final_number(r.completion) for r in samples]
    majority = mean_majority_at_k(samples, forms, [1, NUM_SAMPLES])
    greedy = metrics["eval_accuracy"]
    return {"greedy": greedy, "sample": majority[1], "majority": majority[NUM_SAMPLES]}


def round_record(trainer: Any, line: dict[str, Any]) -> dict[str, float]:
    """Return a round's held-out accuracies, and what its samples and labels were like."""
    from trl_selfplay.rewards.vote import count_votes
    from trl_selfplay.rollouts.stored import load_samples

    folder = trainer.run.folder(line["round"])
    forms: dict[str, list[str | None]] = {}
    for rollout in load_samples(folder):
        forms.setdefault(rollout.prompt_id, []).append(final_number(rollout.completion))
    metrics = line["metrics"]
    record = {
        **heldout_scores(line["eval"], folder),
        "agreement": fmean(count_votes(of_prompt).confidence for of_prompt in forms.values()),
        "distinct": fmean(len({*of_prompt} - {None}) for of_prompt in forms.values()),
        "examples": line["examples"],
    }
    for name, key in (("decided", "play/vote_decided"), ("labels", "play/vote_label_accuracy")):
        if key in metrics:
            record[name] = metrics[key]
    return record


def run_seed(seed: int) -> dict[str, Any]:
    """Run both arms from both bases of a seed."""
    sums = draw_sums(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_bases(folder, seed, sums["base"])
        runs = {
            f"{base}-{arm}": run_arm(arm, folder / base, seed, sums)
            for base in BASE_STEPS
            for arm in ARMS
        }
    return {
        "seed": seed,
        "runs": runs,
        "machine": f"two shared {platform.machine()} cores, one thread",
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
    }


def write_summary(results: Path) -> None:
    """Write a Markdown page from the records present, beside their folder."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("seed-*.json"))]
    versions = ", ".join(f"{name} {number}" for name, number in records[0]["versions"].items())
    lines = [
        "# Training on majority votes",
        "",
        f"Two-digit addition, 0.8 M parameters; {NUM_TRAIN} training prompts with {NUM_SAMPLES} "
        f"samples at temperature 1, {NUM_ROUNDS} rounds of {ROUND_STEPS} steps that go on from each "
        f"other; {NUM_HELD_OUT} held-out prompts. {records[0]['machine']}; {versions}; seeds "
        f"{[r['seed'] for r in records]}; {DATE}. Script: `benchmarks/vote.py`, which explains the "
        "columns. Means over seeds, with the range of seeds for accuracies. The row `base` is the "
        "control: its column `majority` is voting without training.",
    ]
    columns = (
        "greedy",
        "sample",
        "majority",
        "agreement",
        "distinct",
        "decided",
        "labels",
        "examples",
    )
    for base in BASE_STEPS:
        for arm in ARMS:
            lines += ["", f"## {base} base, {arm}", "", f"| round | {' | '.join(columns)} |"]
            lines.append("|---" * (len(columns) + 1) + "|")
            runs = [r["runs"][f"{base}-{arm}"] for r in records]
            for index in range(max(map(len, runs))):
                found = [run[index] for run in runs if index < len(run)]
                cells = [cell(name, [f[name] for f in found if name in f]) for name in columns]
                lines.append(f"| {'base' if index == 0 else index - 1} | {' | '.join(cells)} |")
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")


def cell(name: str, values: list[float]) -> str:
    """Return the mean of the seeds, with the range for accuracies."""
    if not values:
        return "–"
    if name == "examples":
        return f"{fmean(values):.0f}"
    if name in ("greedy", "sample", "majority", "labels"):
        return f"{fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
    return f"{fmean(values):.2f}"


def main() -> None:
    """Run what is missing, a seed in a process of its own, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/vote")
    parser.add_argument("--here", action="store_true", help="run one seed in this process")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.here:
        record = run_seed(args.seeds[0])
        path = args.results / f"seed-{args.seeds[0]}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        return
    for seed in args.seeds:
        if not (args.results / f"seed-{seed}.json").exists():
            command = [sys.executable, __file__, "--here", "--seeds", str(seed)]
            subprocess.run([*command, "--results", str(args.results)], check=True)
    write_summary(args.results)


if __name__ == "__main__":
    main()
