"""Collapse on purpose: which alarms go off, and in which round, when nothing is filtered.

Two-digit addition with a scratchpad, a decoder of 0.8 M parameters with a token per character (see
addition.py). The base gives right answers to about six in ten held-out sums. From it, eight rounds of
8 samples per prompt at temperature 0.7, in three arms:

- unfiltered: every completion that ended is trained on; each round goes on from the last one. No
  deduplication, no cap.
- accumulated: the same, but the samples of all earlier rounds and right scratchpads of other sums, as
  many as there are prompts, are trained on as well.
- filtered: right answers alone, without duplicates, at most 2 per prompt, each round from the base.

The detectors get no help: in the first two arms the reward function accepts everything, and only the
held-out prompts are graded by answer (`eval_reward_funcs`). A run is a file under results/collapse; what
is there isn't run again, and a run that was interrupted goes on where `--runs` keeps it.

    OMP_NUM_THREADS=1 python benchmarks/collapse.py --seeds 0 1 2

Sources: "The Curse of Recursion", arXiv 2305.17493; "Is Model Collapse Inevitable?", arXiv 2404.01413.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from trl_selfplay.demos.sums import (
    Sum,
    build_model,
    build_tokenizer,
    right_answer,
    row_of,
    rows_of,
    scratchpad,
    training_settings,
    worked_rows,
)

DATE = "2026-11-26"
ARMS = ("unfiltered", "accumulated", "filtered")
NUM_BASE, NUM_TRAIN, NUM_HELD_OUT = 400, 120, 200
NUM_BASE_STEPS, NUM_ROUNDS, ROUND_STEPS, NUM_SAMPLES = 320, 8, 30, 8


def final_number(text: str) -> str | None:
    """Return what stands after the last step, if it is a number."""
    answer = text.rsplit(";", 1)[-1]
    return answer if answer.isdigit() else None


right_answer.answer_form = final_number  # type: ignore[attr-defined]  # what the detectors of answers read


def any_answer(completions: list[str], **kwargs: Any) -> list[float]:
    """Accept everything."""
    return [1.0] * len(completions)


any_answer.answer_form = final_number  # type: ignore[attr-defined]


def draw_sums(seed: int) -> dict[str, list[Sum]]:
    """Return different sums of two digits by part; `gold` is for the arm that accumulates."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    sizes = {"base": NUM_BASE, "train": NUM_TRAIN, "held_out": NUM_HELD_OUT, "gold": NUM_TRAIN}
    return {part: [pairs.pop() for _ in range(size)] for part, size in sizes.items()}


def build_base(folder: Path, seed: int, sums: list[Sum], steps: int = NUM_BASE_STEPS) -> None:
    """Train a model on worked sums, and save it with its tokenizer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = build_tokenizer()
    rows = [row_of(tokenizer, f"{a}+{b}=", scratchpad(a, b)) for a, b in sums]
    with tempfile.TemporaryDirectory() as temporary:
        trainer = SFTTrainer(
            build_model(tokenizer, seed),
            SFTConfig(temporary, **training_settings(seed), max_steps=steps),
            train_dataset=Dataset.from_list(rows).shuffle(seed=seed),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model(f"{temporary}/base")
        Path(f"{temporary}/base").replace(folder)


def run_arm(arm: str, seed: int, runs: Path) -> dict[str, Any]:
    """Train one arm, or go on with it; return the lines of its rounds."""
    from trl_selfplay import ReSTEMConfig, ReSTEMTrainer

    started = time.monotonic()
    sums = draw_sums(seed)
    base = runs / f"base-{seed}"
    if not base.exists():
        build_base(base, seed, sums["base"])
    is_filtered, accumulates = arm == "filtered", arm == "accumulated"
    folder = runs / f"{arm}-{seed}"
    trainer = ReSTEMTrainer(
        str(base),
        ReSTEMConfig(
            str(folder),
            **{**training_settings(seed), "learning_rate": 5e-4, "warmup_steps": 5},
            num_rounds=NUM_ROUNDS,
            max_steps=ROUND_STEPS,
            start_from="base" if is_filtered else "previous",
            history_rounds=NUM_ROUNDS if accumulates else 0,
            deduplicate=is_filtered,
            max_per_prompt=2 if is_filtered else None,
            num_generations=NUM_SAMPLES,
            num_generations_eval=4,
            temperature=0.7,
            top_k=0,
            temperature_eval=1.0,
            max_completion_length=28,
            load_best_round_at_end=False,
            on_empty_round="stop",
        ),
        train_dataset=rows_of(sums["train"]),
        eval_dataset=rows_of(sums["held_out"]),
        reward_funcs=right_answer if is_filtered else any_answer,
        eval_reward_funcs=None if is_filtered else right_answer,
        gold_dataset=worked_rows(sums["gold"]) if accumulates else None,
    )
    trainer.train(resume_from_checkpoint=folder.exists())
    return {
        "arm": arm,
        "seed": seed,
        "lines": trainer.run.lines,
        "minutes": (time.monotonic() - started) / 60,
        "machine": f"two shared {platform.machine()} cores, one thread",
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
    }


# --- the summary ---------------------------------------------------------------------------------

NUMBERS = {
    "accuracy": lambda line: line["eval"]["eval_accuracy"],
    "pass@1, sampled": lambda line: line["eval"]["eval_pass@1"],
    "distinct": lambda line: line["metrics"]["play/distinct"],
    "answer entropy": lambda line: line["metrics"]["play/answer_entropy"],
    "token entropy": lambda line: line["metrics"]["play/token_entropy"],
}
# Alarms of held-out scores are raised with the score of their round, the others before its training.
OF_SCORES = ("held-out-fall", "sharpening", "reward-against-check", "vote-drift", "transfer")
FALL = 0.05


def accuracies(record: dict[str, Any]) -> list[float]:
    """Return held-out accuracy before training and after each round."""
    lines = record["lines"]
    return [m["eval_accuracy"] for m in (lines[0]["eval_before"], *(x["eval"] for x in lines))]


def first_fall(record: dict[str, Any]) -> int | None:
    """Return the first round after which accuracy is 5 points below that of the untrained model."""
    before, *after = accuracies(record)
    return next((i for i, score in enumerate(after) if score <= before - FALL), None)


def first_alarm(
    record: dict[str, Any], ignored: tuple[str, ...] = ()
) -> tuple[int, bool, str] | None:
    """Return the first alarm: its round, whether it came with the round's score, and all names then."""
    for line in record["lines"]:
        names = [alarm["name"] for alarm in line["alarms"] if alarm["name"] not in ignored]
        if early := [name for name in names if name not in OF_SCORES]:
            return line["round"], False, ", ".join(early)
        if names:
            return line["round"], True, ", ".join(names)
    return None


def describe_alarm(record: dict[str, Any], ignored: tuple[str, ...] = ()) -> list[str]:
    """Return, as cells, the first alarm and whether it came before the fall."""
    fall, alarm = first_fall(record), first_alarm(record, ignored)
    when = "–" if fall is None else f"round {fall}"
    if alarm is None:
        return [when, "–", "no" if fall is not None else "–"]
    index, is_late, names = alarm
    in_time = fall is not None and (index < fall or (index == fall and not is_late))
    where = "after" if is_late else "before the training of"
    return [
        when,
        f"{where} round {index}: {names}",
        "–" if fall is None else "yes" if in_time else "no",
    ]


def write_summary(results: Path) -> None:
    """Write a Markdown page from the records present, beside their folder."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    versions = ", ".join(f"{name} {number}" for name, number in records[0]["versions"].items())
    lines = [
        "# Collapse on purpose",
        "",
        f"Two-digit addition, 0.8 M parameters; {NUM_TRAIN} prompts, {NUM_SAMPLES} samples at temperature "
        f"0.7, {NUM_ROUNDS} rounds of {ROUND_STEPS} steps; {NUM_HELD_OUT} held-out prompts. "
        f"{records[0]['machine']}; {versions}; seeds {sorted({r['seed'] for r in records})}; {DATE}. "
        "Script: `benchmarks/collapse.py`, which explains the arms. Means over seeds, with their range "
        "for accuracy. Distinct completions and entropies are those of the round's samples, so round 0 "
        "is the base; accuracy is measured after the round.",
    ]
    for arm in ARMS:
        found = [r for r in records if r["arm"] == arm]
        if not found:
            continue
        lines += [
            "",
            f"## {arm} ({len(found)} of 3 seeds)",
            "",
            f"| round | {' | '.join(NUMBERS)} | alarms (seeds) |",
        ]
        lines.append("|---" * (len(NUMBERS) + 2) + "|")
        lines.append(f"| before | {cell([accuracies(r)[0] for r in found], True)} |" + " |" * 5)
        for index in range(max(len(r["lines"]) for r in found)):
            of_round = [r["lines"][index] for r in found if index < len(r["lines"])]
            cells = [cell(list(map(f, of_round)), n == "accuracy") for n, f in NUMBERS.items()]
            names = Counter(alarm["name"] for line in of_round for alarm in line["alarms"])
            alarms = ", ".join(f"{name} ({count})" for name, count in names.items()) or "–"
            lines.append(f"| {index} | {' | '.join(cells)} | {alarms} |")
    lines += [
        "",
        "## Which came first",
        "",
        "The fall is the first round after which accuracy is 5 points below that of the base. The second "
        "half leaves out what only the second verifier can see (`false-positives`, "
        "`reward-against-check`).",
        "",
        "| run | fall | first alarm | in time | first alarm without a second verifier | in time |",
        "|---|---|---|---|---|---|",
    ]
    blind = ("false-positives", "reward-against-check")
    for record in records:
        cells = [*describe_alarm(record), *describe_alarm(record, blind)[1:]]
        lines.append(f"| {record['arm']}, seed {record['seed']} | {' | '.join(cells)} |")
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")


def cell(values: list[float], with_range: bool) -> str:
    """Return the mean of the seeds, with their range if asked for."""
    mean = f"{fmean(values):.3f}"
    return f"{mean} [{min(values):.2f}, {max(values):.2f}]" if with_range else mean


def main() -> None:
    """Run what is missing, an arm and seed in a process of its own, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "collapse-runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/collapse")
    parser.add_argument("--here", action="store_true", help="run one arm and seed in this process")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.here:
        record = run_arm(args.arms[0], args.seeds[0], args.runs)
        path = args.results / f"{args.arms[0]}-{args.seeds[0]}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        return
    for seed in args.seeds:
        for arm in args.arms:
            if not (args.results / f"{arm}-{seed}.json").exists():
                command = [sys.executable, __file__, "--here", "--arms", arm, "--seeds", str(seed)]
                command += ["--results", str(args.results), "--runs", str(args.runs)]
                subprocess.run(command, check=True)
    write_summary(args.results)


if __name__ == "__main__":
    main()
