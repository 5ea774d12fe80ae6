"""Does SPIN's demo learn, and more than fine-tuning on the same completions? With its controls.

Arms, each with the recipe's model, questions and settings (`recipes/spin.py`):

- spin: the recipe.
- sft_steps: fine-tuning on the data's completions, as many optimizer steps as spin, as many
  completions a step.
- sft_time: the same for as many seconds as spin took to sample, to score the opponent and to train.
- base_opponent: spin with the untrained model as opponent in the loss throughout, which is what
  TRL compares with under a new PEFT configuration; the samples are the policy's own. At spin's
  betas its loss is next to 0 after the first round, and so are its steps.
- spin_01 and base_opponent_01: both at beta 0.1, DPO's default, in all rounds.

Scores after each round, on held-out questions that chose nothing: mean log-probability a token of
the data's completions; the share of pairs in which the policy tells the data from the opponent of
the round; the share of greedy completions with the right result in the data's style. The fine-tuned
arms are scored where they have taken the steps, or the seconds, that spin had taken by then.

The learning rate of each fine-tuned arm is tuned on a seed that isn't reported, by the held-out
log-probability at the end; the recipe's settings, which the other arms share, were found on that
seed in a handful of runs, after a run at twice the rate had ended in cut completions on seed 1.
Seconds are CPU seconds of the process without those for held-out scores. An arm, seed and rate is a
process of its own and a file under results/spin; what is there is not run again:

    OMP_NUM_THREADS=1 python benchmarks/spin.py --tune
    OMP_NUM_THREADS=1 python benchmarks/spin.py --seeds 0 1 2
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset
from recipe_demos import demo_flags, demo_lora, demo_settings
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_selfplay import SPINConfig, SPINTrainer
from trl_selfplay.demos import style, words
from trl_selfplay.rounds.weights import copy_into

RESULTS = Path(__file__).parent / "results" / "spin"
ARMS = ("spin", "sft_steps", "sft_time", "base_opponent", "spin_01", "base_opponent_01")
TUNING_SEED = 100
RATES = dict.fromkeys(("sft_steps", "sft_time"), (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3))


class TimedTrainer(SPINTrainer):
    """SPIN, with the seconds for held-out scores kept apart and scores after each round."""

    started = apart = 0.0

    @contextmanager
    def keep_apart(self) -> Iterator[None]:
        """Don't count the seconds spent inside."""
        begun = time.process_time()
        try:
            yield
        finally:
            self.apart += time.process_time() - begun

    def _play_heldout(self, round_index: int, folder: Path) -> None:
        with self.keep_apart():
            super()._play_heldout(round_index, folder)

    def score_heldout(self, round_index: int, folder: Path | None) -> Any:
        """Score held-out prompts."""
        with self.keep_apart():
            return super().score_heldout(round_index, folder)


class BaseOpponentTrainer(TimedTrainer):
    """SPIN against the untrained model: TRL's reference under a new PEFT configuration.

    Held-out pairs are still measured against the policy as it entered the round, as in spin.
    """

    measures = False

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Return log-probs without adapters, but for held-out pairs."""
        if self.measures:
            return super().compute_ref_log_probs(model, inputs)
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return super().compute_ref_log_probs(model, inputs)

    @contextmanager
    def keep_apart(self) -> Iterator[None]:
        """Ask the policy inside, where held-out pairs are scored."""
        self.measures = True
        try:
            with super().keep_apart():
                yield
        finally:
            self.measures = False


def build_trainer(arm: str, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """Return the arm's trainer with the recipe's settings, and the held-out rows."""
    settings = demo_settings("spin", SPINConfig)
    settings |= {"output_dir": tempfile.mkdtemp(), "seed": seed}
    settings |= {"load_best_round_at_end": False, "disable_tqdm": True}
    if arm.endswith("_01"):
        settings["round_betas"] = [0.1] * settings["num_rounds"]
    train, test, rows = style.style_split(seed)
    cls = BaseOpponentTrainer if arm.startswith("base_opponent") else TimedTrainer
    trainer = cls(
        words.load_demo_model_path(),
        args=SPINConfig(**settings),
        train_dataset=train,
        eval_dataset=test,
        peft_config=demo_lora("spin"),
    )
    return trainer, rows


class AfterRounds(TrainerCallback):
    """Keeps scores, steps and seconds after each round of SPIN."""

    def __init__(self, trainer: TimedTrainer, rows: list[dict[str, Any]]) -> None:
        self.trainer, self.rows = trainer, rows
        self.rounds: list[dict[str, Any]] = []

    def on_round_end(self, *args: Any, **kwargs: Any) -> None:
        """Add a round."""
        trainer, line = self.trainer, self.trainer.run.lines[-1]
        seconds = time.process_time() - trainer.started - trainer.apart
        with trainer.keep_apart():
            right = style.share_right(trainer, self.rows)
        self.rounds.append(
            {
                "seconds": seconds,
                "steps": sum(line["steps"] for line in trainer.run.lines),
                "right": right,
                "examples": line["examples"],
                "eval": line["eval"],
                "metrics": line["metrics"],
                "wall_seconds": line["seconds"],
            }
        )


def run_spin(arm: str, seed: int) -> dict[str, Any]:
    """Train one of the arms that play; return their scores by round."""
    trainer, rows = build_trainer(arm, seed)
    after = AfterRounds(trainer, rows)
    trainer.add_callback(after)
    before = style.share_right(trainer, rows)
    trainer.started = time.process_time()
    trainer.train()
    scores = trainer.run.lines[0]["eval_before"]
    return {"before": {"right": before, "eval": scores}, "rounds": after.rounds}


class AtSteps(TrainerCallback):
    """Scores a fine-tuned model at given steps, with another trainer that holds its weights."""

    def __init__(self, steps: list[int], score: Callable[[Any], dict[str, Any]]) -> None:
        self.steps, self.score = steps, score
        self.rounds: list[dict[str, Any]] = []
        self.started = self.apart = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Score where a round of spin ended."""
        if state.global_step in self.steps:
            now = time.process_time()
            seconds = now - self.started - self.apart
            scores = {"seconds": seconds, "steps": state.global_step, **self.score(model)}
            self.rounds += [scores] * self.steps.count(state.global_step)
            self.apart += time.process_time() - now


def run_sft(arm: str, seed: int, rate: float) -> dict[str, Any]:
    """Fine-tune on the data's completions; return the scores where spin's rounds ended."""
    spin = load("spin", seed)["rounds"]
    steps = [entry["steps"] for entry in spin]
    if seed == TUNING_SEED:  # only the end chooses a rate
        spin, steps = spin[-1:], steps[-1:]
    if arm == "sft_time":
        of_steps = load("sft_steps", seed)["rounds"][-1]
        seconds_a_step = of_steps["seconds"] / of_steps["steps"]
        steps = [max(1, round(entry["seconds"] / seconds_a_step)) for entry in spin]
    scorer, rows = build_trainer("spin", seed)
    args = scorer.args

    def score(model: Any) -> dict[str, Any]:
        copy_into(scorer.model, dict(model.named_parameters()), "the fine-tuned model")
        return {"right": style.share_right(scorer, rows), "eval": scorer.evaluate()}

    tokens = [scorer.chosen[row.prompt_id] for row in scorer.self_play.rows]
    trainer = SFTTrainer(
        words.load_demo_model_path(),
        SFTConfig(
            args.output_dir, bf16=False, max_steps=steps[-1], learning_rate=rate, seed=seed,
            per_device_train_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            lr_scheduler_type=args.lr_scheduler_type, warmup_steps=args.warmup_steps,
            gradient_checkpointing=args.gradient_checkpointing, max_length=args.max_length,
            save_strategy="no", report_to=[], disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "input_ids": [*t.prompt_ids, *t.chosen_ids],
                    "labels": [-100] * len(t.prompt_ids) + list(t.chosen_ids),
                }
                for t in tokens
            ]
        ).shuffle(seed=seed),
        processing_class=scorer.processing_class,
        peft_config=demo_lora("spin"),
    )  # fmt: skip
    copy_into(trainer.model, dict(scorer.model.named_parameters()), "spin's first adapter")
    at_steps = AtSteps(steps, score)
    trainer.add_callback(at_steps)
    trainer.train()
    return {"rounds": at_steps.rounds}


def record_path(arm: str, seed: int, rate: float | None = None) -> Path:
    """Return where the record of an arm and seed is kept, and of a learning rate that was tuned."""
    return RESULTS / f"{arm}-{seed}{'' if rate is None else f'-{rate:g}'}.json"


def best_rate(arm: str) -> float | None:
    """Return the rate with the best held-out log-probability on the tuning seed, for tuned arms."""
    if arm not in RATES:
        return None
    paths = {rate: record_path(arm, TUNING_SEED, rate) for rate in RATES[arm]}
    missing = [rate for rate, path in paths.items() if not path.exists()]
    if missing:
        raise SystemExit(f"{arm} is not tuned at {missing}: run this script with --tune first.")
    scores = {r: json.loads(p.read_text())["rounds"][-1] for r, p in paths.items()}
    return max(scores, key=lambda rate: scores[rate]["eval"]["eval_logps"])


def load(arm: str, seed: int) -> dict[str, Any]:
    """Return the record of an arm and seed at the arm's rate."""
    return json.loads(record_path(arm, seed, best_rate(arm)).read_text())


def write_summary() -> None:
    """Write results/spin.md from the records present."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    settings = demo_flags("spin")
    found = {arm: reported(arm) for arm in ARMS}
    seeds = sorted({seed for records in found.values() for seed in records})
    text = [
        "# SPIN's demo with its controls",
        "",
        f"SmolLM2-135M-Instruct, LoRA, float32; {settings['num_prompts_per_round']} prompts and "
        f"{settings['max_steps']} steps of {settings['per_device_train_batch_size']} pairs a round, "
        f"beta {settings['round_betas']} and learning rate {settings['round_learning_rates']} by "
        f"round. {platform.machine()}, {platform.system()}, one thread; {versions}; seeds "
        f"{seeds}; {datetime.date.today().isoformat()}. Script: `benchmarks/spin.py`. Scores on "
        f"{style.NUM_HELD_OUT} held-out questions that chose nothing; mean [minimum, maximum] "
        "over seeds. Log-probability: nats a token of the data's completions. Win rate: against the "
        "opponent of the round. Right: greedy, right result in the data's style.",
        "",
        "| arm | after round | seeds | log-probability | win rate | right | pairs trained on, measured | steps | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    before = [record["before"] for record in found["spin"].values()]
    logps = spread([b["eval"]["eval_logps"] for b in before])
    right = spread([b["right"] for b in before])
    text.append(f"| untrained | | {len(before)} | {logps} | | {right} | | | |")
    for arm, records in found.items():
        if not records:
            text.append(f"| {arm} | | not measured | | | | | | |")
        for index in range(max((len(r["rounds"]) for r in records.values()), default=0)):
            entries = [r["rounds"][index] for r in records.values() if len(r["rounds"]) > index]
            wins = [e["eval"]["eval_win_rate"] for e in entries if "eval_win_rate" in e["eval"]]
            text.append(
                f"| {arm} | {index} | {len(entries)} | "
                f"{spread([e['eval']['eval_logps'] for e in entries])} | "
                f"{spread(wins) if wins else ''} | {spread([e['right'] for e in entries])} | "
                f"{describe_pairs(entries)} | "
                f"{fmean(e['steps'] for e in entries):.0f} | "
                f"{fmean(e['seconds'] for e in entries):.0f} |"
            )
    text += ["", "Spin less each control after the last round, paired by seed:", ""]
    for arm in ARMS[1:]:
        pairs = [
            (found["spin"][s], found[arm][s]) for s in sorted({*found["spin"]} & {*found[arm]})
        ]
        if pairs:
            lasts = [(a["rounds"][-1], b["rounds"][-1]) for a, b in pairs]
            text.append(
                f"- {arm}: log-probability "
                f"{spread([a['eval']['eval_logps'] - b['eval']['eval_logps'] for a, b in lasts])}, "
                f"right {spread([a['right'] - b['right'] for a, b in lasts])}"
            )
    text += [
        "",
        f"Learning rates by held-out log-probability at the end on seed {TUNING_SEED}, which isn't "
        "reported above (the other arms have the recipe's):",
        "",
    ]
    for arm, grid in RATES.items():
        tried = {
            rate: json.loads(record_path(arm, TUNING_SEED, rate).read_text())["rounds"][-1]
            for rate in grid
            if record_path(arm, TUNING_SEED, rate).exists()
        }
        scores = ", ".join(
            f"{rate:g}: {entry['eval']['eval_logps']:.3f} (right {entry['right']:.2f})"
            for rate, entry in tried.items()
        )
        text.append(f"- {arm}: {scores or 'not measured'}")
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")


def reported(arm: str) -> dict[int, dict[str, Any]]:
    """Return the arm's records by seed, without those that tuned."""
    tuned = arm not in RATES or all(
        record_path(arm, TUNING_SEED, rate).exists() for rate in RATES[arm]
    )
    paths = {seed: record_path(arm, seed, best_rate(arm)) for seed in range(TUNING_SEED) if tuned}
    return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}


def describe_pairs(entries: list[dict[str, Any]]) -> str:
    """Return how many pairs a round was trained and measured on, means over seeds."""
    if not all("examples" in entry for entry in entries):
        return ""
    trained = fmean(entry["examples"] for entry in entries)
    return f"{trained:.0f}, {fmean(entry['eval']['eval_pairs'] for entry in entries):.0f}"


def spread(values: list[float]) -> str:
    """Return the mean and the range over seeds."""
    if not values:
        return "not measured"
    return f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def run_missing(arm: str, seed: int, rate: float | None) -> None:
    """Run an arm, seed and rate in a process of its own, unless its record is there."""
    if not record_path(arm, seed, rate).exists():
        command = [sys.executable, __file__, "--here", "--arms", arm, "--seeds", str(seed)]
        command += [] if rate is None else ["--rate", str(rate)]
        subprocess.run(command, check=True)
    write_summary()


def main() -> None:
    """Run what is missing, arm by arm, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tune", action="store_true", help="run the grids on the tuning seed")
    parser.add_argument("--here", action="store_true", help="run one arm and seed in this process")
    parser.add_argument("--rate", type=float, help="learning rate of a fine-tuned arm")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.here:
        arm, seed = args.arms[0], args.seeds[0]
        record = run_spin(arm, seed) if args.rate is None else run_sft(arm, seed, args.rate)
        record_path(arm, seed, args.rate).write_text(json.dumps(record, indent=1))
    elif args.tune:
        run_missing("spin", TUNING_SEED, None)
        for arm, grid in RATES.items():
            for rate in grid:
                run_missing(arm, TUNING_SEED, rate)
    else:
        for seed in args.seeds:
            for arm in args.arms:
                run_missing(arm, seed, best_rate(arm))


if __name__ == "__main__":
    main()
