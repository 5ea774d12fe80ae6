"""Digests of seeded tiny runs of every trainer: two versions that agree here behave alike.

    python tests/digests/run_digests.py --write FILE [--only NAME …]
    python tests/digests/run_digests.py --check tests/digests/before.json [--only NAME …]

Each run takes a few seconds on one core. Digested are, for each rollout, its token ids, finish and
rewards; what became of it in the selection; the rows that were trained on, SPIN's reference
log-probs among them; the trainable weights after every training and at the end; and the numbers of
rounds.jsonl. Floats count to the last bit, so both sides need the same machine and the same
releases of the libraries below. Nothing of the package is used but its public names and the layout
of its run folder.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # sums in another order differ in the last bit
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import datetime
import importlib.metadata
import io
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from reading import digest_json, digest_rows, digest_weights
from tiny_runs import (
    build_model,
    build_tokenizer,
    data_rows,
    even_share,
    gold_rows,
    last_digits,
    sum_rows,
)
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from trl_selfplay import (
    QuietSTaRConfig,
    QuietSTaRTrainer,
    ReSTEMConfig,
    ReSTEMTrainer,
    SPINConfig,
    SPINTrainer,
    STaRConfig,
    STaRTrainer,
)
from trl_selfplay.rewards import equations_reward, exact_reward

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "numpy",
    "tokenizers",
)
TIMES = ("seconds",)

COMMON = {
    "num_rounds": 2, "max_completion_length": 10, "per_device_train_batch_size": 4,
    "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "disable_tqdm": True,
    "gradient_checkpointing": False, "use_cpu": True, "seed": 7,
}  # fmt: skip
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
FEW_SHOT = [
    {"prompt": "Q 1 + 1", "completion": "so 1 + 1 = 2 <answer>2</answer>", "solution": "2"},
    {"prompt": "Q 2 + 1", "completion": "so 2 + 1 = 3 <answer>3</answer>", "solution": "3"},
]


# --- the runs ------------------------------------------------------------------------------------


def _graded(trainer: Any, config: Any, folder: Path, arguments: Mapping[str, Any], **fields: Any):
    settings = {**COMMON, "num_generations": 4, "temperature": 1.0, "max_steps": 3, **fields}
    tokenizer = build_tokenizer()
    return trainer(
        build_model(tokenizer),
        config(output_dir=str(folder), **settings),
        **{
            "train_dataset": sum_rows(0, 12),
            "eval_dataset": sum_rows(12, 16),
            "processing_class": tokenizer,
            "reward_funcs": exact_reward,
            **arguments,
        },
    )


def star_full(folder: Path) -> Any:
    """The paper's form, with several samples and held-out samples."""
    return _graded(STaRTrainer, STaRConfig, folder, {}, num_generations_eval=2)


def star_lora(folder: Path) -> Any:
    """Few-shot examples in the first round, history, a cap, and the last round's weights kept."""
    arguments = {"peft_config": LoraConfig(**LORA), "few_shot_examples": FEW_SHOT}
    return _graded(
        STaRTrainer, STaRConfig, folder, arguments, few_shot_rounds=1, history_rounds=1,
        max_per_prompt=2, start_from="previous", load_best_round_at_end=False,
        num_prompts_per_round=10,
    )  # fmt: skip


def star_packed(folder: Path) -> Any:
    """Greedy, packed, per-round steps and rates."""
    return _graded(
        STaRTrainer, STaRConfig, folder, {}, num_generations=1, temperature=0.0, packing=True,
        max_length=48, round_max_steps=[2, 3], round_learning_rates=[1e-2, 2e-2], max_steps=-1,
        load_best_round_at_end=False,
    )  # fmt: skip


def rest_em_filter(folder: Path) -> Any:
    return _graded(
        ReSTEMTrainer, ReSTEMConfig, folder, {"few_shot_examples": FEW_SHOT}, max_per_prompt=2,
        top_k=12, load_best_round_at_end=False,
    )  # fmt: skip


def rest_em_reward(folder: Path) -> Any:
    return _graded(
        ReSTEMTrainer, ReSTEMConfig, folder,
        {"reward_funcs": even_share, "peft_config": LoraConfig(**LORA)},
        loss_weighting="reward", history_rounds=1, load_best_round_at_end=False,
    )  # fmt: skip


def rest(folder: Path) -> Any:
    """Three Improve steps after each Grow step, gold among the samples, warm-up on gold."""
    return _graded(
        ReSTEMTrainer, ReSTEMConfig, folder,
        {
            "reward_funcs": even_share, "gold_dataset": gold_rows(0, 6),
            "eval_reward_funcs": exact_reward,
        },
        improve_thresholds=[10.0, 40.0, 70.0], threshold_kind="percentile", gold_ratio=0.5,
        warm_up_on_gold=True, start_from="previous", max_per_prompt=3, few_shot_in_training=False,
        round_learning_rates=[1e-2, 5e-3], improve_learning_rate_factor=0.7, history_rounds=1,
        load_best_round_at_end=False, max_steps=2,
    )  # fmt: skip


def rft(folder: Path) -> Any:
    return _graded(
        ReSTEMTrainer, partial(ReSTEMConfig.from_paper, "rft"), folder,
        {
            "reward_funcs": [exact_reward, equations_reward], "gold_dataset": gold_rows(0, 6),
            "normal_form": last_digits,
        },
        num_rounds=1, num_generations=8, gradient_accumulation_steps=1, max_steps=4,
        load_best_round_at_end=False,
    )  # fmt: skip


def _spin(folder: Path, arguments: Mapping[str, Any], **fields: Any) -> Any:
    tokenizer = build_tokenizer()
    settings = {**COMMON, "max_completion_length": 24, "max_steps": 3, **fields}
    return SPINTrainer(
        build_model(tokenizer),
        args=SPINConfig(str(folder), **settings),
        processing_class=tokenizer,
        **{"train_dataset": data_rows(0, 12), "eval_dataset": data_rows(12, 16), **arguments},
    )


def spin_full(folder: Path) -> Any:
    return _spin(folder, {}, load_best_round_at_end=False)


def spin_lora(folder: Path) -> Any:
    """With a score of the task, which chooses the round."""
    arguments = {"peft_config": LoraConfig(**LORA), "eval_reward_funcs": exact_reward}
    return _spin(folder, arguments, num_generations_eval=2)


def spin_history(folder: Path) -> Any:
    """Per-round betas and rates, and last round's pairs beside the newest."""
    return _spin(
        folder, {}, round_betas=[0.1, 1.0], round_learning_rates=[1e-2, 5e-3], history_rounds=1,
        loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], load_best_round_at_end=False,
    )  # fmt: skip


def quiet_star(folder: Path) -> Any:
    generator = torch.Generator().manual_seed(0)
    lengths = [12, 5, 9, 7, 11, 12, 8, 10]
    rows = [torch.randint(3, 20, (n,), generator=generator).tolist() for n in lengths]
    settings = {k: v for k, v in COMMON.items() if k not in ("num_rounds", "max_completion_length")}
    tokenizer = build_tokenizer()
    return QuietSTaRTrainer(
        build_model(tokenizer),
        QuietSTaRConfig(
            str(folder), **settings, thought_length=3, num_ahead_tokens=2, thought_fraction=0.6,
            max_steps=4, save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows[:3]}),
        processing_class=tokenizer,
    )  # fmt: skip


RUNS: dict[str, Callable[[Path], Any]] = {
    run.__name__: run
    for run in (
        star_full, star_lora, star_packed, rest_em_filter, rest_em_reward, rest, rft, spin_full,
        spin_lora, spin_history, quiet_star,
    )
}  # fmt: skip


# --- digests -------------------------------------------------------------------------------------


class Weights(TrainerCallback):
    """Keeps a digest of the trainable weights as each training ends."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.digests.append(digest_weights(model))


def digest_run(trainer: Any, folder: Path, ended: Sequence[str]) -> dict[str, Any]:
    """Return all digests of a finished run, by what they are of."""
    root = folder / "_rounds"
    found: dict[str, Any] = {
        "weights": {"end": digest_weights(trainer.model), "after each training": list(ended)}
    }
    found |= digest_rows(root)
    if (root / "rounds.jsonl").exists():
        for text in (root / "rounds.jsonl").read_text().splitlines():
            line = json.loads(text)
            found[f"line {line['round']}"] = {
                k: digest_json(v) for k, v in line.items() if k not in TIMES
            }
    logs = [
        {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
        for entry in trainer.state.log_history
    ]
    found["logged losses"] = digest_json([entry["loss"] for entry in logs if "loss" in entry])
    found["logged evaluations"] = digest_json(
        [
            {k: v for k, v in entry.items() if k.startswith("eval_")}
            for entry in logs
            if any(k.startswith("eval_") for k in entry)
        ]
    )
    return found


def play(name: str) -> dict[str, Any]:
    """Run one by its name, in a folder of its own, and return its digests."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, weights = Path(scratch) / "run", Weights()
        with redirect_stdout(io.StringIO()):
            trainer = RUNS[name](folder)
            trainer.add_callback(weights)
            trainer.train()
        return digest_run(trainer, folder, weights.digests)


# --- comparison ----------------------------------------------------------------------------------


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return the names of all that `before` has and `now` lacks or has otherwise."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [name]
    found = []
    for key, value in before.items():
        inner = f"{name} / {key}".removeprefix(" / ")
        found += differences(value, now[key], inner) if key in now else [f"{inner} (missing)"]
    return found


def additions(before: Any, now: Any, name: str = "") -> list[str]:
    """Return the names of what only `now` has, which is no difference."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return []
    found = []
    for key, value in now.items():
        inner = f"{name} / {key}".removeprefix(" / ")
        found += additions(before[key], value, inner) if key in before else [inner]
    return found


def versions() -> dict[str, str]:
    """Return the releases that floats depend on."""
    return {
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def main() -> int:
    """Write digests or compare with them; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description="Digests of seeded tiny runs of every trainer.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Write the digests there.")
    parser.add_argument("--check", type=Path, metavar="FILE", help="Compare with those in FILE.")
    parser.add_argument("--commit", help="What to write down as the version that was run.")
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    disable_progress_bar()
    now: dict[str, Any] = {}
    for name in options.only:
        started = time.monotonic()
        now[name] = play(name)
        print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    if options.write:
        record = {
            "commit": options.commit,
            "date": datetime.date.today().isoformat(),
            "versions": versions(),
            "runs": now,
        }
        options.write.write_text(json.dumps(record, indent=1) + "\n")
    if not options.check:
        return 0
    before = json.loads(options.check.read_text())
    if before["versions"] != versions():
        changed = differences(before["versions"], versions())
        print(f"other releases than those of {options.check}: {', '.join(changed)}")
    differing = []
    for name in options.only:
        for text in differences(before["runs"].get(name, {}), now[name], name):
            differing.append(text)
            print(f"differs: {text}")
        for text in additions(before["runs"].get(name, {}), now[name], name):
            print(f"new: {text}")
    print(f"{len(options.only)} runs, {len(differing)} differences")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
