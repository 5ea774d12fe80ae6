"""What a verifier's errors cost: accuracy against the share of verdicts that are flipped.

The task, the model and the base are those of collapse.py, with a base that saw fewer steps: it gives right
answers to about a third of the held-out sums. Three rounds of 8 samples per prompt at temperature 1, each
trained from the base on what passed, at most 2 per prompt. The verifier compares answers, and then:

- accepts: takes a wrong completion for right with probability ε (a false 1.0).
- rejects: takes a right completion for wrong with probability ε (a false 0.0).

Which verdicts are flipped depends on the seed and the completion, so that a wrong completion that passed once
passes again. Held-out prompts are graded without flips. Random verdicts, the control, accept everything with
probability one half. An arm and seed is a file under results/verifier_noise; what is there isn't run again.

    OMP_NUM_THREADS=1 python benchmarks/verifier_noise.py --seeds 0 1 2
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from collapse import DATE, build_base, draw_sums

from trl_selfplay.demos.sums import right_answer, rows_of, training_settings

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2)
KINDS = ("accepts", "rejects")
ARMS = ("exact", *(f"{kind}-{share:g}" for kind in KINDS for share in SHARES[1:]), "random")
NUM_BASE_STEPS, NUM_ROUNDS, ROUND_STEPS, NUM_SAMPLES = 230, 3, 40, 8


def luck(text: str, seed: int) -> float:
    """Return a number from 0 to 1 that a text has under a seed."""
    digest = hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def noisy_verifier(arm: str, seed: int) -> Callable[..., list[float]]:
    """Return a reward function that flips some of its verdicts."""
    kind, _, share = arm.partition("-")

    def verdicts(
        prompts: list[str], completions: list[str], solution: list[str], **kwargs: Any
    ) -> list[float]:
        exact = right_answer(completions, solution)
        found = []
        for prompt, completion, verdict in zip(prompts, completions, exact, strict=True):
            drawn = luck(prompt + completion, seed)
            if arm == "random":
                verdict = float(drawn < 0.5)
            elif arm != "exact" and verdict == float(kind == "rejects") and drawn < float(share):
                verdict = 1.0 - verdict
            found.append(verdict)
        return found

    return verdicts


def run_arm(arm: str, seed: int, bases: Path) -> dict[str, Any]:
    """Train one arm; return accuracy before and after each round, and what was kept."""
    from trl_selfplay import ReSTEMConfig, ReSTEMTrainer
    from trl_selfplay.rollouts.stored import load_kept

    started = time.monotonic()
    sums = draw_sums(seed)
    base = bases / f"noise-base-{seed}"
    if not base.exists():
        build_base(base, seed, sums["base"], NUM_BASE_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ReSTEMTrainer(
            str(base),
            ReSTEMConfig(
                f"{folder}/{arm}",
                **{**training_settings(seed), "learning_rate": 5e-4, "warmup_steps": 5},
                num_rounds=NUM_ROUNDS,
                max_steps=ROUND_STEPS,
                max_per_prompt=2,
                num_generations=NUM_SAMPLES,
                num_generations_eval=4,
                temperature=1.0,
                top_k=0,
                max_completion_length=28,
                load_best_round_at_end=False,
                on_empty_round="stop",
                alarm_actions={"false-positives": "ignore"},
            ),
            train_dataset=rows_of(sums["train"]),
            eval_dataset=rows_of(sums["held_out"]),
            reward_funcs=noisy_verifier(arm, seed),
            eval_reward_funcs=right_answer,
        )
        trainer.train()
        lines = trainer.run.lines
        solutions = {row.prompt_id: row.solution for row in trainer.self_play.rows}
        wrong = []
        for line in lines:
            kept = load_kept(trainer.run.folder(line["round"]))
            verdicts = right_answer(
                [r.completion for r in kept], [solutions[r.prompt_id] for r in kept]
            )
            wrong.append(1.0 - fmean(verdicts))
    return {
        "arm": arm,
        "seed": seed,
        "greedy": [
            m["eval_accuracy"] for m in (lines[0]["eval_before"], *(x["eval"] for x in lines))
        ],
        "sampled": [
            m["eval_pass@1"] for m in (lines[0]["eval_before"], *(x["eval"] for x in lines))
        ],
        "examples": [line["examples"] for line in lines],
        "wrong": wrong,
        "minutes": (time.monotonic() - started) / 60,
        "machine": f"two shared {platform.machine()} cores, one thread",
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
    }


def write_summary(results: Path) -> None:
    """Write a Markdown page from the records present, beside their folder."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    versions = ", ".join(f"{name} {number}" for name, number in records[0]["versions"].items())
    lines = [
        "# What a verifier's errors cost",
        "",
        f"Two-digit addition, 0.8 M parameters, {NUM_ROUNDS} rounds from the base, {NUM_SAMPLES} samples "
        f"per prompt. {records[0]['machine']}; {versions}; seeds {sorted({r['seed'] for r in records})}; "
        f"{DATE}. Script: `benchmarks/verifier_noise.py`, which explains the arms. Accuracy on 200 "
        "held-out sums, mean over seeds with their range; `wrong` is the share of kept completions whose "
        "answer is wrong, mean over rounds and seeds.",
        "",
        "| verdicts | before, greedy | after, greedy | after, sampled | kept per round | wrong |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        found = [r for r in records if r["arm"] == arm]
        if not found:
            continue
        lines.append(
            f"| {arm} | {spread([r['greedy'][0] for r in found])} | "
            f"{spread([r['greedy'][-1] for r in found])} | "
            f"{spread([r['sampled'][-1] for r in found])} | "
            f"{fmean(n for r in found for n in r['examples']):.0f} | "
            f"{fmean(share for r in found for share in r['wrong']):.0%} |"
        )
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")


def spread(values: list[float]) -> str:
    """Return the mean and the range."""
    return f"{fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    """Run what is missing, an arm and seed in a process of its own, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--bases", type=Path, default=Path(tempfile.gettempdir()))
    results = Path(__file__).parent / "results/verifier_noise"
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--here", action="store_true", help="run one arm and seed in this process")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.here:
        record = run_arm(args.arms[0], args.seeds[0], args.bases)
        path = args.results / f"{args.arms[0]}-{args.seeds[0]}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        return
    for seed in args.seeds:
        for arm in args.arms:
            if not (args.results / f"{arm}-{seed}.json").exists():
                command = [sys.executable, __file__, "--here", "--arms", arm, "--seeds", str(seed)]
                command += ["--results", str(args.results), "--bases", str(args.bases)]
                subprocess.run(command, check=True)
    write_summary(args.results)


if __name__ == "__main__":
    main()
