"""Does a small model learn to write programs from its own? STaR with tests, and its controls.

Arms, each on the demo of recipes/star_code.py, functions of one line over a list of numbers:

- star: the demo as it is. Its record also holds the untrained model's scores, with the few-shot
  examples of round 0 and without, and the share of what it kept that passes the hidden tests.
- unfiltered_first: as many of star's own samples of its first round as star kept there, drawn from all
  that are finished, right or wrong, for as many steps; to be compared with star after its first round.
- unfiltered_last: the same of its last round. Each round trains from the base model, so here what the
  filter did in earlier rounds is in the samples, and only its last use is left out.
- round0_data: what star's first round kept, as many steps as all rounds together.

Grading sees three tests of a training prompt. 64 held-out prompts select the best round; the scores
are of 200 others, each with 12 hidden tests: greedy accuracy, and pass@1 and pass@8 of 8 samples.

    python benchmarks/star_code.py --seed 0    # all arms of one seed, those that aren't there yet
    python benchmarks/star_code.py             # the summary of all records that are there
"""

import argparse
import json
import platform
import random
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from learning import fixed_rows_class, load_saved_model, played, spread
from recipe_demos import demo_lora, demo_settings

from trl_selfplay import STaRConfig, STaRTrainer
from trl_selfplay.demos.programs import programs_split
from trl_selfplay.demos.words import load_demo_model_path
from trl_selfplay.rewards import CodeReward
from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rollouts.rows import training_completion_ids
from trl_selfplay.rollouts.stored import load_kept
from trl_selfplay.rounds.run import find_best_round

RESULTS = Path(__file__).parent / "results" / "star_code"
ARMS = ("star", "unfiltered_first", "unfiltered_last", "round0_data")
NUM_SAMPLES = 8
# What the sizes change: "small" is for two CPU cores, where samples for pass@k take most of the time;
# "smoke" only tries the script.
SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"num_rounds": 2, "num_prompts_per_round": 64, "max_steps": 40},
    "smoke": {
        "num_rounds": 2,
        "num_prompts_per_round": 12,
        "num_generations": 4,
        "max_steps": 2,
        "on_empty_round": "stop",
    },
}


def build_trainer(cls: type, seed: int, size: str, reward: Any, **changes: Any) -> Any:
    """Return a trainer with the demo's settings; its `split` holds the report set as well."""
    split = programs_split(seed, size == "smoke")
    settings = demo_settings("star_code", STaRConfig) | SIZES[size]
    trainer = cls(
        load_demo_model_path(),
        STaRConfig(tempfile.mkdtemp(), **{**settings, "seed": seed, **changes}),
        train_dataset=split.train,
        eval_dataset=split.select if cls is STaRTrainer else None,  # to choose among rounds
        few_shot_examples=split.few_shot,
        peft_config=demo_lora("star_code"),
        reward_funcs=reward,
    )
    trainer.split = split
    trainer.num_samples = 0 if size == "small" else NUM_SAMPLES
    return trainer


def run_arm(arm: str, seed: int, size: str, reward: Any, star: dict[str, Any]) -> dict[str, Any]:
    """Train one arm; return its lines and its scores on the report set."""
    if arm == "star":
        trainer = build_trainer(STaRTrainer, seed, size, reward)
    else:
        steps = [line["steps"] for line in star["lines"]]
        unfiltered = star["rows"]["unfiltered"]
        rows, count = {
            "unfiltered_first": (unfiltered[0], steps[0]),
            "unfiltered_last": (unfiltered[-1], steps[-1]),
            "round0_data": (star["rows"]["round0_data"][0], sum(steps)),
        }[arm]
        choose = fixed_rows_class(lambda trainer, _: played(rows, seed=trainer.args.seed))
        settings = {"num_rounds": 1, "max_steps": count}
        trainer = build_trainer(choose, seed, size, reward, **settings)
    record: dict[str, Any] = {"machine": machine(trainer), "seed": seed, "size": size}
    if arm == "star":
        record["before"] = report_scores(trainer) | report_scores(trainer, with_few_shot=True)
    started = time.monotonic()
    trainer.train()
    record["minutes"] = (time.monotonic() - started) / 60
    record["lines"] = trainer.run.lines
    record["chosen_round"] = find_best_round(trainer.run, trainer.run.lines)
    record["report"] = report_scores(trainer)
    if arm == "star":
        record |= look_at_samples(trainer, reward)
        by_round = record["report_by_round"] = []
        for line in trainer.run.lines:
            load_saved_model(trainer.model, trainer.run.folder(line["round"]) / "model")
            by_round.append(report_scores(trainer, num_samples=0)["eval_accuracy"])
    trainer.end()
    return record


def report_scores(
    trainer: Any, with_few_shot: bool = False, num_samples: int | None = None
) -> dict[str, float]:
    """Return greedy accuracy on the report set, and pass@k of so many samples per prompt."""
    rows = load_prompt_rows(trainer.split.report, "report")
    previous = trainer.args.num_generations_eval
    trainer.args.num_generations_eval = trainer.num_samples if num_samples is None else num_samples
    try:
        metrics = trainer.self_play.score({"": rows}, with_few_shot=with_few_shot).metrics
    finally:
        trainer.args.num_generations_eval = previous
    return {k: v for k, v in metrics.items() if "accuracy" in k or "pass@" in k}


def look_at_samples(trainer: Any, reward: Any) -> dict[str, Any]:
    """Return rows for the controls, and how many kept programs pass the hidden tests."""
    play, run = trainer.self_play, trainer.run
    prompt_ids = play.training_prompt_ids(play.rows)
    row_of = {row.prompt_id: row for row in play.rows}

    def as_row(rollout: Any) -> list[list[int]]:
        completion = training_completion_ids(rollout, play.eos_token_id)
        return [list(prompt_ids[rollout.prompt_id]), list(completion)]

    unfiltered, hidden, passed = [], [], []
    for line in run.lines:
        folder = run.folder(line["round"])
        shards = sorted((folder / "samples").glob("*.parquet"))
        rollouts = [r for path in shards for r in load_rollouts(path)]
        finished = [r for r in rollouts if not r.is_truncated]
        drawn = random.Random(f"{trainer.args.seed}/{line['round']}").sample(
            finished, min(line["examples"], len(finished))
        )
        unfiltered.append([as_row(r) for r in drawn])
        passed.append(fmean(r.reward == 1.0 for r in rollouts))
        kept = load_kept(folder)
        columns = [row_of[r.prompt_id].columns for r in kept]
        scores = reward(
            [r.completion for r in kept],
            tests=[c["hidden_tests"] for c in columns],
            prompts=[row_of[r.prompt_id].prompt for r in kept],
        )
        hidden.append(fmean(s == 1.0 for s in scores) if scores else None)
    first = [as_row(r) for r in load_kept(run.folder(0))]
    return {
        "rows": {"unfiltered": unfiltered, "round0_data": [first]},
        "samples_that_pass": passed,
        "kept_that_pass_hidden_tests": hidden,
    }


def machine(trainer: Any) -> str:
    """Return the device and the versions that a record was made with."""
    device = (
        torch.cuda.get_device_name()
        if trainer.accelerator.device.type == "cuda"
        else f"two shared {platform.machine()} cores"
    )
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    return f"{device}; {versions}"


def write_summary() -> None:
    """Write results/star_code.md from the records present."""
    found: dict[str, list[dict[str, Any]]] = {
        arm: [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{arm}-*.json"))]
        for arm in ARMS
    }
    star = found["star"]
    if not star:
        return
    settings = demo_settings("star_code", STaRConfig) | SIZES[star[0]["size"]]
    lines = [
        "# Does a small model learn to write programs from its own?",
        "",
        f"SmolLM2-135M-Instruct, LoRA, {settings['num_rounds']} rounds of "
        f"{settings['num_prompts_per_round']} prompts and {settings['num_generations']} samples each; "
        "functions of one line over a list of numbers. Grading sees 3 tests of a training prompt; the "
        f"scores are of {len(programs_split().report)} other prompts with 12 hidden tests each, and "
        "chose nothing. Mean [minimum, maximum] over seeds. Script: `benchmarks/star_code.py`.",
        "",
        f"star: {star[0]['machine']}; seeds {[r['seed'] for r in star]}. Controls: "
        f"{' and '.join(sorted({r['machine'] for arm in ARMS[1:] for r in found[arm]}))}; where pass@k "
        "is empty, only greedy accuracy was measured.",
        "",
        "| arm | seeds | greedy accuracy | pass@1 | pass@8 | minutes |",
        "|---|---|---|---|---|---|",
    ]
    names = ("accuracy", "pass@1", f"pass@{NUM_SAMPLES}")
    for name, infix in (("untrained, without examples", ""), ("untrained, few-shot", "few_shot_")):
        cells = [
            spread_of([r["before"] for r in star], f"eval_{infix}{metric}") for metric in names
        ]
        lines.append(f"| {name} | {len(star)} | {' | '.join(cells)} | |")
    for arm, records in found.items():
        if not records:
            continue
        cells = [spread_of([r["report"] for r in records], f"eval_{metric}") for metric in names]
        minutes = f"{fmean(r['minutes'] for r in records):.1f}"
        lines.append(f"| {arm} | {len(records)} | {' | '.join(cells)} | {minutes} |")
    lines += [
        "",
        "Greedy accuracy of star on these prompts after each round; the chosen round:",
        "",
    ]
    for record in star:
        scores = ", ".join(f"{value:.3f}" for value in record["report_by_round"])
        lines.append(f"- seed {record['seed']}: {scores}; {record['chosen_round']}")
    lines += ["", "What the filter adds, in greedy accuracy, the same seeds:", ""]
    for arm, place in (("unfiltered_first", 0), ("unfiltered_last", -1)):
        pairs = [(a, b) for a in star for b in found[arm] if a["seed"] == b["seed"]]
        gains = [a["report_by_round"][place] - b["report"]["eval_accuracy"] for a, b in pairs]
        if gains:
            name = "first" if place == 0 else "last"
            lines.append(f"- star after its {name} round over {arm}: {spread(gains)}")
    lines += ["", "What star sampled and kept, by round:", ""]
    for record in star:
        kept = [line["examples"] for line in record["lines"]]
        passed = [f"{share:.2f}" for share in record["samples_that_pass"]]
        hidden = [f"{share:.2f}" for share in record["kept_that_pass_hidden_tests"]]
        lines.append(
            f"- seed {record['seed']}: samples that pass {', '.join(passed)}; kept {kept}; of these "
            f"pass the hidden tests {', '.join(hidden)}"
        )
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def spread_of(scores: list[dict[str, float]], metric: str) -> str:
    """Return the mean and range of a metric; empty where it wasn't measured."""
    return spread([each[metric] for each in scores if metric in each]) if scores else ""


def main() -> None:
    """Run the arms of a seed that are missing, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="run this seed; without it only summarize")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--allow_weak_isolation", action="store_true", help="where there are no namespaces"
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--results", type=Path, help="folder of the records, if they go elsewhere")
    args = parser.parse_args()
    reward = CodeReward(allow_weak_isolation=args.allow_weak_isolation)
    folder = args.results or (Path(tempfile.mkdtemp()) if args.size == "smoke" else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    for arm in args.arms if args.seed is not None else []:
        path = folder / f"{arm}-{args.seed}.json"
        if not path.exists():
            needed = folder / f"star-{args.seed}.json"
            star = {} if arm == "star" else json.loads(needed.read_text())
            path.write_text(json.dumps(run_arm(arm, args.seed, args.size, reward, star)))
            print(f"{arm}, seed {args.seed}: {path}")
    if folder == RESULTS:
        write_summary()


if __name__ == "__main__":
    main()
