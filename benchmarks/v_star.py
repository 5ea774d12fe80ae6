"""Does V-STaR's verifier choose better among k answers than a vote, and by which score?

A generator teaches itself from right answers (ReST^EM, from the base in each round, with the right
samples of all rounds). A verifier is trained on all its samples, right and wrong, with DPO from the
generator's last weights. Then the generator answers held-out prompts N times, and each way of choosing
one of k of these answers is graded:

- sum, mean, ratio: the verifier's likelihood (the paper's), per token, and relative to the generator's.
- vote: the answer that most of the k give, ties broken at random.
- any: whether one of the k is right at all (pass@k), which nothing can beat. k = 1 is pass@1 for all.

Controls:

- generator sum, generator mean: the likelihood of the model that the verifier was trained from.
- shuffled sum, shuffled mean, shuffled ratio: a verifier trained in the same way, with the verdicts
  of each prompt's samples shuffled, so that it learns nothing about right and wrong. It must not choose
  better than the generator's likelihood, nor its ratio better than chance (pass@1).
- shortest, longest: by the number of tokens alone.

Tasks: "addition" is that of addition.py, sums of 2 or 3 digits by a decoder of 0.8 M parameters, with
more prompts; all weights are trained, on a CPU. "words" is the demo's task and model,
SmolLM2-135M-Instruct with LoRA and the settings of recipes/v_star.py, on all 220 prompts of the demo
that aren't in the report; a GPU is used where there is one.

`--tune` tries SETTINGS on the held-out prompts of a seed that is not reported; without `--setting`, the
best of them by the likelihood's best of 16 is taken. A seed and setting is a process of its own and a file under
results/v_star; what is there is not run again. Generators are kept under the system's temporary folder.

    OMP_NUM_THREADS=1 python benchmarks/v_star.py --task addition --tune --seed 100
    OMP_NUM_THREADS=1 python benchmarks/v_star.py --task addition --seed 0 1 2
    python benchmarks/v_star.py --task words --seed 0
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import addition
import datasets
import torch

from trl_selfplay import default_normal_form
from trl_selfplay.demos import sums
from trl_selfplay.disk import save_text

RESULTS = Path(__file__).parent / "results" / "v_star"
KS = (1, 2, 4, 8, 16)
NUM_SAMPLES = 32  # of each held-out prompt; the best of k is averaged over all draws of k
NUM_PROMPTS = 2000  # of the task "addition"
VOTE_DRAWS = 200
TUNING_SEED = 100
SCORES = ("sum", "mean", "ratio")
# Learning rate, beta and optimizer steps of the verifier.
SETTINGS: dict[str, tuple[tuple[float, float, int], ...]] = {
    "addition": ((1e-4, 1.0, 300), (1e-4, 0.1, 300), (3e-5, 0.1, 300), (3e-4, 1.0, 600)),
    "words": ((1e-4, 0.1, 200), (5e-4, 0.1, 200), (1e-4, 1.0, 200)),
}
READING: tuple[str, ...] = (
    "- With beta 1 the verifier's likelihood chooses better than a majority vote and than the generator's "
    "own likelihood, by 5 and 4 points in the mean at k = 16; on seed 0, which the generator nearly "
    "solves, all three are equal. Most of the gain is there at k = 4.",
    "- The generator's own likelihood is a strong choice without any verifier, as good as a vote of 16 "
    "and better than one of fewer: a verifier has to be compared with it.",
    "- Sum and mean are the same here, because answers to a prompt have nearly the same length. The ratio, "
    "which is what DPO trains, is worse, and gets worse beyond k = 4: it prefers answers that the "
    "generator finds improbable, most of which are wrong. The likelihood holds these down.",
    "- Beta decides: at 0.1, every setting that was tried chooses, in the mean over its seeds, no better "
    "than the generator's likelihood at k = 16.",
    "- The control: after training on shuffled verdicts with learning rate 1e-4 the likelihood chooses "
    "worse than the generator's on two seeds and as well on the third; with 3e-5, one seed, 4 points "
    "better, about one standard error of 200 prompts. The ratio of such a verifier isn't chance, as one "
    "might expect, but falls far below: noise moves improbable answers most, and the ratio chooses those "
    "that it moved up.",
    "- Length tells nothing about an answer on this task.",
    "- Not shown: a pretrained language model (the task `words` has run at toy size alone), answers of "
    "different lengths, the paper's sizes. The first table's setting was fixed before its seeds were run, "
    "and was not tried on seed 100, where beta 1 is the best of those that were. Held-out sets of 200 "
    "prompts: a standard error of about 3 points per seed, less for differences on the same prompts. "
    "Generators differ between the two machines, whose versions of torch differ.",
)


# --- the tasks -----------------------------------------------------------------------------------


def toy(settings: dict[str, Any], **smallest: Any) -> dict[str, Any]:
    """Return settings with the smallest numbers of prompts, samples and steps."""
    return settings | smallest


def addition_task(seed: int, is_toy: bool) -> dict[str, Any]:
    """Return the prompts, the base and the settings of the task "addition"."""
    parts = addition.draw_sums(seed)
    known = {pair for part in ("base", "held_out") for n in (2, 3) for pair in parts[part][n]}
    train = sums.rows_of(draw_more_sums(seed, known))
    held_out = sums.rows_of([pair for n in (2, 3) for pair in parts["held_out"][n]])
    settings = {
        **sums.training_settings(seed),
        "num_rounds": 2,
        "num_generations": 4,
        "temperature": 0.7,
        "top_k": 0,
        "max_completion_length": 36,  # three digits need 32 with EOS
        "max_per_prompt": 4,
        "max_steps": 90,
        "per_device_train_batch_size": 16,
        "warmup_steps": 5,
        "learning_rate": 3e-4,
    }
    return {
        "base": addition.load_base(seed, parts["base"]),
        "train": train.select(range(16)) if is_toy else train,
        "held_out": held_out.select(range(8)) if is_toy else held_out,
        "few_shot": None,
        "reward": sums.right_answer,
        "answer": lambda completion: completion.rsplit(";", 1)[-1],
        "generator": settings,
        "verifier": sums.training_settings(seed) | {"per_device_train_batch_size": 16},
        "peft": False,
    }


def draw_more_sums(seed: int, known: set[sums.Sum]) -> list[sums.Sum]:
    """Return `NUM_PROMPTS` different sums, half of them of 2 digits and half of 3, none of the known."""
    rng = random.Random(f"more/{seed}")
    drawn: dict[sums.Sum, None] = {}
    for digits, count in ((2, NUM_PROMPTS // 2), (3, NUM_PROMPTS)):
        while len(drawn) < count:
            first, last = 10 ** (digits - 1), 10**digits - 1
            pair = rng.randint(first, last), rng.randint(first, last)
            if pair not in known:
                drawn[pair] = None
    return list(drawn)


def words_task(seed: int, is_toy: bool) -> dict[str, Any]:
    """Return the prompts, the base and the settings of the task "words", which are the recipe's."""
    import importlib.util

    from trl_selfplay.demos import words
    from trl_selfplay.rewards import exact_reward, extract_answer

    source = Path(__file__).parent.parent / "recipes" / "v_star.py"
    spec = importlib.util.spec_from_file_location("v_star_recipe", source)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    split = words.demo_split(seed)
    train = datasets.concatenate_datasets([split.train, split.select, split.judged])
    size = {"logging_steps": 50, "disable_tqdm": True, "seed": seed}
    flags = {
        k: v for k, v in recipe.DEMO.items() if not k.startswith(("lora", "use_peft", "output_dir"))
    }
    return {
        "base": words.load_demo_model_path(),
        "train": train,
        "held_out": split.report.select(range(8)) if is_toy else split.report,
        "few_shot": split.few_shot,
        "reward": exact_reward,
        "answer": extract_answer,
        "generator": recipe.GENERATOR | size | {"num_prompts_per_round": None},
        "verifier": flags | size,
        "peft": {
            "r": recipe.DEMO["lora_r"],
            "lora_alpha": recipe.DEMO["lora_alpha"],
            "lora_dropout": recipe.DEMO["lora_dropout"],
            "target_modules": recipe.DEMO["lora_target_modules"],
            "task_type": "CAUSAL_LM",
        },
    }


TASKS: dict[str, Callable[[int, bool], dict[str, Any]]] = {
    "addition": addition_task,
    "words": words_task,
}
TOY: dict[str, Any] = {"num_rounds": 1, "num_generations": 4, "max_steps": 2, "temperature": 1.0,
                       "num_prompts_per_round": 16, "on_empty_round": "stop"}  # fmt: skip


# --- generator and verifiers ---------------------------------------------------------------------


def adapter(task: dict[str, Any]) -> Any:
    """Return the configuration of a new adapter, or None to train all weights."""
    from peft import LoraConfig

    return LoraConfig(**task["peft"]) if task["peft"] else None


def build_generator(task: dict[str, Any], folder: Path, is_toy: bool) -> Any:
    """Return the trainer of the generator."""
    from trl_selfplay import ReSTEMConfig, ReSTEMTrainer

    settings = {
        **task["generator"],
        "start_from": "base",
        "few_shot_in_training": False,
        "num_generations_eval": 4 if is_toy else NUM_SAMPLES,
        "temperature_eval": 1.0,
    }
    settings |= TOY | {"history_rounds": 0} if is_toy else {}
    settings["history_rounds"] = settings["num_rounds"] - 1
    return ReSTEMTrainer(
        task["base"],
        ReSTEMConfig(str(folder / "generator"), **settings),
        train_dataset=task["train"],
        reward_funcs=task["reward"],
        few_shot_examples=task["few_shot"],
        peft_config=adapter(task),
    )


def shuffle_verdicts(rollouts: Sequence[Any], seed: int) -> list[Any]:
    """Return each prompt's different completions, with their rewards shuffled among them.

    Different ones, because with its copies shuffled too a frequent completion would be on both sides
    of pairs, and a rare one mostly on the side of the more frequent verdict.
    """
    groups: dict[str, dict[Any, Any]] = defaultdict(dict)
    for rollout in rollouts:
        if not rollout.is_truncated:
            groups[rollout.prompt_id].setdefault(default_normal_form(rollout.completion), rollout)
    shuffled = []
    for prompt_id, distinct in sorted(groups.items()):
        rewards = [rollout.reward for rollout in distinct.values()]
        random.Random(f"{seed}/{prompt_id}").shuffle(rewards)
        shuffled += [
            replace(rollout, reward=reward, rewards=(reward,))
            for rollout, reward in zip(distinct.values(), rewards, strict=True)
        ]
    return shuffled


def train_verifier(
    task: dict[str, Any],
    generator: str,
    samples: Sequence[Any],
    setting: tuple[float, float, int],
    folder: Path,
    is_toy: bool,
) -> tuple[str, dict[str, float]]:
    """Train a verifier; return its folder and how its training ended."""
    from trl_selfplay import VSTaRConfig, VSTaRTrainer

    learning_rate, beta, steps = setting
    settings = {
        **task["verifier"],
        "learning_rate": learning_rate,
        "beta": beta,
        "max_steps": 2 if is_toy else steps,
        "lr_scheduler_type": "linear",
    }
    trainer = VSTaRTrainer(
        generator,
        args=VSTaRConfig(str(folder), **settings),
        train_dataset=task["train"],
        peft_config=adapter(task),
        samples=samples,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    last = (
        {n: lines[-1][n] for n in ("loss", "rewards/accuracies", "rewards/margins")}
        if lines
        else {}
    )
    return str(folder), {"pairs": float(trainer.run.lines[0]["examples"]), **last}


# --- choosing ------------------------------------------------------------------------------------


def vote_accuracy(answers: Sequence[str | None], right: Sequence[bool], k: int, seed: str) -> float:
    """Return how often the commonest answer of k drawn samples is right; None votes for nothing.

    Of answers with as many votes each is chosen with equal probability. The mean over
    `VOTE_DRAWS` draws, or over the one there is if k is all.

    >>> vote_accuracy(["3", "3", "4"], [True, True, False], 3, "")
    1.0
    >>> vote_accuracy(["3", "4"], [True, False], 2, "")
    0.5
    """
    rng = random.Random(seed)
    everything = range(len(answers))
    draws = (
        [everything]
        if k == len(answers)
        else [rng.sample(everything, k) for _ in range(VOTE_DRAWS)]
    )
    shares = []
    for draw in draws:
        votes = Counter(answers[i] for i in draw if answers[i] is not None)
        if not votes:
            shares.append(0.0)
            continue
        most = max(votes.values())
        winners = [answer for answer, count in votes.items() if count == most]
        verdicts = {answers[i]: right[i] for i in draw}
        shares.append(fmean(float(verdicts[winner]) for winner in winners))
    return fmean(shares)


def uses_gpu(task: dict[str, Any]) -> bool:
    """Return whether a task's models are on a GPU."""
    return torch.cuda.is_available() and not task["verifier"].get("use_cpu")


def evaluate(
    task: dict[str, Any], samples: list[tuple[str, Any]], verifiers: dict[str, str], generator: str
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return by way of choosing and k how often the choice is right, and seconds of scoring."""
    from trl_selfplay.demos.best_of_k import score_with
    from trl_selfplay.evaluation.estimates import mean_best_of_k, pass_at_k
    from trl_selfplay.rewards import VerifierReward

    rollouts = [rollout for _, rollout in samples]
    count = max(Counter(r.prompt_id for r in rollouts).values())
    ks = [k for k in KS if k <= count]
    device = "cuda" if uses_gpu(task) else None
    rng = random.Random(0)
    scores: dict[str, list[float | None]] = {
        "shortest": [-float(len(r.completion_ids)) for r in rollouts],
        "longest": [float(len(r.completion_ids)) for r in rollouts],
        "random": [rng.random() for _ in rollouts],
    }
    seconds: dict[str, float] = {}
    for name, folder in {"generator": generator, **verifiers}.items():
        likelihoods: dict[str, list[float | None]] = {}
        started = time.monotonic()
        likelihoods["sum"] = score_with(VerifierReward(folder, score="sum", device=device), samples)
        seconds[name] = time.monotonic() - started
        likelihoods["mean"] = [  # with the end, which is added where it was not sampled
            None if s is None else s / (len(r.completion_ids) + (r.finish != "eos"))
            for s, r in zip(likelihoods["sum"], rollouts, strict=True)
        ]
        for kind, values in likelihoods.items():
            scores[f"{name} {kind}"] = values
        if name != "generator":
            scores[f"{name} ratio"] = [
                None if v is None or g is None else v - g
                for v, g in zip(likelihoods["sum"], scores["generator sum"], strict=True)
            ]
    shares = {name: mean_best_of_k(rollouts, s, ks) for name, s in scores.items()}
    groups: dict[str, list[Any]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.prompt_id].append(rollout)
    verdicts = {p: [r.passes(1.0) for r in group] for p, group in groups.items()}
    shares["any"] = {k: fmean(pass_at_k(len(v), sum(v), k) for v in verdicts.values()) for k in ks}
    answers = {
        p: [None if r.is_truncated else task["answer"](r.completion) for r in group]
        for p, group in groups.items()
    }
    shares["vote"] = {
        k: fmean(vote_accuracy(answers[p], verdicts[p], k, f"{p}/{k}") for p in groups) for k in ks
    }
    return {n: {str(k): v for k, v in each.items()} for n, each in shares.items()}, seconds


# --- the run -------------------------------------------------------------------------------------


def work_folder(name: str, task: dict[str, Any], seed: int, is_toy: bool) -> Path:
    """Return where a seed's generator is kept, by what it is made of."""
    made_of = json.dumps([task["generator"], task["base"], NUM_SAMPLES], sort_keys=True)
    key = hashlib.blake2b(made_of.encode(), digest_size=6).hexdigest()
    size = "toy-" if is_toy else ""
    return Path(tempfile.gettempdir()) / f"v-star-{size}{name}-{key}-{seed}"


def prepare(
    name: str, seed: int, is_toy: bool
) -> tuple[dict[str, Any], Any, list[tuple[str, Any]]]:
    """Return the task, the trainer of its generator, and the generator's held-out samples."""
    from trl_selfplay.demos.best_of_k import sample_heldout

    task = TASKS[name](seed, is_toy)
    folder = work_folder(name, task, seed, is_toy)
    generator = build_generator(task, folder, is_toy)
    done = folder / "done"  # then several processes may read it at a time
    if not done.exists():
        generator.train(resume_from_checkpoint=True)
    samples = sample_heldout(generator, task["held_out"], folder / "held-out")
    done.touch()
    return task, generator, samples


def run(name: str, setting: tuple[float, float, int], seed: int, is_toy: bool) -> dict[str, Any]:
    """Train a generator, a verifier and its control; return what each way of choosing gives."""
    from trl_selfplay.rollouts.stored import load_all_samples

    started = time.monotonic()
    task, generator, held_out = prepare(name, seed, is_toy)
    source = generator.args.output_dir
    sampled = time.monotonic()
    samples = load_all_samples(generator.run.root)
    right = [fmean(r.passes(1.0) for r in samples if r.round_index == t)
             for t in sorted({r.round_index for r in samples})]  # fmt: skip
    verifiers, endings = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        arms = {"verifier": samples}
        if seed != TUNING_SEED or is_toy:
            arms["shuffled"] = shuffle_verdicts(samples, seed)
        for kind, learned in arms.items():
            verifiers[kind], endings[kind] = train_verifier(
                task, source, learned, setting, Path(temporary) / kind, is_toy
            )
        verified = time.monotonic()
        shares, seconds = evaluate(task, held_out, verifiers, source)
    is_gpu = uses_gpu(task)
    return {
        "task": name,
        "setting": list(setting),
        "seed": seed,
        "share_right_by_round": right,
        "samples": len(samples),
        "held_out_prompts": len({r.prompt_id for _, r in held_out}),
        "held_out_samples": len(held_out),
        "best_of_k": shares,
        "training": endings,
        "seconds": {
            "generator_and_held_out_samples": sampled - started,
            "verifiers": verified - sampled,
            **{f"scoring_by_{kind}": value for kind, value in seconds.items()},
        },
        "machine": f"one {torch.cuda.get_device_name(0)} GPU" if is_gpu
        else f"{os.cpu_count()} shared {platform.machine().replace('_', '-')} cores, {torch.get_num_threads()} in use",
        "versions": {n: version(n) for n in ("trl", "transformers", "peft", "torch")},
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def record_path(results: Path, name: str, setting: tuple[float, ...], seed: int) -> Path:
    """Return where a run's record lies."""
    return results / f"{name}-{'-'.join(f'{value:g}' for value in setting)}-{seed}.json"


def chosen_setting(results: Path, name: str) -> tuple[float, float, int]:
    """Return the setting whose likelihood chooses best among 16 on the tuning seed; else the first."""
    tried = {}
    for setting in SETTINGS[name]:
        path = record_path(results, name, setting, TUNING_SEED)
        if path.exists():
            tried[setting] = json.loads(path.read_text())["best_of_k"]["verifier sum"]["16"]
    return max(tried, key=lambda s: tried[s]) if tried else SETTINGS[name][0]


# --- the summary ---------------------------------------------------------------------------------

ROWS = (
    "any", "verifier sum", "verifier mean", "verifier ratio", "vote", "generator sum", "generator mean",
    "shuffled sum", "shuffled mean", "shuffled ratio", "shortest", "longest", "random",
)  # fmt: skip


def spread(values: list[float]) -> str:
    """Return the mean, and the range over several seeds."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def write_summary(results: Path) -> None:
    """Write the tables of the records that are present beside their folder."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    lines = ["# The best of k by V-STaR's verifier", ""]
    lines += ["Script: `benchmarks/v_star.py`, which says what the rows are."]
    for name in TASKS:
        settings = {
            tuple(r["setting"]) for r in records if r["task"] == name and r["seed"] != TUNING_SEED
        }
        for setting in sorted(settings, key=lambda s: (-s[1], -s[0])):
            found = [r for r in records if r["task"] == name and tuple(r["setting"]) == setting
                     and r["seed"] != TUNING_SEED]  # fmt: skip
            lines += table_of(name, setting, found)
        tried = [r for r in records if r["task"] == name and r["seed"] == TUNING_SEED]
        if tried:
            lines += ["", f"Settings tried on seed {TUNING_SEED}, best of 16:", ""]
            lines += ["| learning rate | beta | steps | sum | mean | ratio |", "|---" * 6 + "|"]
            for r in tried:
                cells = [f"{r['best_of_k'][f'verifier {kind}']['16']:.3f}" for kind in SCORES]
                lines.append(f"| {' | '.join([*(f'{v:g}' for v in r['setting']), *cells])} |")
    lines += ["", "## What this shows, and what it doesn't", "", *READING]
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")


def table_of(name: str, setting: tuple[float, ...], found: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a task's section."""
    first = found[0]
    versions = ", ".join(f"{package} {number}" for package, number in first["versions"].items())
    ks = sorted(map(int, first["best_of_k"]["any"]))
    rate, beta, steps = setting
    right = "; ".join(", ".join(f"{v:.2f}" for v in r["share_right_by_round"]) for r in found)
    training = "; ".join(
        f"{kind} {fmean(r['training'][kind].get('rewards/accuracies', 0.0) for r in found):.2f}"
        for kind in ("verifier", "shuffled")
    )
    lines = [
        "",
        f"## {name}: learning rate {rate:g}, beta {beta:g}, {steps:g} steps",
        "",
        f"{first['held_out_prompts']} held-out prompts, "
        f"{first['held_out_samples'] // first['held_out_prompts']} answers each at temperature 1.0 "
        f"(top_p 0.95). {' and '.join(sorted({r['machine'] for r in found}))}; {versions}; seeds "
        f"{sorted(r['seed'] for r in found)}; {max(r['date'] for r in found)}. "
        f"{fmean(r['training']['verifier']['pairs'] for r in found):.0f} pairs. Share of the "
        f"generator's samples that are right, by round and seed: {right}. Pairs ordered right at the "
        f"end of training: {training}. Mean over seeds, and range.",
        "",
        f"| chosen by | {' | '.join(f'k = {k}' for k in ks)} |",
        "|---" * (len(ks) + 1) + "|",
    ]
    for row in ROWS:
        cells = [spread([r["best_of_k"][row][str(k)] for r in found]) for k in ks]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    by_seed = [
        f"seed {r['seed']}: " + ", ".join(f"{row} {r['best_of_k'][row][str(ks[-1])]:.3f}" for row in
        ("verifier sum", "vote", "generator sum"))
        for r in found
    ]  # fmt: skip
    return [*lines, "", f"By seed, k = {ks[-1]}: {'; '.join(by_seed)}."]


def main() -> None:
    """Run what is missing and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="addition")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="run all settings")
    parser.add_argument("--setting", type=float, nargs=3, help="learning rate, beta, steps")
    parser.add_argument("--toy", action="store_true", help="the smallest size; nothing is kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--generator", action="store_true", help="train the generators alone")
    parser.add_argument("--here", action="store_true", help="run in this process")
    parser.add_argument("--summary", action="store_true", help="write the summary alone")
    args = parser.parse_args()
    if args.summary:
        write_summary(args.results)
        return
    if args.toy:
        record = run(args.task, SETTINGS[args.task][0], args.seed[0], is_toy=True)
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
        return
    if args.generator:
        for seed in args.seed:
            prepare(args.task, seed, is_toy=False)
        return
    args.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seed:
        for given in SETTINGS[args.task] if args.tune else (args.setting,):
            rate, beta, steps = given or chosen_setting(args.results, args.task)
            setting = (rate, beta, int(steps))
            path = record_path(args.results, args.task, setting, seed)
            if path.exists():
                continue
            if args.here:
                save_text(path, json.dumps(run(args.task, setting, seed, is_toy=False), indent=1))
                continue
            command = [sys.executable, __file__, "--here", "--results", str(args.results)]
            command += ["--task", args.task, "--seed", str(seed), "--setting", *map(str, setting)]
            subprocess.run(command, check=True)
    if not args.here:
        write_summary(args.results)


if __name__ == "__main__":
    main()
