"""The paper's experiment at CPU size: n-digit addition with a scratchpad, with and without hints.

A decoder of 0.8 M parameters with a token a character learns from a few worked sums, the stand-in
for the paper's few-shot prompts, and then teaches itself longer ones from answers alone. It has
seen sums with the answer as a hint too: a base that can't read a hint would test nothing.

    45+78=  →  5+8+0=13;4+7+1=12;123          with hint: 45+78=(123)

Arms, each restarted from the same base every round:

- plain: STaR without rationalization.
- hints: STaR with rationalization.
- gold: right scratchpads of all prompts, as many steps as the last round. The ceiling.

Smaller than the paper (16 rounds of 10,000 prompts, 300 steps and more): 1,000 prompts of 1 to 5
digits, 7 rounds of 60 to 179 steps. An arm and seed takes about five minutes on one core and is a
file under results/addition; what is there is not run again. The base knows sums of one digit and
has seen 50 of each greater length: with 20, it solved 7 % of two digits and next to nothing beyond.

    OMP_NUM_THREADS=1 python benchmarks/addition.py --seeds 0 1 2

Source: STaR, arXiv 2203.14465, section 4.3 and figures 4 to 6.
"""

import argparse
import datetime
import hashlib
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from trl_selfplay.demos.sums import (
    Sum,
    add_hint,
    build_base,
    right_answer,
    row_of,
    rows_of,
    scratchpad,
    training_settings,
)

ARMS = ("plain", "hints", "gold")
DIGITS = range(1, 6)
NUM_ROUNDS = 7
ROUND_STEPS = [int(60 * 1.2**t) for t in range(NUM_ROUNDS)]
NUM_BASE, NUM_TRAIN, NUM_HELD_OUT = 50, 235, 100  # sums of each length above one digit
NUM_TRAIN_ONE_DIGIT = 60  # of the 100 there are; the base is trained on them as well


# --- the task ------------------------------------------------------------------------------------


def draw_sums(seed: int) -> dict[str, dict[int, list[Sum]]]:
    """Return different sums by part (base, train, held_out) and number of digits of both terms."""
    rng = random.Random(seed)
    one_digit = [(a, b) for a in range(10) for b in range(10)]
    rng.shuffle(one_digit)
    parts = {
        "base": {1: one_digit},  # the one length that the base is to know
        "train": {1: one_digit[:NUM_TRAIN_ONE_DIGIT]},
        "held_out": {1: one_digit[NUM_TRAIN_ONE_DIGIT:]},
    }
    for digits in DIGITS[1:]:
        sums: dict[Sum, None] = {}
        while len(sums) < NUM_BASE + NUM_TRAIN + NUM_HELD_OUT:
            first, last = 10 ** (digits - 1), 10**digits - 1
            sums[rng.randint(first, last), rng.randint(first, last)] = None
        ordered = list(sums)
        parts["base"][digits] = ordered[:NUM_BASE]
        parts["train"][digits] = ordered[NUM_BASE : NUM_BASE + NUM_TRAIN]
        parts["held_out"][digits] = ordered[NUM_BASE + NUM_TRAIN :]
    return parts


# --- the base ------------------------------------------------------------------------------------


def load_base(seed: int, sums: dict[int, list[Sum]]) -> str:
    """Return the folder of a seed's base, which all arms share; train it if it isn't there yet."""
    key = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=6).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"addition-base-{key}-{seed}"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as temporary:
            build_base(f"{temporary}/base", seed, sums)
            Path(f"{temporary}/base").rename(folder)
    return str(folder)


# --- the arms ------------------------------------------------------------------------------------


def run_arm(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm; return accuracy by digits and what was kept, before and after each round."""
    from trl_selfplay import STaRConfig, STaRTrainer

    class GoldTrainer(STaRTrainer):
        """Trains its only round on right scratchpads."""

        def play_round(self, round_index: int) -> Any:
            from datasets import Dataset

            from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts
            from trl_selfplay.rounds.loop import PlayedRound

            pairs = [pair for part in sums["train"].values() for pair in part]
            rows = [row_of(self.processing_class, f"{a}+{b}=", scratchpad(a, b)) for a, b in pairs]
            dataset = Dataset.from_list(rows).shuffle(seed=seed)
            return PlayedRound(dataset, len(rows), Funnel(0, 0, OutcomeCounts()), (), {}, {})

    started = time.monotonic()
    sums = draw_sums(seed)
    base = load_base(seed, sums["base"])
    with tempfile.TemporaryDirectory() as folder:
        steps = ROUND_STEPS[-1:] if arm == "gold" else ROUND_STEPS
        trainer = (GoldTrainer if arm == "gold" else STaRTrainer)(
            base,
            STaRConfig(
                f"{folder}/{arm}",
                **training_settings(seed),
                num_rounds=len(steps),
                round_max_steps=steps,
                rationalize=arm == "hints",
                max_completion_length=56,  # five digits need 52 with EOS
                load_best_round_at_end=False,
                on_empty_round="stop",
            ),
            train_dataset=rows_of([pair for part in sums["train"].values() for pair in part]),
            eval_dataset={str(n): rows_of(part) for n, part in sums["held_out"].items()},
            reward_funcs=right_answer,
            hint_formatter=add_hint,
        )
        trainer.train()
        rounds = [record_of(trainer, line, arm) for line in trainer.run.lines]
        before = accuracies(trainer.run.lines[0]["eval_before"]) if rounds else {}
    return {
        "arm": arm,
        "seed": seed,
        "before": before,
        "rounds": rounds,
        "minutes": (time.monotonic() - started) / 60,
        "machine": f"{platform.machine()}, {platform.system()}, one thread",
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        "date": datetime.date.today().isoformat(),
    }


def accuracies(metrics: dict[str, float]) -> dict[str, float]:
    """Return greedy held-out accuracy by the number of digits."""
    return {str(n): metrics[f"eval_{n}_accuracy"] for n in DIGITS}


def record_of(trainer: Any, line: dict[str, Any], arm: str) -> dict[str, Any]:
    """Return a round's accuracies, and how much of what it kept has right scratchpads."""
    from trl_selfplay.rollouts.stored import load_kept

    kept = [] if arm == "gold" else load_kept(trainer.run.folder(line["round"]))
    counts = {"plain": [0, 0], "hinted": [0, 0]}  # kept, of these with a right scratchpad
    prompts = {row.prompt_id: row.prompt for row in trainer.self_play.rows}
    for rollout in kept:
        a, b = prompts[rollout.prompt_id].removesuffix("=").split("+")
        count = counts["hinted" if rollout.hinted else "plain"]
        count[0] += 1
        count[1] += rollout.completion == scratchpad(int(a), int(b))
    return {
        "round": line["round"],
        "steps": line["steps"],
        "examples": line["examples"],
        "accuracy": accuracies(line["eval"]),
        "kept_and_valid": counts,
        "seconds": line["seconds"],
    }


# --- the summary ---------------------------------------------------------------------------------


def write_summary(results: Path) -> None:
    """Write a Markdown page from the records present, beside their folder."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    if not records:
        raise ValueError(f"there are no records in {results}; run the arms first.")
    versions = ", ".join(f"{name} {number}" for name, number in records[0]["versions"].items())
    lines = [
        "# Addition with a scratchpad",
        "",
        "A decoder of 0.8 M parameters, 1,000 prompts of 1 to 5 digits, greedy, restart from the "
        f"base in each of {NUM_ROUNDS} rounds. {records[0]['machine']}; {versions}; seeds "
        f"{sorted({r['seed'] for r in records})}; {max(r['date'] for r in records)}. Script: "
        "`benchmarks/addition.py`. Accuracy on held-out sums by number of digits, mean over seeds; "
        "the base was trained on all sums of one digit, so that column is no held-out score of it.",
    ]
    for arm in ARMS:
        found = [r for r in records if r["arm"] == arm]
        if not found:
            continue
        minutes = fmean(r["minutes"] for r in found)
        lines += ["", f"## {arm} ({len(found)} seeds, {minutes:.1f} minutes each)", ""]
        columns = [*(f"{n} digits" for n in DIGITS), "examples", "kept with hint", "of these valid"]
        lines += [f"| round | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        before = [f"{fmean(r['before'][str(n)] for r in found):.2f}" for n in DIGITS]
        lines.append(f"| base | {' | '.join(before)} | | | |")
        for index in range(max(len(r["rounds"]) for r in found)):
            rounds = [r["rounds"][index] for r in found if index < len(r["rounds"])]
            cells = [f"{fmean(x['accuracy'][str(n)] for x in rounds):.2f}" for n in DIGITS]
            hinted = [x["kept_and_valid"]["hinted"] for x in rounds]
            kept = sum(count for count, _ in hinted)
            cells += [
                f"{fmean(x['examples'] for x in rounds):.0f}",
                f"{kept / len(rounds):.0f}",
                f"{sum(valid for _, valid in hinted) / kept:.0%}" if kept else "–",
            ]
            lines.append(f"| {index} | {' | '.join(cells)} |")
        if arm != "gold":
            lines += ["", "First round at 50 % or more, by seed and digits (– is never):", ""]
            lines += [f"- seed {r['seed']}: {first_rounds_at_half(r)}" for r in found]
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")


def first_rounds_at_half(record: dict[str, Any]) -> str:
    """Return for each number of digits the first round with at least half of the sums right."""
    half = {}
    for n in DIGITS:
        scores = {-1: record["before"][str(n)]}
        scores |= {x["round"]: x["accuracy"][str(n)] for x in record["rounds"]}
        reached = [i for i, score in scores.items() if score >= 0.5]
        half[n] = "–" if not reached else "base" if reached[0] < 0 else str(reached[0])
    return ", ".join(f"{n}: {when}" for n, when in half.items())


def main() -> None:
    """Run what is missing, an arm and seed in a process of its own, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/addition")
    parser.add_argument("--aggregate", action="store_true", help="write the summary alone")
    parser.add_argument("--here", action="store_true", help="run one arm and seed in this process")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.here:
        arm, seed = args.arms[0], args.seeds[0]
        record = run_arm(arm, seed)
        temporary = args.results / f".{arm}-{seed}.tmp"
        temporary.write_text(json.dumps(record, indent=1))
        temporary.replace(args.results / f"{arm}-{seed}.json")
        return
    missing = [
        (arm, seed)
        for seed in args.seeds
        for arm in args.arms
        if not args.aggregate and not (args.results / f"{arm}-{seed}.json").exists()
    ]
    for arm, seed in missing:
        command = [sys.executable, __file__, "--here", "--arms", arm, "--seeds", str(seed)]
        subprocess.run([*command, "--results", str(args.results)], check=True)
    write_summary(args.results)


if __name__ == "__main__":
    main()
