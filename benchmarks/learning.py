"""Does the demo learn, and from what? STaR and its controls, with held-out scores.

Arms, each on the demo's word reversal with 4-shot sampling and LoRA:

- star: the demo as it is. Its record also holds (a) 4-shot prompting of the untrained model.
- gold: fine-tuning on the solutions, as many steps as all of star's rounds together.
- round0_data: what star's first round kept, as many steps as all rounds together.
- no_rationalization: star without hints.
- form_only: each round trained on as many completions as star kept there, for as many steps, all
  of them star's own samples of that round that have an answer, in the right form, and a wrong one.
  What this arm gains is form; star's gain over it is not.

64 held-out prompts select the best round, 200 others are read for the report (pass@8 on 64 of them). An arm and seed is a
process of its own and a file under results/learning; what is there is not run again:

    python benchmarks/learning.py --seeds 0 1 2
"""

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset
from recipe_demos import demo_lora, demo_settings

from trl_selfplay import STaRConfig
from trl_selfplay.demos.words import demo_split, load_demo_model_path
from trl_selfplay.rewards import exact_reward, extract_answer
from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts
from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rollouts.rows import training_completion_ids
from trl_selfplay.rollouts.stored import load_kept
from trl_selfplay.rounds.loop import PlayedRound
from trl_selfplay.rounds.run import find_best_round
from trl_selfplay.rounds.weights import load_saved_model

RESULTS = Path(__file__).parent / "results" / "learning"
ARMS = ("star", "form_only", "no_rationalization", "gold", "round0_data")
NUM_SAMPLES, NUM_PASS_AT_K = 8, 64


def build_trainer(cls: type, seed: int, folder: str, **changes: Any) -> Any:
    """Return a trainer with the demo's settings; its `split` holds the report set as well."""
    split = demo_split(seed)
    settings = demo_settings("star", STaRConfig)
    trainer = cls(
        load_demo_model_path(),
        STaRConfig(folder, **{**settings, "seed": seed, **changes}),
        train_dataset=split.train,
        eval_dataset=split.select,
        few_shot_examples=split.few_shot,
        peft_config=demo_lora("star"),
        reward_funcs=exact_reward,
    )
    trainer.split = split
    return trainer


def fixed_rows_class(choose: Any) -> type:
    """Return a STaRTrainer whose rounds train on what `choose(trainer, round_index)` returns."""
    from trl_selfplay import STaRTrainer

    class FixedRowsTrainer(STaRTrainer):
        def play_round(self, round_index: int) -> Any:
            return choose(self, round_index)

    return FixedRowsTrainer


def played(rows: list[tuple[tuple[int, ...], tuple[int, ...]]], seed: int) -> Any:
    """Return a round that trains on (prompt ids, completion ids) pairs chosen elsewhere."""
    dataset = Dataset.from_list(
        [{"input_ids": [*p, *c], "labels": [-100] * len(p) + list(c)} for p, c in rows]
    ).shuffle(seed=seed)
    return PlayedRound(dataset, len(rows), Funnel(0, 0, OutcomeCounts()), (), {}, {})


def run_arm(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm; return its lines and its scores on the report set by round."""
    from trl_selfplay import STaRTrainer

    folder = tempfile.mkdtemp()
    if arm in ("star", "no_rationalization"):
        trainer = build_trainer(STaRTrainer, seed, folder, rationalize=arm == "star")
    else:
        star = load(f"star-{seed}")
        steps = [line["steps"] for line in star["lines"]]
        # The last two are one round with the steps of all rounds.
        settings = (
            {"round_max_steps": steps}
            if arm == "form_only"
            else {"num_rounds": 1, "max_steps": sum(steps)}
        )
        trainer = build_trainer(
            fixed_rows_class(lambda t, i: fixed_rows(t, i, arm, star)), seed, folder, **settings
        )
    record: dict[str, Any] = {}
    if arm == "star":
        record["before"] = report_scores(trainer, with_few_shot=True, num_samples=NUM_SAMPLES)
    started = time.monotonic()
    trainer.train()
    record["minutes"] = (time.monotonic() - started) / 60
    record["lines"] = trainer.run.lines
    chosen = find_best_round(trainer.run, trainer.run.lines)
    record["chosen_round"] = chosen
    # The best round's weights are in place: pass@8 for them, greedy accuracy for all rounds.
    record["report"] = report_scores(trainer, num_samples=NUM_SAMPLES if arm == "star" else 0)
    if arm == "star":
        record |= rows_for_controls(trainer) | hint_copies(trainer)
    record["report_by_round"] = [
        record["report"]["eval_accuracy"]
        if line["round"] == chosen
        else score_round(trainer, line["round"])
        for line in trainer.run.lines
    ]
    return record


def score_round(trainer: Any, round_index: int) -> float:
    """Return the greedy accuracy on the report set of the weights that a round ended with."""
    load_saved_model(trainer.model, trainer.run.folder(round_index) / "model")
    return report_scores(trainer)["eval_accuracy"]


def report_scores(
    trainer: Any, with_few_shot: bool = False, num_samples: int = 0
) -> dict[str, float]:
    """Score the report set greedily, and its first prompts `num_samples` times for pass@k."""
    rows = load_prompt_rows(trainer.split.report, "report")
    args = trainer.args
    previous = args.num_generations_eval
    metrics: dict[str, float] = {}
    try:
        for part, count in ((rows, 0), (rows[:NUM_PASS_AT_K], num_samples)):
            if part is rows or count:
                args.num_generations_eval = count
                scored = trainer.self_play.score({"": part}, with_few_shot=with_few_shot).metrics
                metrics |= {k: v for k, v in scored.items() if ("pass@" in k) == bool(count)}
    finally:
        args.num_generations_eval = previous
    return metrics


def fixed_rows(trainer: Any, round_index: int, arm: str, star: dict[str, Any]) -> Any:
    """Return star's wrong completions of this round, star's rows of the first, or gold rows."""
    if arm == "form_only":
        rows = [(tuple(p), tuple(c)) for p, c in star["wrong"][round_index]]
    elif arm == "round0_data":
        rows = [(tuple(p), tuple(c)) for p, c in star["kept"]]
    else:
        prompt_ids = trainer.self_play.training_prompt_ids(trainer.self_play.rows)
        tokenizer = trainer.processing_class
        rows = [
            (
                prompt_ids[row.prompt_id],
                (
                    *tokenizer.encode(f"Answer: {row.solution}", add_special_tokens=False),
                    tokenizer.eos_token_id,
                ),
            )
            for row in trainer.self_play.rows
        ]
    return played(rows, seed=trainer.args.seed + round_index)


def rows_for_controls(trainer: Any) -> dict[str, Any]:
    """Return star's first kept rows, and for each round as many wrong ones of the right form."""
    play, run = trainer.self_play, trainer.run
    prompt_ids = play.training_prompt_ids(play.rows)

    def row(rollout: Any) -> list[list[int]]:
        completion = training_completion_ids(rollout, play.eos_token_id)
        return [list(prompt_ids[rollout.prompt_id]), list(completion)]

    wrong = []
    for line in run.lines:
        shards = sorted((run.folder(line["round"]) / "samples").glob("*.parquet"))
        by_prompt: dict[str, list[Any]] = {}
        for rollout in (r for path in shards for r in load_rollouts(path)):
            if (
                not rollout.hinted
                and not rollout.is_truncated
                and rollout.reward == 0.0
                and extract_answer(rollout.completion) is not None
            ):
                by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
        # Round robin over prompts: as many different prompts as there are.
        most = max(map(len, by_prompt.values()), default=0)
        ordered = [g[i] for i in range(most) for g in by_prompt.values() if i < len(g)]
        wrong.append([row(r) for r in ordered[: line["examples"]]])
    return {"kept": [row(r) for r in load_kept(run.folder(0))], "wrong": wrong}


def hint_copies(trainer: Any) -> dict[str, Any]:
    """Return the hinted share of what each round kept, and how much of it only repeats the hint."""
    solutions = {row.prompt_id: str(row.solution) for row in trainer.self_play.rows}
    shares, copies = [], []
    for line in trainer.run.lines:
        kept = load_kept(trainer.run.folder(line["round"]))
        hinted = [r for r in kept if r.hinted]
        # A bare copy has no step before the answer but the answer's own words in its own order.
        bare = [r for r in hinted if is_bare_copy(r.completion, solutions[r.prompt_id])]
        shares.append(len(hinted) / max(len(kept), 1))
        copies.append(len(bare) / max(len(hinted), 1))
    return {"hinted_share_of_kept": shares, "bare_copies_among_hinted": copies}


def is_bare_copy(completion: str, solution: str) -> bool:
    """Say whether the steps before "Answer:" are absent or list the answer's words as they are."""
    steps = completion.split("Answer:")[0]
    words = re.findall(r"\d+\.[ \t]*(.*)", steps)
    return not steps.strip() or [w.strip() for w in words] == solution.split(", ")


def load(name: str) -> dict[str, Any]:
    """Return a finished arm and seed."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def write_summary() -> None:
    """Write results/learning.md from the records present."""
    found = {arm: [load(p.stem) for p in sorted(RESULTS.glob(f"{arm}-*.json"))] for arm in ARMS}
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    seeds = sorted({int(p.stem.rsplit("-", 1)[1]) for p in RESULTS.glob("*-*.json")})
    lines = [
        "# Does the demo learn?",
        "",
        "SmolLM2-135M-Instruct, word_sequence_reversal with 3 to 4 words, 96 training prompts, LoRA, "
        f"float32. {platform.machine()}, {platform.system()}, 2 CPU cores; {versions}; seeds "
        f"{seeds}; {datetime.date.today().isoformat()}. Script: `benchmarks/learning.py`. Accuracy "
        "is greedy on 200 held-out prompts that chose nothing; mean [minimum, maximum] over seeds.",
        "",
        "| arm | seeds | accuracy | pass@8 | minutes |",
        "|---|---|---|---|---|",
    ]

    star = found["star"]
    for name, infix in (("untrained, 0-shot", ""), ("untrained, 4-shot (a)", "few_shot_")):
        scores = [
            [r["before"][f"eval_{infix}{metric}"] for r in star]
            for metric in ("accuracy", f"pass@{NUM_SAMPLES}")
        ]
        lines.append(f"| {name} | {len(star)} | {spread(scores[0])} | {spread(scores[1])} | |")
    for arm in ARMS:
        records = found[arm]
        greedy = spread([r["report"]["eval_accuracy"] for r in records])
        sampled = (
            spread([r["report"][f"eval_pass@{NUM_SAMPLES}"] for r in records])
            if arm == "star"
            else ""
        )
        minutes = f"{fmean(r['minutes'] for r in records):.1f}" if records else ""
        lines.append(f"| {arm} | {len(records)} | {greedy} | {sampled} | {minutes} |")
    lines += ["", "By round: greedy accuracy on the report set, each seed; the chosen round.", ""]
    for arm, records in found.items():
        for record in records:
            scores = ", ".join(f"{value:.3f}" for value in record["report_by_round"])
            lines.append(f"- {arm}: {scores}; chosen: {record['chosen_round']}")
    lines += ["", "What star kept, by round, each seed:", ""]
    for record in star:
        kept = [line["examples"] for line in record["lines"]]
        lines.append(
            f"- examples {kept}, hinted share {rounded(record['hinted_share_of_kept'])}, bare copies "
            f"of the hint among the hinted {rounded(record['bare_copies_among_hinted'])}"
        )
    if len(star) == len(found["form_only"]) > 0:
        gains = [
            a["report"]["eval_accuracy"] - b["report"]["eval_accuracy"]
            for a, b in zip(star, found["form_only"], strict=True)
        ]
        lines += ["", f"Gain of star over form_only: {spread(gains)}."]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def spread(values: list[float]) -> str:
    """Return the mean and the range over seeds."""
    if not values:
        return "not measured"
    return f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def rounded(values: list[float]) -> list[float]:
    """Return the values with two digits."""
    return [round(value, 2) for value in values]


def main() -> None:
    """Run what is missing, arm by arm, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--here", action="store_true", help="run one arm and seed in this process")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.here:
        arm, seed = args.arms[0], args.seeds[0]
        record = run_arm(arm, seed)
        (RESULTS / f"{arm}-{seed}.json").write_text(json.dumps(record))
        return
    for arm in args.arms:
        for seed in args.seeds:
            if not (RESULTS / f"{arm}-{seed}.json").exists():
                command = [sys.executable, __file__, "--here", "--arms", arm, "--seeds", str(seed)]
                subprocess.run(command, check=True)
                write_summary()
    write_summary()


if __name__ == "__main__":
    main()
