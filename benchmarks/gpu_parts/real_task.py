"""Part c: the demo's model on a task of real size: 2,000 word problems, 8 samples each, with controls.

In: the size of the measurement. Out: items, a round or a control each. Problems are the shorter ones of
reasoning-gym's gsm_symbolic, of 26 templates. The start is SmolLM2-135M-Instruct after a few steps on
worked answers to other problems, for each seed, since a model that is never right learns nothing by
itself. From it, with the same number of steps on the same number of rows:

- rest_em: two rounds of ReST^EM, each trained from the start; seconds by phase.
- random: the same with completions kept at random, as many as rest_em kept in its first round.
- gold: fine-tuning on the worked answers to the 2,000 problems.

Accuracy is greedy, on 400 other problems. The first seed's rounds run alone on the card; the rest run
three at a time, and their seconds aren't shown.
"""

import fcntl
import sys
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from gpu_parts.items import Item, Records, is_done
from gpu_parts.measuring import read_peak, restart_peak
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer
from trl_selfplay.demos.words import load_demo_model_path
from trl_selfplay.rewards import exact_reward

sys.path.insert(0, str(Path(__file__).parents[1]))
from held_out_curve import held_out_accuracy
from recipe_demos import demo_lora

SEEDS, NUM_ROUNDS = (0, 1, 2), 2
# Far from the seeds of other tasks: row i of a dataset is made from seed + i.
_FIRST_SEED, _SEED_STRIDE = 20_000_000, 100_000
_LONGEST_QUESTION, _LONGEST_ANSWER = 420, 170  # characters
_REQUEST = " Give the result as your final answer. Do not include units."


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        num_prompts: Problems to sample from.
        num_other: Problems whose worked answers the start is made of.
        num_heldout: Problems to score.
        num_generations: Samples of a problem.
        most: Tokens of a completion at most.
        start_steps: Optimizer steps of the start.
        steps: Optimizer steps of a round and of a control.
        rows: Rows of a step.
        stops: Strings that end a completion.
    """

    num_prompts: int
    num_other: int
    num_heldout: int
    num_generations: int
    most: int
    start_steps: int
    steps: int
    rows: int
    stops: tuple[str, ...] = ()


FULL = Sizes(2000, 600, 400, 8, 96, 100, 100, 16)
TOY = Sizes(4, 4, 4, 2, 12, 1, 1, 2, stops=(" ",))
# Full attention to answers of three lines: a learning rate as in the demos.
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "lr_scheduler_type": "constant", "gradient_checkpointing": False,
    "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1000,
}  # fmt: skip


def build_items(device: str, results: Path) -> list[Item]:
    """Return the items of this part, in the order of their value."""
    seeds = SEEDS if device == "cuda" else SEEDS[:1]
    first = [(seeds[0], "start", 0), *((seeds[0], "rest_em", t) for t in range(NUM_ROUNDS))]
    rest = [(seeds[0], "gold", 0), (seeds[0], "random", 0)]
    for seed in seeds[1:]:
        rest += [(seed, "rest_em", t) for t in range(NUM_ROUNDS)]
    for seed in seeds[1:]:
        rest += [(seed, "gold", 0), (seed, "random", 0)]
    rest += [(seed, "random", 1) for seed in seeds]
    return [
        Item(
            name_of(*case),
            partial(measure, *case, device, results),
            seconds=25.0,
            is_wanted=partial(has_what_it_needs, *case),
            is_alone=case in first,
        )
        for case in first + rest
    ]


def name_of(seed: int, arm: str, round_index: int) -> str:
    """Return an item's name."""
    return f"seed {seed} {arm}" + ("" if arm in ("start", "gold") else f" {round_index}")


def has_what_it_needs(seed: int, arm: str, round_index: int, records: Mapping[str, Any]) -> bool:
    """Return whether the earlier round, and for a random filter the share to keep, are there."""
    needed = [name_of(seed, arm, round_index - 1)] if round_index else []
    needed += [name_of(seed, "rest_em", 0)] if arm == "random" else []
    return all(is_done(records.get(name)) for name in needed)


def load_problems(sizes: Sizes, seed: int) -> dict[str, Dataset]:
    """Return disjoint sets with the columns prompt, solution and completion, the worked answer."""
    import reasoning_gym

    entries = reasoning_gym.create_dataset(
        "gsm_symbolic", size=16_000, seed=_FIRST_SEED + seed * _SEED_STRIDE
    )
    rows = {}
    for entry in entries:
        question = entry["question"].replace(_REQUEST, "").strip()
        steps = entry["metadata"]["answer_cot"].rpartition("####")[0].strip()
        if len(question) <= _LONGEST_QUESTION and len(steps) <= _LONGEST_ANSWER:
            completion = f"{steps}\nAnswer: {entry['answer']}"
            rows[question] = {
                "prompt": f"{question}\n",
                "solution": entry["answer"],
                "completion": completion,
            }
    counts = {"train": sizes.num_prompts, "other": sizes.num_other, "heldout": sizes.num_heldout}
    problems = list(rows.values())
    if len(problems) < sum(counts.values()):
        raise RuntimeError(f"only {len(problems)} problems are short enough")
    sets, start = {}, 0
    for name, count in counts.items():
        sets[name] = Dataset.from_list(problems[start : start + count])
        start += count
    return sets


def folder_of(results: Path, sizes: Sizes) -> Path:
    """Return where starts and runs lie between the items, on this machine."""
    key = zlib.crc32(f"{results.resolve()} {sizes}".encode())
    return Path(tempfile.gettempdir()) / f"trl-selfplay-gpu-runs-{key:08x}"


def measure(seed: int, arm: str, round_index: int, device: str, results: Path) -> dict[str, Any]:
    """Run a round or a control of a seed."""
    sizes = FULL if device == "cuda" else TOY
    root = folder_of(results, sizes)
    sets = load_problems(sizes, seed)
    start = load_start(root, sets["other"], sizes, seed, device)
    if arm == "start":  # alone, so that what comes next isn't lost with it; others make theirs
        return {"steps": sizes.start_steps}
    restart_peak(device)
    if arm == "gold":
        trainer = fine_tune(start, sets["train"], sizes.steps, sizes, seed, device)
        accuracy = held_out_accuracy(trainer, sets["heldout"], sizes.most, exact_reward)
        return {"accuracy": accuracy, "steps": sizes.steps, "peak": read_peak(device)}
    reward: Any = exact_reward if device == "cuda" else keep_at_random(0.9)  # a toy is never right
    if arm == "random":
        first = Records(results / "c.json").load()[name_of(seed, "rest_em", 0)]
        reward = keep_at_random(first["share_right"])
    line, lines = run_rounds(
        root / f"seed-{seed}-{arm}", start, sets, reward, round_index, seed, sizes, device
    )
    return {
        "accuracy": line["eval"]["eval_accuracy"],
        "before": lines[0]["eval_before"]["eval_accuracy"],
        "share_right": line["metrics"]["play/reward_mean"],
        "examples": line["examples"],
        "steps": line["steps"],
        "seconds": line["seconds"],
        "metrics": line["metrics"],
        "peak": read_peak(device),
    }


def keep_at_random(share: float) -> Any:
    """Return a reward function that gives 1.0 to a share of completions, by their text alone."""

    def kept_at_random(completions: list[str], **columns: Any) -> list[float]:
        return [float(zlib.crc32(text.encode()) < share * 2**32) for text in completions]

    return kept_at_random


def run_rounds(
    folder: Path, start: str, sets: dict[str, Dataset], reward: Any, round_index: int, seed: int,
    sizes: Sizes, device: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """Run ReST^EM up to a round, going on with what the folder holds; return its line, and all."""
    trainer = ReSTEMTrainer(
        start,
        ReSTEMConfig(
            str(folder), num_rounds=round_index + 1, num_generations=sizes.num_generations,
            max_completion_length=sizes.most, temperature=1.0, top_k=0, max_steps=sizes.steps,
            per_device_train_batch_size=sizes.rows, seed=seed, bf16=device == "cuda",
            stop_strings=list(sizes.stops) or None, load_best_round_at_end=False, model_init_kwargs={"dtype": dtype(device)}, **SETTINGS,
        ),
        train_dataset=sets["train"].select_columns(["prompt", "solution"]),
        eval_dataset=sets["heldout"].select_columns(["prompt", "solution"]),
        reward_funcs=reward,
        eval_reward_funcs=exact_reward,
        peft_config=demo_lora("rest_em"),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=folder.exists())
    return trainer.run.lines[round_index], trainer.run.lines


def load_start(root: Path, rows: Dataset, sizes: Sizes, seed: int, device: str) -> str:
    """Return the folder of a seed's start, made by the first process that needs it."""
    folder = root / f"start-{seed}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"start-{seed}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not folder.exists():
            trainer = fine_tune(
                load_demo_model_path(), rows, sizes.start_steps, sizes, seed, device
            )
            temporary = Path(tempfile.mkdtemp(dir=root))
            trainer.model.merge_and_unload().save_pretrained(temporary)
            trainer.processing_class.save_pretrained(temporary)
            temporary.rename(folder)
    return str(folder)


def fine_tune(
    source: str, rows: Dataset, steps: int, sizes: Sizes, seed: int, device: str
) -> SFTTrainer:
    """Train adapters on worked answers; return the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(source, dtype=dtype(device)),
            SFTConfig(
                folder, max_steps=steps, per_device_train_batch_size=sizes.rows, seed=seed,
                bf16=device == "cuda", **SETTINGS,
            ),
            train_dataset=rows.select_columns(["prompt", "completion"]),
            processing_class=AutoTokenizer.from_pretrained(source),
            peft_config=demo_lora("rest_em"),
        )  # fmt: skip
        trainer.train()
    return trainer


def dtype(device: str) -> str:
    """Return the weights' type."""
    return "bfloat16" if device == "cuda" else "float32"
