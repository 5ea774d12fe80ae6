"""Does `trl-selfplay demo` learn from right answers, or from answers in the right form? And how fast?

Arms, each with the settings of the demo:

- demo: the demo as it is.
- wrong: each round trains on as many completions as the demo kept there, for as many steps, all of
  them the demo's own samples of that round, in the right form (three numbered words, then an answer of
  three words) and with a wrong answer. They come from the demo's policy, so this control profits from
  what the demo has learnt.

The gain is the greedy accuracy after the last round, minus that of the untrained model, on the 100
prompts that chose nothing. An arm and seed is a process of its own and a file under results/demo; what
is there is not run again, and a run that was stopped goes on:

    python benchmarks/demo.py --arm demo --seed 0
    python benchmarks/demo.py --arm wrong --seed 0

On a quiet machine, the seconds from the start of `trl-selfplay demo` to each held-out score, with an
empty cache:

    python benchmarks/demo.py --time
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results" / "demo"
ARMS, SEEDS = ("demo", "wrong"), (0, 1, 2)
# A completion as the few-shot examples have it.
FORM = re.compile(r"1\. .+\n2\. .+\n3\. .+\nAnswer: [^,\n]+, [^,\n]+, [^,\n]+\s*")


def build_trainer(arm: str, seed: int, folder: Path) -> Any:
    """Return a trainer with the demo's settings; its `split` holds the report set as well."""
    from learning import fixed_rows_class, played
    from recipe_demos import demo_lora, demo_settings

    from trl_selfplay import STaRConfig, STaRTrainer
    from trl_selfplay.demos.words import demo_split, load_demo_model_path
    from trl_selfplay.rewards import exact_reward

    cls: type = STaRTrainer
    if arm == "wrong":
        wrong = load("demo", seed)["wrong"]
        rows = [[(tuple(p), tuple(c)) for p, c in of_round] for of_round in wrong]
        cls = fixed_rows_class(lambda trainer, i: played(rows[i], seed=trainer.args.seed + i))
    split = demo_split(seed, quick=True)
    settings = demo_settings("star", STaRConfig, "QUICK")
    trainer = cls(
        load_demo_model_path(),
        STaRConfig(str(folder), **{**settings, "seed": seed, "disable_tqdm": True}),
        train_dataset=split.train,
        eval_dataset=split.select
        if arm == "demo"
        else None,  # the control's time is for its rounds
        few_shot_examples=split.few_shot,
        peft_config=demo_lora("star"),
        reward_funcs=exact_reward,
    )
    trainer.split = split
    return trainer


def run_arm(arm: str, seed: int) -> None:
    """Train one arm, going on where it was stopped, and write its record."""
    from learning import report_scores, score_round

    folder = Path(tempfile.gettempdir()) / "trl-selfplay-benchmark-demo" / f"{arm}-{seed}"
    trainer = build_trainer(arm, seed, folder)
    record: dict[str, Any] = {"arm": arm, "seed": seed}
    if arm == "demo":
        untrained = folder / "untrained.json"
        if not untrained.exists():
            untrained.parent.mkdir(parents=True, exist_ok=True)
            untrained.write_text(json.dumps(report_scores(trainer)["eval_accuracy"]))
        record["untrained"] = json.loads(untrained.read_text())
    trainer.train(resume_from_checkpoint=True)
    lines = trainer.run.lines
    record["examples"] = [line["examples"] for line in lines]
    record["steps"] = [line["steps"] for line in lines]
    if arm == "demo":
        record["heldout"] = [lines[0]["eval_before"]["eval_accuracy"]]
        record["heldout"] += [line["eval"]["eval_accuracy"] for line in lines]
        record["funnels"] = [line["funnel"] for line in lines]
        record["wrong"] = wrong_rows(trainer)
    record["after"] = score_round(trainer, len(lines) - 1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{arm}-{seed}.json"
    path.write_text(json.dumps(record) + "\n")
    shutil.rmtree(folder)


def wrong_rows(trainer: Any) -> list[list[list[list[int]]]]:
    """Return (prompt ids, completion ids) of wrong samples in the right form, as many as were kept.

    Of each round, from as many different prompts as there are.
    """
    from trl_selfplay.rollouts.record import load_rollouts
    from trl_selfplay.rollouts.rows import training_completion_ids

    play, run = trainer.self_play, trainer.run
    prompt_ids = play.training_prompt_ids(play.rows)
    of_rounds = []
    for line in run.lines:
        by_prompt: dict[str, list[Any]] = {}
        for path in sorted((run.folder(line["round"]) / "samples").glob("*.parquet")):
            for rollout in load_rollouts(path):
                is_wrong = rollout.reward == 0.0 and not rollout.hinted
                if is_wrong and not rollout.is_truncated and FORM.fullmatch(rollout.completion):
                    by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
        most = max(map(len, by_prompt.values()), default=0)
        ordered = [g[i] for i in range(most) for g in by_prompt.values() if i < len(g)]
        of_rounds.append(
            [
                [list(prompt_ids[r.prompt_id]), list(training_completion_ids(r, play.eos_token_id))]
                for r in ordered[: line["examples"]]
            ]
        )
    return of_rounds


def load(arm: str, seed: int) -> dict[str, Any]:
    """Return the record of a finished arm and seed."""
    return json.loads((RESULTS / f"{arm}-{seed}.json").read_text())


def write_summary() -> None:
    """Write results/demo.md from the records present."""
    found = {p.stem for p in RESULTS.glob("*-*.json")}
    seeds = [seed for seed in SEEDS if {f"{arm}-{seed}" for arm in ARMS} <= found]
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    lines = [
        "# Does `trl-selfplay demo` learn, and how fast?",
        "",
        "SmolLM2-135M-Instruct reverses lists of three words; settings of `recipes/star.py --quick`. "
        f"Two shared x86-64 cores, {platform.system()}; {versions}; "
        f"{datetime.date.today().isoformat()}. Script: `benchmarks/demo.py`. Accuracy is greedy, on "
        "100 held-out prompts that chose nothing.",
        "",
        "| seed | untrained | demo, after the last round | wrong answers in the right form | difference "
        "| trained on, by round: demo | wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    differences = []
    for seed in seeds:
        demo, wrong = load("demo", seed), load("wrong", seed)
        differences.append(demo["after"] - wrong["after"])
        lines.append(
            f"| {seed} | {demo['untrained']:.2f} | {demo['after']:.2f} | {wrong['after']:.2f} "
            f"| {differences[-1]:+.2f} | {demo['examples']} | {wrong['examples']} |"
        )
    if len(differences) > 1:
        mean, error = fmean(differences), stdev(differences) / sqrt(len(differences))
        lines += [
            "",
            f"The demo's gain over the control: {mean:.3f}, standard error over seeds {error:.3f}; that "
            f"is {mean / error:.1f} standard errors."
            if error
            else f"The demo's gain over the control is {mean:.3f} in every seed.",
        ]
    lines += [
        "",
        "The demo on the 48 prompts that choose its round, untrained and after each round:",
        "",
    ]
    lines += [
        f"- seed {seed}: {', '.join(f'{v:.2f}' for v in load('demo', seed)['heldout'])}"
        for seed in seeds
    ]
    lines += ["", "## Seconds from start to each score", ""]
    timed = RESULTS / "time.json"
    if timed.exists():
        times = json.loads(timed.read_text())
        lines += [
            f"`trl-selfplay demo` on {times['machine']}, {times['date']}, the model not yet converted:",
            "",
            *(f"- {name}: {seconds:.0f} s" for name, seconds in times["seconds"].items()),
        ]
    else:
        lines.append("Not measured. On a quiet machine: `python benchmarks/demo.py --time`.")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def measure_time() -> None:
    """Run the command in an empty folder with an empty cache; write when each line appeared."""
    with tempfile.TemporaryDirectory() as folder:
        started, seconds = time.monotonic(), {}
        process = subprocess.Popen(
            [sys.executable, "-m", "trl_selfplay", "demo"],
            cwd=folder,
            env={
                **os.environ,
                "XDG_CACHE_HOME": str(Path(folder) / "cache"),
                "PYTHONPATH": str(Path(__file__).parent.parent),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{time.monotonic() - started:6.1f} s  {line}", end="", flush=True)
            if match := re.match(r"(untrained|round \d+) ", line):
                seconds[f"held-out score, {match[1]}"] = round(time.monotonic() - started, 1)
        if process.wait():
            raise SystemExit(f"the demo ended with exit code {process.returncode}")
        seconds["end"] = round(time.monotonic() - started, 1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": f"{os.cpu_count()} x86-64 cores",
        "date": datetime.date.today().isoformat(),
        "seconds": seconds,
    }
    (RESULTS / "time.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Run one arm and seed or the timing, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--seed", type=int, choices=SEEDS)
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    if args.time:
        measure_time()
    elif args.arm is None or args.seed is None:
        parser.error("give --arm and --seed, or --time")
    elif not (RESULTS / f"{args.arm}-{args.seed}.json").exists():
        run_arm(args.arm, args.seed)
    write_summary()


if __name__ == "__main__":
    main()
