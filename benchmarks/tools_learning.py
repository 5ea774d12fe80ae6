"""Does a model of 135 M parameters learn to use tools from its own trajectories, and from nothing else?

The demo of recipes/rest_react.py: how bright is a colour? Held-out success, greedy, on the same questions for
all seeds; no colour of them is trained on. Parts, each a file under results/tools_learning:

- tools: ReST^EM with search and calculator, after each round. Before the first: few-shot ReAct, untrained.
- other_rows: the trained policy, and a run from the start, where each call gets another row's result.
- no_tools: ReST^EM that answers at once, with the same questions and worked answers without actions.
- masks: the first round's kept trajectories, trained on with and without the tokens of the results. How often
  does each policy then write a result itself, where nothing stops it at "Observation:"?

What is there is not run again. About an hour on two shared cores:

    OMP_NUM_THREADS=1 python benchmarks/tools_learning.py
"""

import argparse
import datetime
import json
import logging
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset
from recipe_demos import demo_flags, demo_lora, demo_settings
from trl import SFTConfig, SFTTrainer

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer
from trl_selfplay.demos import survey
from trl_selfplay.demos.colours import colours_split
from trl_selfplay.demos.words import load_demo_model_path
from trl_selfplay.disk import save_text
from trl_selfplay.generation.sampler import SampleRequest, build_sampling_options
from trl_selfplay.rewards import exact_reward
from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.rollouts.stored import load_kept, load_samples
from trl_selfplay.rounds.weights import load_saved_model
from trl_selfplay.tools import calculator

RESULTS = Path(__file__).parent / "results" / "tools_learning"
PARTS = ("tools", "other_rows", "no_tools", "masks")
_RESULT = re.compile(r"Observation:\s*([a-z ]+): red (\d+), green (\d+), blue (\d+)")


def other_rows_tools() -> list[Callable[..., str]]:
    """Return the demo's tools, with the result of another row's call in place of one's own."""

    def search(query: str) -> str:
        """Find a colour's red, green and blue.

        Args:
            query: The colour's name.
        """
        return survey.search(_other(query))

    def calculator(expression: str) -> str:
        """Calculate with numbers.

        Args:
            expression: For example 3 * (4 + 5).
        """
        return str(sum(survey.colours()[_other(expression)]))

    return [search, calculator]


def _other(call: str) -> str:
    names = sorted(survey.colours())
    name = names[zlib.crc32(call.encode()) % len(names)]
    return name if name != call else names[0]


def build(args: argparse.Namespace, seed: int, folder: Path, **changes: Any) -> Any:
    """Return the demo's trainer; `changes` are fields of its config, or its arguments."""
    split = colours_split(seed)
    arguments = {
        "tools": [survey.search, calculator],
        "few_shot_examples": split.few_shot,
    }
    arguments |= {name: changes.pop(name) for name in list(changes) if name in arguments}
    if not arguments["tools"]:
        changes |= {"tool_format": None, "max_tool_calling_iterations": None}
    settings = {
        **demo_settings("rest_react", ReSTEMConfig),
        "num_prompts_per_round": args.num_prompts,
        "num_rounds": args.num_rounds,
        "max_steps": args.max_steps,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "on_empty_round": "stop",
        "num_generations_eval": 0,
        **changes,
    }
    return ReSTEMTrainer(
        load_demo_model_path(),
        ReSTEMConfig(str(folder), **settings),
        train_dataset=split.train,
        reward_funcs=exact_reward,
        peft_config=demo_lora("rest_react"),
        **{k: v for k, v in arguments.items() if v},
    )


def held_out(args: argparse.Namespace) -> list[Any]:
    """Return the held-out questions, which choose nothing."""
    return load_prompt_rows(colours_split().report.select(range(args.num_held_out)), "report")


def success(trainer: Any, rows: Sequence[Any], few_shot: bool = False) -> float:
    """Return the greedy success of the trainer's weights."""
    scored = trainer.self_play.score({"": rows}, with_few_shot=few_shot).metrics
    return scored["eval_few_shot_accuracy" if few_shot else "eval_accuracy"]


def train(trainer: Any, rows: Sequence[Any]) -> dict[str, Any]:
    """Run all rounds; return their lines and the held-out success after each."""
    started = time.monotonic()
    trainer.train()
    record = {"lines": trainer.run.lines, "minutes": (time.monotonic() - started) / 60}
    after = []
    for line in trainer.run.lines:
        if line.get("steps"):
            load_saved_model(trainer.model, trainer.run.folder(line["round"]) / "model")
            after.append(success(trainer, rows))
    first = load_samples(trainer.run.folder(0))
    return record | {"after": after, "sampled": fmean(r.reward or 0.0 for r in first)}


def run_tools(args: argparse.Namespace, seed: int, work: Path) -> dict[str, Any]:
    """Train with tools."""
    rows, trainer = held_out(args), build(args, seed, work / f"tools-{seed}")
    record = train(trainer, rows)
    if seed == args.seeds[0]:  # the same weights, questions and examples for all seeds
        record["few_shot"] = few_shot_success(args, trainer, rows)
    return record


def few_shot_success(args: argparse.Namespace, trainer: Any, rows: Sequence[Any]) -> float:
    """Return the greedy success of the untrained model with worked answers."""
    with trainer.model.disable_adapter():
        return success(trainer, rows, few_shot=True)


def run_other_rows(args: argparse.Namespace, seed: int, work: Path) -> dict[str, Any]:
    """Score the trained policy with other rows' results, then train with these from the start."""
    rows = held_out(args)
    trainer = build(args, seed, work / f"other-{seed}", tools=other_rows_tools(), num_rounds=1)
    last = max((work / f"tools-{seed}" / "_rounds").glob("round-*/model"))
    load_saved_model(trainer.model, last)
    record = {"trained_on_own": success(trainer, rows)}
    fresh = build(args, seed, work / f"other-fresh-{seed}", tools=other_rows_tools(), num_rounds=1)
    return record | train(fresh, rows)


def run_no_tools(args: argparse.Namespace, seed: int, work: Path) -> dict[str, Any]:
    """Train without tools, on answers at once."""
    rows = held_out(args)
    examples = [{**e, "completion": f"Answer: {e['solution']}"} for e in colours_split().few_shot]
    trainer = build(
        args, seed, work / f"no-tools-{seed}", tools=None, few_shot_examples=examples,
        max_completion_length=12,
    )  # fmt: skip
    record = train(trainer, rows)
    return record | {"few_shot": few_shot_success(args, trainer, rows)}


def run_masks(args: argparse.Namespace, seed: int, work: Path) -> dict[str, Any]:
    """Train on the first round's kept trajectories with and without the mask; count what is invented."""
    rows = held_out(args)
    folder = work / f"tools-{seed}" / "_rounds" / "round-000"
    trainer = build(args, seed, work / f"masks-{seed}")
    record: dict[str, Any] = {}
    for name in ("masked", "unmasked"):
        path = work / f"masks-{seed}-{name}"
        fit(args, trainer, load_kept(folder), name == "masked", seed, path)
        load_saved_model(trainer.model, path)
        record[name] = {"success": success(trainer, rows), **inventions(trainer, rows)}
    return record


def fit(
    args: argparse.Namespace, trainer: Any, kept: Any, masked: bool, seed: int, path: Path
) -> None:
    """Train an adapter on trajectories, with TRL's SFTTrainer, and save it."""
    prompts = trainer.self_play.training_prompt_ids(trainer.self_play.rows)
    examples = []
    for rollout in kept:
        prompt, own = prompts[rollout.prompt_id], rollout.completion_mask
        own = own if masked and own is not None else [True] * len(rollout.completion_ids)
        learned = [t if o else -100 for t, o in zip(rollout.completion_ids, own, strict=True)]
        examples.append(
            {
                "input_ids": [*prompt, *rollout.completion_ids],
                "labels": [-100] * len(prompt) + learned,
            }
        )
    names = {
        "max_steps",
        "learning_rate",
        "per_device_train_batch_size",
        "save_strategy",
        "report_to",
    }
    flags = {k: v for k, v in demo_flags("rest_react").items() if k in names}
    config = SFTConfig(
        str(path), **{**flags, "max_steps": args.max_steps}, seed=seed, use_cpu=True, bf16=False,
        disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    fitted = SFTTrainer(
        load_demo_model_path(), config, train_dataset=Dataset.from_list(examples),
        peft_config=demo_lora("rest_react"),
    )  # fmt: skip
    fitted.train()
    fitted.save_model(str(path))


def inventions(trainer: Any, rows: Sequence[Any]) -> dict[str, float]:
    """Return how often a policy writes a tool's result itself, and how often it is the right one."""
    play = trainer.self_play
    tokenizer = trainer.processing_class
    options = build_sampling_options(
        trainer.args,
        play.eos_token_ids,
        temperature=0.0,
        max_completion_length=48,
        stop_strings=("\n\n",),
    )
    prompts = play.training_prompt_ids(rows)
    requests = [SampleRequest(prompts[row.prompt_id], number) for number, row in enumerate(rows)]
    invented, right = [], []
    for number, sampled in play.collector.sampler.sample(requests, options, 16):
        found = _RESULT.search(tokenizer.decode(sampled.completion_ids))
        invented.append(found is not None)
        true = rows[number].solution
        right.append(found is not None and str(sum(map(int, found.groups()[1:]))) == true)
    return {"invented": fmean(invented), "invented_right": fmean(right)}


RUN = {
    "tools": run_tools,
    "other_rows": run_other_rows,
    "no_tools": run_no_tools,
    "masks": run_masks,
}


def write_summary(args: argparse.Namespace) -> None:
    """Write the tables of what is there beside the folder of the results."""
    found = {
        part: {s: json.loads(p.read_text()) for s in args.seeds if (p := args.results / f"{part}-{s}.json").exists()}
        for part in PARTS
    }  # fmt: skip
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    few_shot = [r["few_shot"] for r in found["tools"].values() if "few_shot" in r]
    lines = [
        "# Learning to use tools",
        "",
        "SmolLM2-135M-Instruct, LoRA, on the demo of `recipes/rest_react.py`: how bright is a colour of a "
        f"survey? {args.num_prompts} questions x {demo_flags('rest_react')['num_generations']} trajectories "
        f"per round, {args.max_steps} steps per round, seeds {', '.join(map(str, args.seeds))}; "
        f"{args.num_held_out} held-out questions, greedy (standard error up to "
        f"{0.5 / args.num_held_out**0.5:.2f}), of other colours. Two shared x86-64 cores, one thread; "
        f"{versions}; {datetime.date.today().isoformat()}. Script: `benchmarks/tools_learning.py`.",
        "",
        "## Success on held-out questions",
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean |",
        "|---|" + "---|" * (len(args.seeds) + 1),
    ]

    def row(label: str, part: str, read: Callable[[dict[str, Any]], float | None]) -> None:
        values = {seed: read(record) for seed, record in found[part].items()}
        known = [v for v in values.values() if v is not None]
        missing = {s: "nothing to train on" if s in values else "not measured" for s in args.seeds}
        cells = [missing[s] if (v := values.get(s)) is None else f"{v:.3f}" for s in args.seeds]
        mean = f"{fmean(known):.3f}" if known else ""
        lines.append(f"| {label} | {' | '.join(cells)} | {mean} |")

    row("few-shot ReAct, untrained", "tools", lambda r: few_shot[0] if few_shot else None)
    row("sampled in round 0, with examples", "tools", lambda r: r["sampled"])
    for number in range(args.num_rounds):
        row(f"ReST^EM with tools, after round {number}", "tools", lambda r, n=number: at(r, n))
    row("the same policy, results of other rows", "other_rows", lambda r: r["trained_on_own"])
    row("sampled in round 0 with results of other rows", "other_rows", lambda r: r.get("sampled"))
    row("ReST^EM with results of other rows", "other_rows", lambda r: at(r, 0))
    row("without tools, few-shot, untrained", "no_tools", lambda r: r["few_shot"])
    row("sampled in round 0 without tools", "no_tools", lambda r: r["sampled"])
    row("ReST^EM without tools, last round", "no_tools", lambda r: (r["after"] or [None])[-1])
    lines += [
        "",
        "## Results as training targets",
        "",
        "Share of held-out questions for which the policy writes a search result itself, where nothing stops "
        'it at "Observation:", and success with tools, after one training on the same trajectories.',
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean |",
        "|---|" + "---|" * (len(args.seeds) + 1),
    ]
    for name, label in (("masked", "results masked"), ("unmasked", "results trained on")):
        row(f"{label}: invented", "masks", lambda r, n=name: r[n]["invented"])
        row(f"{label}: invented, and right", "masks", lambda r, n=name: r[n]["invented_right"])
        row(f"{label}: success with tools", "masks", lambda r, n=name: r[n]["success"])
    save_text(args.results.with_suffix(".md"), "\n".join([*lines, ""]))


def at(record: dict[str, Any], number: int) -> float | None:
    """Return the held-out success after a round."""
    after = record.get("after", [])
    return after[number] if len(after) > number else None


def main() -> None:
    """Run what isn't there, and write the table after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--num-rounds", type=int, default=2)
    parser.add_argument("--max-steps", type=int, default=12)
    parser.add_argument("--num-held-out", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--work", type=Path, default=None, help="where runs are kept; a part reads others'"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    work = args.work or Path(tempfile.mkdtemp())
    for part in args.parts:
        for seed in args.seeds:
            path = args.results / f"{part}-{seed}.json"
            if not path.exists():
                started = time.monotonic()
                record = RUN[part](args, seed, work)
                print(part, seed, f"{(time.monotonic() - started) / 60:.1f} min", flush=True)
                save_text(path, json.dumps(record, indent=1, default=str))
            write_summary(args)


if __name__ == "__main__":
    main()
