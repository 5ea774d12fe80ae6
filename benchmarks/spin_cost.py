"""What does a round of SPIN's training cost? Time and peak memory against two other ways.

All arms train on the same pairs of the demo's questions, for the same steps, on its model:

- spin: SPINTrainer. Both completions of all pairs are scored once, then trained on; no second
  model is held.
- second_model: DPOTrainer with a second model as reference, which is forwarded in every step.
- sft: SFTTrainer with the same rows, so that a forward has the same tokens: both completions of a
  pair are rows of their own.

With LoRA and with full fine-tuning, in float32. Nothing is sampled: the rejected completion of a
question is a fixed text as long as an untrained model's. Peak memory is the resident set's highest
value from the first pair scored to the last step, after everything is loaded. Each measurement is
a process of its own; arms alternate. Finished ones are kept in the results folder:

    OMP_NUM_THREADS=1 python benchmarks/spin_cost.py --repeats 2
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from recipe_demos import demo_lora
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_selfplay import SPINConfig, SPINTrainer
from trl_selfplay.demos import style, words
from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts
from trl_selfplay.rounds.loop import PlayedRound

RESULTS = Path(__file__).parent / "results" / "spin_cost"
ARMS = ("spin", "second_model", "sft")
TUNING = ("lora", "full")
NUM_PAIRS, BATCH = 8, 4
TARGET = 1.1  # of sft's peak memory


def build_pairs(tokenizer: Any) -> Dataset:
    """Return pairs as token ids: each question's answer, and a refusal in other words."""
    rows = []
    for row in style.build_questions(NUM_PAIRS, seed=0):
        messages = row["messages"]
        prompt_ids = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        texts = (messages[-1]["content"], "I am not sure that I understand the question. " * 3)
        chosen, rejected = (
            [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            for text in texts
        )
        rows.append({"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(rows)


class FixedPairsTrainer(SPINTrainer):
    """SPIN whose round has given pairs, in place of sampled ones."""

    pairs: Dataset
    scoring_s = forward_s = 0.0
    num_forwards = 0

    def compute_policy_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Count and time the forwards that score the opponent and check it."""
        started = time.monotonic()
        scores = super().compute_policy_log_probs(model, inputs)
        self.forward_s += time.monotonic() - started
        self.num_forwards += 1
        return scores

    def play_round(self, round_index: int) -> PlayedRound:
        """Score the pairs under the policy as it is."""
        started = time.monotonic()
        rows = self.store_reference(self.pairs, self.run.folder(round_index) / "dataset")
        self.scoring_s, self.forward_s = time.monotonic() - started, 0.0
        return PlayedRound(rows, len(rows), Funnel(0, 0, OutcomeCounts()), (), {}, {})


def build_trainer(arm: str, tuning: str, folder: str) -> Any:
    """Return the arm's trainer, ready to train."""
    path = words.load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = build_pairs(tokenizer)
    peft_config = demo_lora("spin") if tuning == "lora" else None
    settings: dict[str, Any] = {
        "max_steps": NUM_PAIRS // BATCH,
        "learning_rate": 1e-5,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 100,
    }
    if arm == "sft":
        rows = [
            {
                "input_ids": [*pair["prompt_ids"], *pair[side]],
                "labels": [-100] * len(pair["prompt_ids"]) + pair[side],
            }
            for pair in pairs
            for side in ("chosen_ids", "rejected_ids")
        ]
        return SFTTrainer(
            path,
            SFTConfig(folder, per_device_train_batch_size=2 * BATCH, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    settings["per_device_train_batch_size"] = BATCH
    if arm == "spin":
        conversations = [{"messages": r["messages"]} for r in style.build_questions(2, seed=1)]
        trainer: Any = FixedPairsTrainer(
            path,
            args=SPINConfig(folder, num_rounds=1, **settings),
            train_dataset=Dataset.from_list(conversations),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.pairs = pairs
        return trainer
    trainer = DPOTrainer(
        path,
        ref_model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=DPOConfig(folder, **settings),
        train_dataset=Dataset.from_list([{"prompt": "?", "chosen": " yes", "rejected": " no"}]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train_dataset = pairs
    return trainer


def measure(arm: str, tuning: str) -> dict[str, float]:
    """Train once; return seconds and the peak of the resident set."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(arm, tuning, folder)
        loaded = resident_gib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is now
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        peak = resident_gib("VmHWM")
        if arm == "spin":
            (line,) = trainer.run.lines
            steps, train_s = line["steps"], line["seconds"]["train"]
        else:
            steps, train_s = trainer.state.global_step, seconds
    scoring_s = getattr(trainer, "scoring_s", 0.0)
    return {
        "steps": steps,
        "scoring_s": scoring_s,
        "check_s": getattr(trainer, "forward_s", 0.0),
        "scoring_forwards": getattr(trainer, "num_forwards", 0),
        "train_s": train_s,
        "round_s": scoring_s + train_s,
        "loaded_gib": loaded,
        "peak_gib": peak,
    }


def resident_gib(field: str) -> float:
    """Return a field of this process's memory status, in GiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 2**20 for x in status if x.startswith(f"{field}:"))


def write_summary() -> None:
    """Write results/spin_cost.md from the measurements present."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    text = [
        "# What a round of SPIN's training costs",
        "",
        f"SmolLM2-135M-Instruct, float32, {NUM_PAIRS} pairs, {NUM_PAIRS // BATCH} steps of {BATCH}. "
        f"{platform.machine()}, {platform.system()}, one thread; {versions}; "
        f"{datetime.date.today().isoformat()}. Script: `benchmarks/spin_cost.py`. Medians [minimum, "
        "maximum] of processes that alternate. sft has the same rows and tokens in a forward. With "
        "one epoch, as here, scoring once costs as much as a reference model's forwards; further "
        "epochs don't score again. spin's training includes the check of the opponent, a forward of "
        "the first batch, which is much of two steps and little of a real round.",
        "",
        "| tuning | arm | runs | scoring s | training s | of which the check s | both s | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    peaks: dict[tuple[str, str], float] = {}
    for tuning in TUNING:
        for arm in ARMS:
            records = [json.loads(p.read_text()) for p in RESULTS.glob(f"{tuning}-{arm}-*.json")]
            if not records:
                text.append(f"| {tuning} | {arm} | not measured | | | | | |")
                continue
            cells = " | ".join(
                spread([r[name] for r in records], digits)
                for name, digits in
                (("scoring_s", 1), ("train_s", 1), ("check_s", 1), ("round_s", 1), ("peak_gib", 2))
            )  # fmt: skip
            text.append(f"| {tuning} | {arm} | {len(records)} | {cells} |")
            peaks[tuning, arm] = median(r["peak_gib"] for r in records)
    text.append("")
    for tuning in TUNING:
        if all((tuning, arm) in peaks for arm in ARMS):
            spin, second, sft = (peaks[tuning, arm] for arm in ARMS)
            text.append(
                f"- {tuning}: spin's peak is {spin / sft:.2f}× sft's (target: at most {TARGET}×, "
                f"{'met' if spin <= TARGET * sft else 'missed'}) and {spin / second:.2f}× that with "
                "a second model."
            )
    forwards = {
        json.loads(p.read_text())["scoring_forwards"] for p in RESULTS.glob("*-spin-*.json")
    }
    if forwards:
        text.append(
            f"- Forwards that score the opponent, of {NUM_PAIRS // BATCH} batches a round: "
            f"{', '.join(map(str, sorted(forwards)))}, the check included."
        )
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")


def spread(values: list[float], digits: int) -> str:
    """Return the median and the range."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> None:
    """Measure what is missing, in alternation, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--here", nargs=2, metavar=("TUNING", "ARM"), help="measure once, print")
    args = parser.parse_args()
    if args.here:
        tuning, arm = args.here
        print(json.dumps(measure(arm, tuning)))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for repeat in range(args.repeats):
        for tuning in TUNING:
            for arm in ARMS:
                path = RESULTS / f"{tuning}-{arm}-{repeat}.json"
                if not path.exists():
                    command = [sys.executable, __file__, "--here", tuning, arm]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    record = json.loads(done.stdout.strip().splitlines()[-1])
                    path.write_text(json.dumps(record, indent=1))
                    write_summary()
    write_summary()


if __name__ == "__main__":
    main()
