"""Do ReST^EM, ReST and RFT help, and is it the filter that does? With controls, on two tasks.

The tasks are in em_tasks.py: 32 training prompts. Every arm begins with the model after 8 steps on
worked answers of other prompts, the "start", since SmolLM2 itself is hardly ever right. Every arm
that trains has the same LoRA, and its reported weights are 32 optimizer steps of 4 examples away
from the start, but for round0_data; the first five sample as often (512 times):

- rest_em: 2 rounds of 8 samples a prompt, each trained from the start.
- rest: 2 Grow steps of 8 samples a prompt, each followed by 2 Improve steps of 8 training steps
  that go on, at half of the learning rate in the second; the reward has degrees, those of the task,
  and completions above the median, then the upper quartile of their prompt's rewards are trained
  on. Without ReST's first step on human data.
- rft: one round of 16 samples a prompt from a model fine-tuned on gold; the start is fine-tuned on
  gold and on one right sample of each form, gold's own form too.
- unfiltered: rest_em trained on everything that ended by itself, right or wrong.
- one_round_all_samples: ReST^EM's one round with the samples of both.
- round0_data: what rest_em's first round kept, trained on for the steps of both rounds, 64. What
  32 steps on it come to is rest_em's first round.
- gold: worked answers of the training prompts.
- untrained: the start, with four examples in the prompt and without.

No held-out prompt chooses anything: scores are those of the last round, and of each round on the
way there. pass@k is of 8 samples at temperature 1. An arm, task and seed is a process of its own
and a file under results/em_family; what is there is not run again:

    OMP_NUM_THREADS=1 python benchmarks/em_family.py --tasks reversal --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/em_family.py --tasks sums --seeds 0
"""

import argparse
import datetime
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from em_tasks import START_RATE, TASKS, load_start, load_task
from recipe_demos import demo_lora, demo_settings

from trl_selfplay.disk import save_text

RESULTS = Path(__file__).parent / "results" / "em_family"
# rest_em comes first: round0_data trains on what it kept.
ARMS = (
    "rest_em", "rest", "rft", "unfiltered", "one_round_all_samples", "round0_data", "gold",
    "untrained",
)  # fmt: skip
NUM_ROUNDS, NUM_GENERATIONS, STEPS, MAX_PER_PROMPT = 2, 8, 32, 4
START_STEPS = 8
NUM_REPORT, NUM_SAMPLED, NUM_SAMPLES = 64, 16, 8
# What each arm changes in rest_em's settings.
CHANGES: dict[str, dict[str, Any]] = {
    "rest_em": {},
    "rest": {
        "improve_thresholds": [50.0, 75.0],
        "threshold_kind": "percentile",
        "start_from": "previous",
        "max_per_prompt": None,
        "max_steps": STEPS // (2 * NUM_ROUNDS),
    },
    "rft": {
        "num_rounds": 1,
        "num_generations": NUM_ROUNDS * NUM_GENERATIONS,
        "warm_up_on_gold": True,
        "max_per_prompt": None,
    },
    "unfiltered": {"reward_threshold": 0.0},
    "one_round_all_samples": {
        "num_rounds": 1,
        "num_generations": NUM_ROUNDS * NUM_GENERATIONS,
        "max_per_prompt": NUM_ROUNDS * MAX_PER_PROMPT,
    },
    "round0_data": {"num_rounds": 1, "max_steps": NUM_ROUNDS * STEPS},
    "gold": {"num_rounds": 1},
    "untrained": {},
}


def build_trainer(
    task_name: str, arm: str, seed: int, folder: str, results: Path
) -> tuple[Any, Any]:
    """Return the arm's trainer and the task with its held-out prompts."""
    from trl_selfplay import ReSTEMConfig, reasoning_path
    from trl_selfplay.rewards import exact_reward

    task = load_task(task_name, seed)
    settings = {
        **demo_settings("rest_em", ReSTEMConfig),
        "num_prompts_per_round": None,
        "few_shot_in_training": False,
        "num_rounds": NUM_ROUNDS,
        "num_generations": NUM_GENERATIONS,
        "max_per_prompt": MAX_PER_PROMPT,
        "max_steps": STEPS,
        "few_shot_rounds": 0,
        "top_k": 0,
        "max_completion_length": task.max_completion_length,
        "on_empty_round": "stop",
        "disable_tqdm": True,
        "output_dir": folder,
        "seed": seed,
        **CHANGES[arm],
    }
    arguments: dict[str, Any] = {}
    if arm in ("rft", "gold"):
        arguments["gold_dataset"] = task.train
    if arm == "rft":
        arguments["normal_form"] = reasoning_path
    trainer = trainer_class(arm, record_path(results, task_name, "rest_em", seed), seed)(
        load_start(task_name, seed, START_STEPS),
        ReSTEMConfig(**settings),
        train_dataset=task.train.select_columns(["prompt", "solution"]),
        few_shot_examples=task.few_shot,
        peft_config=demo_lora("rest_em"),
        reward_funcs=task.graded_reward if arm == "rest" else exact_reward,
        eval_reward_funcs=exact_reward,
        **arguments,
    )
    return trainer, task


def trainer_class(arm: str, rest_em_path: Path, seed: int) -> type:
    """Return ReSTEMTrainer, or one whose round trains on rows from elsewhere."""
    from datasets import Dataset

    from trl_selfplay import ReSTEMTrainer
    from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts
    from trl_selfplay.rounds.loop import PlayedRound

    if arm not in ("round0_data", "gold"):
        return ReSTEMTrainer

    class FixedRowsTrainer(ReSTEMTrainer):
        def play_round(self, round_index: int) -> PlayedRound:
            if arm == "gold":
                rows = [(r.prompt_ids, r.completion_ids) for r in self.gold.rollouts]
            else:
                rows = json.loads(rest_em_path.read_text())["kept"]
            dataset = Dataset.from_list(
                [{"input_ids": [*p, *c], "labels": [-100] * len(p) + list(c)} for p, c in rows]
            ).shuffle(seed=seed)
            return PlayedRound(dataset, len(rows), Funnel(0, 0, OutcomeCounts()), (), {}, {})

    return FixedRowsTrainer


def run_arm(task_name: str, arm: str, seed: int, results: Path) -> dict[str, Any]:
    """Train one arm; return its lines and the report set's scores after each round."""
    import torch

    from trl_selfplay.rollouts.prompts import load_prompt_rows
    from trl_selfplay.rounds.weights import load_saved_model

    started = time.monotonic()
    trainer, task = build_trainer(task_name, arm, seed, tempfile.mkdtemp(), results)
    rows = load_prompt_rows(task.report, "report")[:NUM_REPORT]
    record: dict[str, Any] = {}
    before = time.monotonic()
    if arm == "untrained":
        record |= {"lines": [], "few_shot": score(trainer, rows, few_shot=True)}
    else:
        trainer.train()
    record["train_minutes"] = (time.monotonic() - before) / 60
    lines = trainer.run.lines
    # Of ReST the end of each Grow step: its Improve steps train on the same samples.
    step = trainer.args.num_improve_steps
    record["by_round"] = []
    for line in lines[step - 1 :: step]:
        if line is not lines[-1]:
            load_saved_model(trainer.model, trainer.run.folder(line["round"]) / "model")
            record["by_round"].append(score(trainer, rows))
    if lines:
        load_saved_model(trainer.model, trainer.run.folder(len(lines) - 1) / "model")
    record["by_round"].append(score(trainer, rows))
    if arm == "rest_em":
        record["kept"] = kept_rows(trainer) if lines else []
    return record | {
        "lines": lines,
        "minutes": (time.monotonic() - started) / 60,
        "threads": torch.get_num_threads(),
    }


def score(trainer: Any, rows: Sequence[Any], few_shot: bool = False) -> dict[str, float]:
    """Score held-out prompts: greedily, and the first of them sampled for pass@k and diversity."""
    from trl_selfplay.evaluation.diversity import (
        distinct_correct,
        distinct_ratios,
        summarize_samples,
    )
    from trl_selfplay.evaluation.estimates import summarize_heldout
    from trl_selfplay.rollouts.selection import default_normal_form

    play, args = trainer.self_play, trainer.args
    # `unfiltered` counts every completion as right while it trains.
    play = replace(play, collector=replace(play.collector, reward_threshold=1.0))
    rollouts = []
    for part, args.num_generations_eval in (
        (rows[:NUM_SAMPLED], NUM_SAMPLES),
        (rows[NUM_SAMPLED:], 0),
    ):
        with play.progress("report", len(part), args.max_completion_length) as progress:
            rollouts += play.sample_heldout(part, progress, few_shot=few_shot)
    metrics = summarize_heldout(rollouts, reward_threshold=1.0, prefix="report")
    sampled = summarize_samples(
        [r for r in rollouts if r.sample_index > 0], default_normal_form, threshold=1.0
    )
    metrics["report_distinct"] = fmean(distinct_ratios(sampled).values())
    correct, _ = distinct_correct(sampled, sampled)
    if correct:
        metrics["report_distinct_correct"] = fmean(correct.values())
    return {name.removeprefix("report_"): value for name, value in metrics.items()}


def kept_rows(trainer: Any) -> list[list[list[int]]]:
    """Return the first round's kept rows: prompt and completion ids as trained on."""
    from trl_selfplay.rollouts.rows import training_completion_ids
    from trl_selfplay.rollouts.stored import load_kept

    play = trainer.self_play
    prompt_ids = play.training_prompt_ids(play.rows)
    return [
        [list(prompt_ids[r.prompt_id]), list(training_completion_ids(r, play.eos_token_id))]
        for r in load_kept(trainer.run.folder(0))
    ]


def record_path(results: Path, task_name: str, arm: str, seed: int) -> Path:
    """Return where an arm's record lies."""
    return results / f"{task_name}-{arm}-{seed}.json"


def write_summary(results: Path) -> None:
    """Write the table of the records present beside their folder."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    paths = sorted(results.glob("*-*.json"))
    threads = sorted({json.loads(path.read_text())["threads"] for path in paths})
    lines = [
        "# The EM family with its controls",
        "",
        f"SmolLM2-135M-Instruct after {START_STEPS} steps at {START_RATE:g} on worked answers of "
        f"other prompts; LoRA, float32; {STEPS} steps of 4 lead to the weights of every arm, "
        f"{NUM_ROUNDS * STEPS} to those of round0_data. "
        f"{platform.machine()}, {platform.system()}, CPU threads {threads}; {versions}; "
        f"{datetime.date.today().isoformat()}. Script: `benchmarks/em_family.py`, which says what "
        f"the arms are. Accuracy is greedy on {NUM_REPORT} held-out prompts; pass@k and the share "
        f"of distinct completions are of {NUM_SAMPLES} samples at temperature 1 (top_p 0.95) on "
        f"{NUM_SAMPLED} of them. Nothing was chosen by held-out prompts: the last round counts. "
        "Held-out prompts alone make one seed's standard error up to 0.06 for accuracy and 0.12 for "
        "pass@8; the start and the samples add to that.",
    ]
    for task_name in TASKS:
        records = {
            (arm, seed): json.loads(path.read_text())
            for arm in ARMS
            for seed in range(1000)
            if (path := record_path(results, task_name, arm, seed)).exists()
        }
        lines += ["", f"## {TASKS[task_name]}", ""]
        if not records:
            lines.append("Not measured.")
            continue
        lines += describe_task(records)
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")


def describe_task(records: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Return a task's tables: over seeds, and by round."""
    names = ("accuracy", "pass@1", f"pass@{NUM_SAMPLES}", "distinct")
    lines = [
        f"| arm | seeds | {' | '.join(names)} | learning rate | minutes of sampling and training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        found = [r for (a, _), r in records.items() if a == arm]
        if not found:
            lines.append(f"| {arm} | 0 | not measured | | | | | |")
            continue
        cells = " | ".join(spread([r["by_round"][-1][n] for r in found]) for n in names)
        minutes = fmean(r["train_minutes"] for r in found)
        rates = {f"{line['learning_rate']:g}": None for r in found for line in r["lines"]}
        lines.append(f"| {arm} | {len(found)} | {cells} | {', '.join(rates)} | {minutes:.1f} |")
        if arm == "untrained":
            lines[-1] = f"| {arm} | {len(found)} | {cells} | | |"
            cells = " | ".join(spread([r["few_shot"][n] for r in found]) for n in names)
            lines.append(f"| {arm}, four examples in the prompt | {len(found)} | {cells} | | |")
    lines += [
        "",
        "By round (of ReST by Grow step), each seed. Selected: examples that a training saw.",
        "",
        f"| arm | seed | {' | '.join(names)} | selected |",
        "|---|---|---|---|---|---|---|",
    ]
    for (arm, seed), record in records.items():
        if arm == "untrained":
            continue
        cells = " | ".join(
            ", ".join(f"{scores[name]:.2f}" for scores in record["by_round"]) for name in names
        )
        selected = ", ".join(
            f"{line['examples']}" + (f" ({gold} of them gold)" if gold else "")
            for line in record["lines"]
            for gold in [line["funnel"]["gold"]]
        )
        lines.append(f"| {arm} | {seed} | {cells} | {selected or 'nothing'} |")
    return lines


def spread(values: list[float]) -> str:
    """Return the mean, and the range over several seeds."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    """Run what is missing and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help="run one arm in this process")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    for task_name, seed, arm in itertools.product(args.tasks, args.seeds, args.arms):
        path = record_path(args.results, task_name, arm, seed)
        if path.exists():
            continue
        if args.here:
            save_text(path, json.dumps(run_arm(task_name, arm, seed, args.results)))
            continue
        command = [sys.executable, __file__, "--here", "--results", str(args.results)]
        command += ["--tasks", task_name, "--arms", arm, "--seeds", str(seed)]
        subprocess.run(command, check=True)
        write_summary(args.results)
    write_summary(args.results)


if __name__ == "__main__":
    main()
