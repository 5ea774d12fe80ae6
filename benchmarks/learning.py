"""Does the demo learn, and from what? STaR and its controls, with held-out scores.

Arms, each on the demo's word reversal with 4-shot sampling and LoRA:

- star: the demo as it is. Its record also holds (a) 4-shot prompting of the untrained model.
- gold: fine-tuning on the solutions, as many steps as all of star's rounds together.
- round0_data: what star's first round kept, as many steps as all rounds together.
- no_rationalization: star without hints.
- form_only: each round trained on as many completions as star kept there, for as many steps, all
  with the answer's form and a wrong answer. What this arm gains is form; star's gain over it is not.

64 held-out prompts select the best round, 200 others are read for the report. An arm and seed is a
process of its own and a file under results/learning; what is there is not run again:

    python benchmarks/learning.py --seeds 0 1 2
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).parent / "results" / "learning"
ARMS = ("star", "form_only", "no_rationalization", "gold", "round0_data")
NUM_SAMPLES_REPORT = 8


def build_trainer(cls: type, seed: int, folder: str, **changes: Any) -> Any:
    """Return a trainer with the demo's settings, and the held-out sets select and report."""
    from trl_selfplay.demo import demo_arguments, demo_split, load_demo_model_path

    split = demo_split(seed)
    config, trainer_arguments = demo_arguments(folder, seed=seed, **changes)
    trainer = cls(
        load_demo_model_path(),
        config,
        train_dataset=split.train,
        eval_dataset={"select": split.select, "report": split.report},
        few_shot_examples=split.few_shot,
        **trainer_arguments,
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


def played(trainer: Any, rows: list[tuple[tuple[int, ...], tuple[int, ...]]], seed: int) -> Any:
    """Return a round that trains on (prompt ids, completion ids) pairs chosen elsewhere."""
    from datasets import Dataset

    from trl_selfplay.rounds import PlayedRound
    from trl_selfplay.selection import Funnel, OutcomeCounts

    dataset = Dataset.from_list(
        [{"input_ids": [*p, *c], "labels": [-100] * len(p) + list(c)} for p, c in rows]
    ).shuffle(seed=seed)
    return PlayedRound(dataset, len(rows), Funnel(0, 0, OutcomeCounts()), (), {}, {})


def wrong_with_the_right_form(trainer: Any, round_index: int, count: int) -> Any:
    """Sample as STaR does and keep `count` finished completions with an answer that is wrong."""
    from trl_selfplay.rewards import extract_answer
    from trl_selfplay.training_data import training_completion_ids

    play, folder = trainer.self_play, trainer.run.folder(round_index)
    rollouts = play.sample(play.draw_prompts(round_index), round_index, "train", folder)
    wrong = [
        r for r in rollouts
        if r.finish != "length" and r.reward == 0.0 and extract_answer(r.completion) is not None
    ]  # fmt: skip
    prompt_ids = play.training_prompt_ids(play.rows)
    by_prompt: dict[str, list[Any]] = {}
    for rollout in wrong:
        by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    # Round robin over prompts: as many different prompts as there are.
    ordered = [
        group[i]
        for i in range(max(map(len, by_prompt.values()), default=0))
        for group in by_prompt.values()
        if i < len(group)
    ]
    rows = [
        (prompt_ids[r.prompt_id], training_completion_ids(r, play.eos_token_id))
        for r in ordered[:count]
    ]
    return played(trainer, rows, seed=trainer.args.seed + round_index)


def run_arm(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and return its scores by round; the report set is sampled 8 times a prompt."""
    from trl_selfplay import STaRTrainer

    star = None if arm in ("star", "no_rationalization") else load(f"star-{seed}")
    total_steps = sum(line["steps"] for line in star["lines"]) if star else 0
    folder = tempfile.mkdtemp()
    if arm == "star":
        trainer = build_trainer(STaRTrainer, seed, folder)
    elif arm == "no_rationalization":
        trainer = build_trainer(STaRTrainer, seed, folder, rationalize=False)
    elif arm == "form_only":
        lines = star["lines"]
        trainer = build_trainer(
            fixed_rows_class(lambda t, i: wrong_with_the_right_form(t, i, lines[i]["examples"])),
            seed,
            folder,
            round_max_steps=[line["steps"] for line in lines],
        )
    else:
        trainer = build_trainer(
            fixed_rows_class(lambda t, _: fixed_rows(t, arm, star)),
            seed,
            folder,
            num_rounds=1,
            max_steps=total_steps,
        )
    started = time.monotonic()
    if arm == "star":
        before = report_scores(trainer)
    trainer.train()
    record: dict[str, Any] = {"lines": trainer.run.lines, "report": report_scores(trainer)}
    if arm == "star":
        record |= {"before": before, "kept": kept_of_first_round(trainer)}
        record |= hint_copies(trainer)
    return {**record, "minutes": (time.monotonic() - started) / 60}


def fixed_rows(trainer: Any, arm: str, star: dict[str, Any]) -> Any:
    """Return the gold rows, or those of star's first round."""
    play = trainer.self_play
    if arm == "round0_data":
        return played(trainer, [(tuple(p), tuple(c)) for p, c in star["kept"]], trainer.args.seed)
    prompt_ids = play.training_prompt_ids(play.rows)
    tokenizer = trainer.processing_class
    rows = [
        (
            prompt_ids[row.prompt_id],
            (*tokenizer.encode(f"Answer: {row.solution}", add_special_tokens=False), tokenizer.eos_token_id),
        )
        for row in play.rows
    ]  # fmt: skip
    return played(trainer, rows, trainer.args.seed)


def report_scores(trainer: Any) -> dict[str, float]:
    """Score the report set with 8 samples a prompt, in the trained form and (untrained) 4-shot."""
    few = trainer.args.num_generations_eval
    trainer.args.num_generations_eval = NUM_SAMPLES_REPORT
    sets = {"report": trainer.self_play.heldout["report"]}
    scores = trainer.self_play.score(sets, with_few_shot=not trainer.run.lines)
    trainer.args.num_generations_eval = few
    return scores.metrics


def kept_of_first_round(trainer: Any) -> list[Any]:
    """Return (prompt ids, completion ids) of what the first round kept."""
    from trl_selfplay.self_play import load_kept
    from trl_selfplay.training_data import training_completion_ids

    prompt_ids = trainer.self_play.training_prompt_ids(trainer.self_play.rows)
    kept = load_kept(trainer.run.folder(0))
    return [
        (
            list(prompt_ids[r.prompt_id]),
            list(training_completion_ids(r, trainer.self_play.eos_token_id)),
        )
        for r in kept
    ]


def hint_copies(trainer: Any) -> dict[str, Any]:
    """Return the hinted share of what each round kept, and how much of it only repeats the hint."""
    from trl_selfplay.self_play import load_kept

    solutions = {row.prompt_id: str(row.solution) for row in trainer.self_play.rows}
    shares, copies = [], []
    for line in trainer.run.lines:
        kept = load_kept(trainer.run.folder(line["round"]))
        hinted = [r for r in kept if r.hinted]
        # A bare copy: nothing but the answer is left once numbering and "Answer:" are taken away.
        bare = [
            r for r in hinted
            if len(r.completion.split()) <= len(solutions[r.prompt_id].split()) + 2
        ]  # fmt: skip
        shares.append(len(hinted) / max(len(kept), 1))
        copies.append(len(bare) / max(len(hinted), 1))
    return {"hinted_share_of_kept": shares, "bare_copies_among_hinted": copies}


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

    def spread(values: list[float]) -> str:
        if not values:
            return "not measured"
        return f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"

    star = found["star"]
    for name, infix in (("untrained, 0-shot", ""), ("untrained, 4-shot (a)", "few_shot_")):
        lines.append(
            f"| {name} | {len(star)} | "
            + spread([r["before"][f"eval_report_{infix}accuracy"] for r in star])
            + " | "
            + spread([r["before"][f"eval_report_{infix}pass@{NUM_SAMPLES_REPORT}"] for r in star])
            + " | |"
        )
    for arm in ARMS:
        records = found[arm]
        lines.append(
            f"| {arm} | {len(records)} | {spread([r['report']['eval_report_accuracy'] for r in records])} | "
            f"{spread([r['report'][f'eval_report_pass@{NUM_SAMPLES_REPORT}'] for r in records])} | "
            f"{fmean(r['minutes'] for r in records) if records else 0:.1f} |"
        )
    lines += ["", "Greedy accuracy on the report set by round (mean over seeds):", ""]
    for arm, records in found.items():
        if records:
            rounds = zip(
                *([line["eval"]["eval_report_accuracy"] for line in r["lines"]] for r in records),
                strict=False,
            )
            lines.append(f"- {arm}: " + ", ".join(f"{fmean(values):.3f}" for values in rounds))
    for record in star:
        lines.append(
            f"- star, hinted share of kept by round: {[round(s, 2) for s in record['hinted_share_of_kept']]}, "
            f"bare copies of the hint among them: {[round(s, 2) for s in record['bare_copies_among_hinted']]}"
        )
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


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
