"""Do ReST^EM, ReST and RFT help on the demo's task, and is it the filter that does?

The model and the prompts are the demo's, the settings those of the recipes. Arms:

- rest_em, rest, rft: the recipes.
- unfiltered: rest_em trained on everything that ended by itself, right or wrong.
- one_round: one round with three times the samples and the steps of three rounds.

Scores are those of 200 prompts that chose nothing; the weights are those of the round that the
selection prompts chose. Each arm and seed is a process of its own and a file under
results/em_family/; what is there is not run again:

    python benchmarks/em_family.py --seeds 0 1 2

STaR, gold answers and the untrained model on the same prompts are in results/learning.md.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import LoraConfig

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer, demo
from trl_selfplay.normal_forms import reasoning_path
from trl_selfplay.rewards import exact_reward
from trl_selfplay.run_folder import find_best_round

RESULTS = Path(__file__).parent / "results" / "em_family"
ARMS = ("rest_em", "rest", "rft", "unfiltered", "one_round")
NUM_PASS_AT_K, NUM_SAMPLES = 64, 8


def build_trainer(arm: str, seed: int, folder: str) -> tuple[Any, Any]:
    """Return the arm's trainer and the demo's sets."""
    split = demo.demo_split(seed)
    method = arm if arm in ("rest", "rft") else "rest_em"
    names = {field.name for field in fields(ReSTEMConfig)}
    settings = {k: v for k, v in demo.rest_em_defaults(method).items() if k in names}
    settings |= {"output_dir": folder, "seed": seed}
    arguments: dict[str, Any] = {"reward_funcs": exact_reward}
    if arm == "rest":
        arguments["reward_funcs"] = demo.position_reward
    if arm == "rft":
        arguments |= {
            "normal_form": reasoning_path,
            "gold_dataset": demo.gold_completions(split.train),
        }
    if arm == "unfiltered":
        settings["reward_threshold"] = 0.0
    if arm == "one_round":
        settings |= {
            "num_rounds": 1,
            "num_generations": 3 * settings["num_generations"],
            "max_per_prompt": 3 * settings["max_per_prompt"],
            "max_steps": 3 * settings["max_steps"],
        }
    trainer = ReSTEMTrainer(
        demo.load_demo_model_path(),
        ReSTEMConfig(**settings),
        train_dataset=split.train,
        eval_dataset=split.select,
        few_shot_examples=split.few_shot,
        peft_config=LoraConfig(**demo.DEMO_LORA),
        **arguments,
    )
    return trainer, split


def run_arm(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm; return its lines and its scores on the report set."""
    trainer, split = build_trainer(arm, seed, tempfile.mkdtemp())
    if arm == "unfiltered":  # every completion passes in training, and the true score is reported
        trainer.run.loads_best_round = False
    started = time.monotonic()
    trainer.train()
    minutes = (time.monotonic() - started) / 60
    trainer.args.num_generations_eval = 0
    play = trainer.self_play
    trainer.self_play = replace(play, collector=replace(play.collector, reward_threshold=1.0))
    report = trainer.evaluate(split.report)
    trainer.args.num_generations_eval = NUM_SAMPLES
    sampled = trainer.evaluate(split.report.select(range(NUM_PASS_AT_K)))
    report |= {name: value for name, value in sampled.items() if "pass@" in name}
    lines = trainer.run.lines
    return {
        "minutes": minutes,
        "lines": lines,
        "chosen_round": len(lines) - 1 if arm == "unfiltered" else find_best_round(trainer.run),
        "report": report,
    }


def write_summary() -> None:
    """Write results/em_family.md from the records present."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    text = [
        "# The EM family on the demo's task",
        "",
        "SmolLM2-135M-Instruct, word_sequence_reversal with 3 to 4 words, 96 training prompts, LoRA, "
        f"float32. {platform.machine()}, {platform.system()}, 2 CPU cores; {versions}; "
        f"{datetime.date.today().isoformat()}. Script: `benchmarks/em_family.py`. Accuracy is "
        "greedy on 200 prompts that chose nothing; `unfiltered` is its last round, the others the "
        "round that the selection prompts chose.",
        "",
        "| arm | seeds | accuracy | pass@8 | selected, by round | distinct, by round | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        records = {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{arm}-*.json"))}
        if not records:
            text.append(f"| {arm} | | not measured | | | | |")
        for name, record in records.items():
            report, lines = record["report"], record["lines"]
            kept = ", ".join(str(line["examples"]) for line in lines)
            distinct = ", ".join(f"{line['metrics']['play/distinct']:.2f}" for line in lines)
            text.append(
                f"| {arm} | {name.rsplit('-', 1)[1]} | {report['eval_accuracy']:.3f} | "
                f"{report.get(f'eval_pass@{NUM_SAMPLES}', float('nan')):.3f} | {kept} | {distinct} | "
                f"{record['minutes']:.1f} |"
            )
        if len(records) > 1:
            mean = fmean(r["report"]["eval_accuracy"] for r in records.values())
            text.append(f"| {arm}, mean | {len(records)} | {mean:.3f} | | | | |")
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")


def main() -> None:
    """Run what is missing, arm by arm, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--here", action="store_true", help="run one arm and seed in this process")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.here:
        arm, seed = args.arms[0], args.seeds[0]
        (RESULTS / f"{arm}-{seed}.json").write_text(json.dumps(run_arm(arm, seed)))
        return
    for seed in args.seeds:
        for arm in args.arms:
            if not (RESULTS / f"{arm}-{seed}.json").exists():
                command = [sys.executable, __file__, "--here", "--arms", arm, "--seeds", str(seed)]
                subprocess.run(command, check=True)
                write_summary()
    write_summary()


if __name__ == "__main__":
    main()
