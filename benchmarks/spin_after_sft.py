"""SPIN where the paper puts it: after fine-tuning on the same data. Is it worth more than more of that?

A small decoder with a token a character learns sums with a scratchpad (`benchmarks/addition.py`) from
a few hundred worked ones until its learning rate has decayed to 0. Arms, each from these weights:

- spin: SPIN on the same sums, 3 rounds.
- sft_steps: fine-tuning on them again, as many optimizer steps as spin, as many sums a step.
- sft_time: the same for as many seconds as spin took to sample, to score the opponent and to train.

Scores on held-out sums that chose nothing: the share with the right answer, greedy, and the mean
log-probability a token of the right scratchpads. Spin's learning rate, beta and steps are those with
the best share on a seed that isn't reported; fine-tuning's rate isn't tuned. Seconds are CPU seconds
of the process without those for scores. An arm, seed and setting is a file under
results/spin_after_sft; what is there is not run again:

    OMP_NUM_THREADS=1 python benchmarks/spin_after_sft.py
"""

import argparse
import datetime
import json
import math
import platform
import random
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from datasets import Dataset
from spin import TimedTrainer, spread
from transformers import LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_selfplay import SPINConfig
from trl_selfplay.demos.sums import Sum, build_model, build_tokenizer, row_of, scratchpad

RESULTS = Path(__file__).parent / "results" / "spin_after_sft"
NUM_TRAIN, NUM_HELD_OUT = 400, 500
BASE_STEPS, NUM_ROUNDS, BATCH = 1200, 3, 16
TUNING_SEED = 100
# Of spin: learning rate, beta, and steps per round.
SPIN_GRID = (
    *((3e-5, 0.1, 50), (1e-4, 0.1, 50), (3e-4, 0.1, 50)),
    *((3e-5, 0.1, 10), (1e-4, 0.1, 10), (1e-4, 1.0, 10)),
)
GRIDS: dict[str, list[dict[str, float]]] = {
    "spin": [dict(zip(("rate", "beta", "steps"), values, strict=True)) for values in SPIN_GRID],
    "sft_steps": [{"rate": 3e-4}],
    "sft_time": [{"rate": 3e-4}],
}


def draw_sums(seed: int) -> tuple[list[Sum], list[Sum]]:
    """Return different sums of two numbers with as many digits, one to three: for training, held out."""
    rng = random.Random(seed)
    sums: dict[Sum, None] = {}
    while len(sums) < NUM_TRAIN + NUM_HELD_OUT:
        digits = rng.choice((1, 2, 2, 2, 3, 3))
        first, last = 10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1
        sums[rng.randint(first, last), rng.randint(first, last)] = None
    ordered = list(sums)
    rng.shuffle(ordered)
    return ordered[:NUM_TRAIN], ordered[NUM_TRAIN:]


def settings(seed: int, rate: float, steps: int) -> dict[str, Any]:
    """Return what all training has in common."""
    return {
        "output_dir": tempfile.mkdtemp(), "seed": seed, "learning_rate": rate, "max_steps": steps,
        "per_device_train_batch_size": BATCH, "lr_scheduler_type": "linear", "warmup_steps": 10,
        "weight_decay": 0.0, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "save_strategy": "no", "logging_steps": 1000, "report_to": [], "disable_tqdm": True,
    }  # fmt: skip


class Scorer:
    """Scores a model on held-out sums."""

    def __init__(self, tokenizer: Any, sums: list[Sum]) -> None:
        self.tokenizer = tokenizer
        self.groups: dict[int, list[Sum]] = {}
        for a, b in sums:
            self.groups.setdefault(len(str(a)), []).append((a, b))
        self.count = len(sums)

    @torch.inference_mode()
    def __call__(self, model: Any) -> dict[str, float]:
        """Return the share of right answers, and the log-probability per token of right scratchpads."""
        right, logps, tokens = 0, 0.0, 0
        was_training = model.training
        model.eval()
        for sums in self.groups.values():
            rows = [row_of(self.tokenizer, f"{a}+{b}=", scratchpad(a, b)) for a, b in sums]
            length = len(rows[0]["labels"]) - sum(x != -100 for x in rows[0]["labels"])
            prompts = torch.tensor([row["input_ids"][:length] for row in rows])
            out = model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                max_new_tokens=40, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            texts = self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            right += sum(
                t.rsplit(";", 1)[-1] == str(a + b) for t, (a, b) in zip(texts, sums, strict=True)
            )
            most = max(len(row["input_ids"]) for row in rows)
            ids = torch.tensor([r["input_ids"] + [0] * (most - len(r["input_ids"])) for r in rows])
            labels = torch.tensor([r["labels"] + [-100] * (most - len(r["labels"])) for r in rows])
            found = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            chosen = found.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
            counted = labels[:, 1:] != -100
            logps, tokens = logps + float(chosen[counted].sum()), tokens + int(counted.sum())
        model.train(was_training)
        return {"right": right / self.count, "logps": logps / tokens}


class Watch(TrainerCallback):
    """Scores the model at steps of fine-tuning, or after spin's last round, with the seconds by then."""

    def __init__(self, score: Callable[[Any], dict[str, float]], steps: list[int]) -> None:
        self.score, self.steps = score, steps
        self.scores: list[dict[str, float]] = []
        self.started = self.apart = 0.0
        self.trainer: Any = None

    def note(self, model: Any, **more: Any) -> None:
        """Add the scores of a model."""
        begun = time.process_time()
        apart = self.apart + (self.trainer.apart if self.trainer else 0.0)
        self.scores.append({"seconds": begun - self.started - apart, **self.score(model), **more})
        self.apart += time.process_time() - begun

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Score fine-tuning at its steps."""
        if state.global_step in self.steps:
            self.note(model, steps=state.global_step)

    def on_round_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Score SPIN after a round."""
        line = self.trainer.run.lines[-1]
        if line["round"] + 1 < NUM_ROUNDS:
            return
        self.note(
            model,
            steps=sum(each["steps"] for each in self.trainer.run.lines),
            pairs=line["examples"],
            eval=line["eval"],
        )


def fine_tune(
    model: Any, tokenizer: Any, sums: list[Sum], seed: int, rate: float, watch: Watch, steps: int
) -> None:
    """Train a model on right scratchpads."""
    rows = [row_of(tokenizer, f"{a}+{b}=", scratchpad(a, b)) for a, b in sums]
    trainer = SFTTrainer(
        model,
        SFTConfig(**settings(seed, rate, steps)),
        train_dataset=Dataset.from_list(rows).shuffle(seed=seed),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    watch.started = time.process_time()
    trainer.train()


def play(
    model: Any,
    tokenizer: Any,
    sums: list[Sum],
    held_out: list[Sum],
    seed: int,
    watch: Watch,
    setting: dict[str, float],
) -> None:
    """Train a model with SPIN."""
    train, test = (
        Dataset.from_list(
            [{"prompt": f"{a}+{b}=", "completion": scratchpad(a, b)} for a, b in part]
        )
        for part in (sums, held_out[:100])
    )
    trainer = TimedTrainer(
        model,
        args=SPINConfig(
            **settings(seed, setting["rate"], int(setting["steps"])), num_rounds=NUM_ROUNDS,
            beta=setting["beta"], max_completion_length=40, load_best_round_at_end=False,
            on_empty_round="stop",
        ),
        train_dataset=train, eval_dataset=test, processing_class=tokenizer, callbacks=[watch],
    )  # fmt: skip
    watch.trainer, watch.started = trainer, time.process_time()
    trainer.train()


def run(arm: str, seed: int, setting: dict[str, float]) -> dict[str, Any]:
    """Return the scores of an arm at its end, or of fine-tuning before it for `base`."""
    tokenizer = build_tokenizer()
    sums, held_out = draw_sums(seed)
    score = Scorer(tokenizer, held_out)
    folder = Path(tempfile.gettempdir()) / f"spin-after-sft-{BASE_STEPS}-{NUM_TRAIN}-{seed}"
    if arm == "base":
        model = build_model(tokenizer, seed, hidden_size=96, num_layers=3)
        steps = [BASE_STEPS * part // 6 for part in range(1, 7)]
        watch = Watch(score, steps)
        fine_tune(model, tokenizer, sums, seed, 1e-3, watch, BASE_STEPS)
        model.save_pretrained(folder)
        return {"scores": watch.scores}
    model = LlamaForCausalLM.from_pretrained(folder)
    if arm == "spin":
        watch = Watch(score, [])
        play(model, tokenizer, sums, held_out, seed, watch, setting)
        return {"scores": watch.scores}
    spin = best("spin", seed)["scores"][-1]
    steps = spin["steps"]
    if arm == "sft_time":
        per_step = best("sft_steps", seed)["scores"][-1]
        speed = per_step["seconds"] / per_step["steps"]
        steps = max(1, round(spin["seconds"] / speed))
    watch = Watch(score, [steps])
    fine_tune(model, tokenizer, sums, seed, setting["rate"], watch, steps)
    return {"scores": watch.scores}


def record_path(arm: str, seed: int, setting: dict[str, float]) -> Path:
    """Return where the record of an arm, seed and setting is kept."""
    return RESULTS / ("-".join([arm, str(seed), *(f"{v:g}" for v in setting.values())]) + ".json")


def load(arm: str, seed: int, setting: dict[str, float]) -> dict[str, Any]:
    """Return a record, run now if it isn't there."""
    path = record_path(arm, seed, setting)
    if not path.exists():
        if arm != "base":
            load("base", seed, {})
        record = run(arm, seed, setting)
        path.write_text(json.dumps(record, indent=1))
        last = record["scores"][-1]
        print(path.stem, {name: last[name] for name in ("right", "logps", "seconds")}, flush=True)
    return json.loads(path.read_text())


def best_setting(arm: str) -> dict[str, float]:
    """Return the setting with the highest share of right answers at the end on the tuning seed."""
    if len(GRIDS[arm]) == 1:
        return GRIDS[arm][0]
    return max(
        GRIDS[arm], key=lambda setting: load(arm, TUNING_SEED, setting)["scores"][-1]["right"]
    )


def best(arm: str, seed: int) -> dict[str, Any]:
    """Return the record of an arm with its tuned setting."""
    return load(arm, seed, best_setting(arm))


def write_summary(seeds: list[int]) -> None:
    """Write results/spin_after_sft.md."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "torch"))
    bases = [load("base", seed, {})["scores"] for seed in seeds]
    found = {arm: [best(arm, seed)["scores"] for seed in seeds] for arm in GRIDS}
    text = [
        "# SPIN after fine-tuning on the same data",
        "",
        f"A decoder of 0.3 M parameters, {NUM_TRAIN} worked sums of one to three digits, "
        f"{NUM_HELD_OUT} held-out sums that chose nothing. Fine-tuned for {BASE_STEPS} steps of "
        f"{BATCH}, then each arm; spin has {NUM_ROUNDS} rounds. "
        f"{platform.machine()}, {platform.system()}, one thread of a shared machine; {versions}; "
        f"seeds {seeds}; {datetime.date.today().isoformat()}. Script: "
        "`benchmarks/spin_after_sft.py`. Mean [minimum, maximum] over seeds.",
        "",
        "| arm | steps | right | log-probability a token | win rate | pairs | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    text += [f"| fine-tuned | {_row([scores[index] for scores in bases])}" for index in (-2, -1)]
    for arm, records in found.items():
        text.append(f"| {arm} | {_row([scores[-1] for scores in records])}")
    text += [
        "",
        "At the end, paired by seed, share of right answers: difference, standard error",
        "",
    ]
    gains = {"the fine-tuned model": bases, **{arm: found[arm] for arm in list(GRIDS)[1:]}}
    for name, others in gains.items():
        pairs = zip(found["spin"], others, strict=True)
        gaps = [mine[-1]["right"] - other[-1]["right"] for mine, other in pairs]
        error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        text.append(f"- spin less {name}: {fmean(gaps):+.3f}, {error:.3f} ({spread(gaps)})")
    text += ["", f"Spin's settings, by the share of right answers on seed {TUNING_SEED}:", ""]
    for setting in GRIDS["spin"]:
        right = load("spin", TUNING_SEED, setting)["scores"][-1]["right"]
        name = ", ".join(f"{key} {value:g}" for key, value in setting.items())
        text.append(f"- {name}: {right:.3f}")
    start = load("base", TUNING_SEED, {})["scores"][-1]["right"]
    text.append(f"- before: {start:.3f}")
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")


def _row(entries: list[dict[str, Any]]) -> str:
    def mean(values: list[Any], digits: int) -> str:
        return f"{fmean(values):.{digits}f}" if values else ""

    wins = [e["eval"]["eval_win_rate"] for e in entries if "eval_win_rate" in e.get("eval", {})]
    return (
        f"{mean([e['steps'] for e in entries], 0)} | {spread([e['right'] for e in entries])} | "
        f"{spread([e['logps'] for e in entries])} | {mean(wins, 2)} | "
        f"{mean([e['pairs'] for e in entries if 'pairs' in e], 0)} | "
        f"{mean([e['seconds'] for e in entries], 0)} |"
    )


def main() -> None:
    """Run what is missing, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_summary(args.seeds)


if __name__ == "__main__":
    main()
