"""Do thoughts help where one pass isn't enough, and is it what they say that helps?

The model and the lines are those of the recipe's demo: pointers followed through a map. Per seed
all arms begin with the same pre-trained checkpoint, which has seen remarks before some answers,
some of them the steps, and see the same lines, which show no remarks:

- full: Quiet-STaR.
- no_reinforce: the same without REINFORCE; thoughts learn by the loss of the text alone.
- swapped: no_reinforce whose thoughts are another line's, in training and when scored: the mixing
  head, the vectors and the added computation, without what a thought says. The mixing head alone.
- pause: as many tokens as a thought has, all of them one word with a learnt vector, not sampled.
- sft: SFTTrainer, as many steps.
- sft_time: SFTTrainer, as many steps as fit the time that `full` took to train.

full is also scored with thoughts swapped between lines, with the likeliest thoughts instead of
sampled ones, and with the true steps as thoughts. Hard tokens are the quarter of the held-out
completions' tokens that the checkpoint predicts worst, the same for all arms of a seed; the gain is
against `sft`. Each arm and seed is a process of its own and a file under results/quiet_star/; what
is there is not run again:

    python benchmarks/quiet_star.py --seeds 0 1 2
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from recipe_demos import demo_flags, demo_settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_selfplay import QuietSTaRConfig, QuietSTaRTrainer
from trl_selfplay.demos import pointer_scores
from trl_selfplay.demos import pointers as demo
from trl_selfplay.trainers.quiet_star.sampling import SampledThoughts
from trl_selfplay.trainers.quiet_star.storage import ThoughtSettings

RESULTS = Path(__file__).parent / "results" / "quiet_star"
ARMS = ("full", "no_reinforce", "swapped", "pause", "sft", "sft_time")
NUM_SCORED = 600
# Share of the tokens that count as hard.
HARD = 0.25
# Steps of two runs from which the speed of `sft_time` is read before its number of steps is set.
NUM_TIMED = (30, 230)


def checkpoint(seed: int) -> Path:
    """Return the folder of a seed's pre-trained checkpoint, made once and kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl-selfplay"
    settings = repr((demo.MODEL, demo.PRETRAINING, demo.REMARKS, demo.NUM_PRETRAINING, demo.NODES))
    name = f"pointers-{hashlib.blake2b(settings.encode(), digest_size=6).hexdigest()}-{seed}"
    folder = cache / name
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            demo.pretrain(Path(temporary) / name, seed)
            (Path(temporary) / name).rename(folder)
    return folder


class PauseTrainer(QuietSTaRTrainer):
    """Thinks one word, again and again, whose vector is learnt."""

    def think(self, inputs: dict[str, Any]) -> Any:
        """Return thoughts that nothing sampled."""
        thinking, thoughts = super().think(inputs)
        return thinking, SampledThoughts(
            pauses(self.processing_class, thoughts.tokens), thoughts.entropies
        )


class SwappedTrainer(QuietSTaRTrainer):
    """Each line gets the thoughts of the line after it in the batch."""

    def think(self, inputs: dict[str, Any]) -> Any:
        """Return other lines' thoughts."""
        thinking, thoughts = super().think(inputs)
        return thinking, SampledThoughts(thoughts.tokens.roll(1, 0), thoughts.entropies)


def pauses(tokenizer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return thoughts of the same shape that consist of the pause word."""
    return torch.full_like(tokens, tokenizer.convert_tokens_to_ids(demo.PAUSE))


def true_steps(tokenizer: Any, lines: list[dict[str, Any]], tokens: torch.Tensor) -> torch.Tensor:
    """Return thoughts (B, U, n) of which those before answers are the steps as pre-training shows them."""
    tokens = tokens.clone()
    encoded = pointer_scores.encode_lines(tokenizer, lines)
    for b, line in enumerate(lines):
        steps = torch.tensor([tokenizer(words)["input_ids"] for words in line["steps"]])
        tokens[b, encoded.is_answer[b]] = steps
    return tokens


def train(arm: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """Train an arm; return its trainer, and its seconds and steps."""
    rows = train_rows(seed)
    changes: dict[str, Any] = {"seed": seed, "output_dir": tempfile.mkdtemp(), "disable_tqdm": True}
    settings = demo_settings("quiet_star", QuietSTaRConfig) | changes
    if arm in ("sft", "sft_time"):
        cls, config = SFTTrainer, SFTConfig
        settings = {k: v for k, v in settings.items() if k in SFTConfig.__dataclass_fields__}
        if arm == "sft_time":
            settings["max_steps"] = steps_in(load(f"full-{seed}")["seconds"], seed)
    else:
        cls = {"pause": PauseTrainer, "swapped": SwappedTrainer}.get(arm, QuietSTaRTrainer)
        config = QuietSTaRConfig
        if arm != "full":
            settings["reinforce_weight"] = 0.0
        if arm == "pause":  # more thoughts would be copies of one
            settings["num_thoughts"] = 1
    trainer = cls(
        AutoModelForCausalLM.from_pretrained(checkpoint(seed)),
        config(**settings),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(checkpoint(seed)),
    )
    started = time.monotonic()
    trainer.train()
    return trainer, {
        "seconds": time.monotonic() - started,
        "steps": trainer.state.global_step,
        "log": trainer.state.log_history,
    }


def train_rows(seed: int) -> Any:
    """Return the lines that all arms of a seed are trained on."""
    return demo.pointer_split(seed)[0]


def steps_in(seconds: float, seed: int) -> int:
    """Return how many steps of SFT fit a time: what a step takes between a short and a longer run."""
    short, longer = (sft_seconds(steps, seed) for steps in NUM_TIMED)
    step = (longer - short) / (NUM_TIMED[1] - NUM_TIMED[0])
    return max(1, int((seconds - short) / step) + NUM_TIMED[0])


def sft_seconds(steps: int, seed: int) -> float:
    """Return the seconds that some steps of SFT take from the checkpoint, set-up included."""
    settings = demo_settings("quiet_star", SFTConfig)
    settings |= {"max_steps": steps, "output_dir": tempfile.mkdtemp(), "disable_tqdm": True}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(checkpoint(seed)),
        SFTConfig(**settings),
        train_dataset=train_rows(seed),
        processing_class=AutoTokenizer.from_pretrained(checkpoint(seed)),
    )
    started = time.monotonic()
    trainer.train()
    return time.monotonic() - started


def run_arm(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm; return its scores on held-out lines, in each way of thinking that it has."""
    lines = demo.heldout_lines(NUM_SCORED, seed)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(seed))
    encoded = pointer_scores.encode_lines(tokenizer, lines)
    initial = AutoModelForCausalLM.from_pretrained(checkpoint(seed)).eval()
    first = pointer_scores.score_lines(initial, encoded, None)
    hard = hardest(first.nll, encoded.is_real)
    trainer, record = train(arm, seed)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    ways: dict[str, Any] = {
        "initial": first,
        "none": pointer_scores.score_lines(model, encoded, None),
    }
    if arm not in ("sft", "sft_time"):
        own = pointer_scores.think_about(model, encoded, ThoughtSettings(demo.REMARK_LENGTH), 1)
        thoughts = {"own": own}
        if arm == "pause":
            thoughts = {"own": pauses(tokenizer, own)}
        elif arm == "swapped":
            thoughts = {"own": own.roll(1, 0)}
        else:
            greedy = ThoughtSettings(demo.REMARK_LENGTH, thought_temperature=0.0)
            thoughts |= {
                "greedy": pointer_scores.think_about(model, encoded, greedy, 1),
                "swapped": own.roll(1, 0),
                "true_steps": true_steps(tokenizer, lines, own),
            }
            record["share_of_true_steps"] = share_equal(
                own, thoughts["true_steps"], encoded.is_answer
            )
        ways |= {way: pointer_scores.score_lines(model, encoded, t) for way, t in thoughts.items()}
    record["hard_that_are_answers"] = encoded.is_answer[hard].float().mean().item()
    record["scores"] = {way: summarize(s, encoded, hard) for way, s in ways.items()}
    return record


def hardest(nll: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """Return which tokens are the hardest, bool (B, U)."""
    limit = nll[is_real].quantile(1 - HARD)
    return (nll > limit) & is_real


def share_equal(one: torch.Tensor, two: torch.Tensor, where: torch.Tensor) -> float:
    """Return the share of thoughts (B, U, n) that are the same in both."""
    return (one == two).all(-1)[where].float().mean().item()


def summarize(scores: Any, encoded: Any, hard: torch.Tensor) -> dict[str, Any]:
    """Return mean losses in nats on hard, easy and all tokens, and answers' accuracy by hops."""
    easy = encoded.is_real & ~hard
    answers = encoded.is_answer & encoded.is_real
    right = scores.is_right.float()
    by_hops = {
        str(h): {
            "nll": scores.nll[answers & (encoded.hops == h)[:, None]].mean().item(),
            "accuracy": right[answers & (encoded.hops == h)[:, None]].mean().item(),
        }
        for h in demo.HOPS
    }
    return {
        "hard": scores.nll[hard].mean().item(),
        "easy": scores.nll[easy].mean().item(),
        "all": scores.nll[encoded.is_real].mean().item(),
        "accuracy_hard": right[hard & answers].mean().item(),
        "accuracy": right[answers].mean().item(),
        "by_hops": by_hops,
    }


def load(name: str) -> dict[str, Any]:
    """Return a finished arm and seed."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def write_summary(seeds: list[int]) -> None:
    """Write results/quiet_star.md from the records of these seeds that are present."""
    found: dict[str, dict[int, dict[str, Any]]] = {
        arm: {s: load(f"{arm}-{s}") for s in seeds if (RESULTS / f"{arm}-{s}.json").exists()}
        for arm in ARMS
    }
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "torch"))
    flags = demo_flags("quiet_star")
    layers, width = demo.MODEL["num_hidden_layers"], demo.MODEL["hidden_size"]
    text = [
        "# Does thinking help where one pass isn't enough?",
        "",
        f"Pointer chasing, {layers} layers of width {width}, {flags['max_steps']} steps of "
        f"{flags['per_device_train_batch_size']} lines, thoughts of {demo.REMARK_LENGTH} "
        f"tokens, {flags['num_thoughts']} a token, float32. {platform.machine()}, "
        f"{platform.system()}, 1 CPU thread; {versions}; seeds {sorted(seeds)}; "
        f"{datetime.date.today().isoformat()}. Script: `benchmarks/quiet_star.py`, which says what "
        f"the arms are. Mean [least, most] over seeds on {NUM_SCORED} held-out lines: −log p in "
        "nats, answers by the likeliest node. One thought a token.",
        "",
        "| arm | scored with | seeds | hard tokens | gain over sft | easy tokens | answers right | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sft = {s: r["scores"]["none"]["hard"] for s, r in found["sft"].items()}
    rows: list[tuple[str, str, str, dict[int, dict[str, Any]]]] = [
        ("checkpoint", "initial", "no thought", found["sft"])
    ]
    names = {
        "own": "thoughts", "none": "no thought", "greedy": "likeliest thoughts",
        "swapped": "another line's thoughts", "true_steps": "the true steps",
    }  # fmt: skip
    for arm in ARMS:
        ways = [w for w in names if any(w in r["scores"] for r in found[arm].values())]
        rows += [(arm, way, names[way], found[arm]) for way in ways]
        if not found[arm]:
            rows.append((arm, "none", "", {}))
    for arm, way, name, records in rows:
        scores = {s: r["scores"][way] for s, r in records.items()}
        gains = [sft[s] - r["hard"] for s, r in scores.items() if s in sft]
        minutes = [r["seconds"] / 60 for r in records.values()] if way in ("own", "none") else []
        if arm == "checkpoint":
            minutes = []
        text.append(
            f"| {arm} | {name} | {len(scores)} | {spread([r['hard'] for r in scores.values()])} | "
            f"{spread(gains)} | {spread([r['easy'] for r in scores.values()])} | "
            f"{spread([r['accuracy'] for r in scores.values()])} | "
            f"{f'{fmean(minutes):.1f}' if minutes else ''} |"
        )
    text += ["", "Answers right by hops, mean over seeds:", ""]
    text += [f"| arm | scored with | {' | '.join(map(str, demo.HOPS))} |", "|---|---" + "|---" * len(demo.HOPS) + "|"]  # fmt: skip
    for arm, way, name, records in rows:
        if records:
            cells = [
                f"{fmean(r['scores'][way]['by_hops'][str(h)]['accuracy'] for r in records.values()):.3f}"
                for h in demo.HOPS
            ]
            text.append(f"| {arm} | {name} | {' | '.join(cells)} |")
    text += ["", "Steps, share of hard tokens that are answers, share of thoughts before answers that are the true steps:", ""]  # fmt: skip
    for arm in ARMS:
        for seed, record in found[arm].items():
            steps = record.get("share_of_true_steps")
            text.append(
                f"- {arm}, seed {seed}: {record['steps']} steps, {record['hard_that_are_answers']:.2f}"
                + (f", {steps:.2f}" if steps is not None else "")
            )
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")


def spread(values: list[float]) -> str:
    """Return the mean and the range over seeds."""
    if not values:
        return "not measured"
    return f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


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
        torch.set_num_threads(1)
        (RESULTS / f"{arm}-{seed}.json").write_text(json.dumps(run_arm(arm, seed)))
        return
    for seed in args.seeds:
        for arm in args.arms:
            if not (RESULTS / f"{arm}-{seed}.json").exists():
                command = [sys.executable, __file__, "--here", "--arms", arm, "--seeds", str(seed)]
                subprocess.run(command, check=True)
                write_summary(args.seeds)
    write_summary(args.seeds)


if __name__ == "__main__":
    main()
