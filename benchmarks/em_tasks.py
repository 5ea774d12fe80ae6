"""The tasks of em_family.py and against_grpo.py, and the weights that their runs start from.

In: a name and a seed. Out: disjoint sets of prompts of one reasoning-gym task, for a model of 135 M
parameters, and a reward with degrees. `reversal` is the demo's own task with its own prompts;
`sums` adds and subtracts three numbers of two digits, step by step.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from recipe_demos import demo_flags, demo_lora

from trl_selfplay.demos import words

TASKS = {
    "reversal": "The demo's task: reverse three or four words (word_sequence_reversal)",
    "sums": "Three numbers of two digits, added and subtracted step by step (chain_sum)",
}
NUM_FEW_SHOT, NUM_TRAIN, NUM_OTHER, NUM_SELECT, NUM_REPORT = 4, 32, 64, 64, 200
# Far from the seeds of words.py, and from each other: row i of a dataset is made from seed + i.
_FIRST_SEED, _SEED_STRIDE = 3_000_000, 10_000


START_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Task:
    """Disjoint sets of a task: columns prompt, solution, and completion, the worked answer.

    Attributes:
        train: To sample from and train on.
        other: For what is trained before: a start, a reward model.
        select: To choose settings by.
        report: To report.
        few_shot: Examples that stand before a prompt.
        graded_reward: A reward with degrees.
        max_completion_length: Tokens that a worked answer never needs all of.
    """

    train: Dataset
    other: Dataset
    select: Dataset
    report: Dataset
    few_shot: list[dict[str, Any]]
    graded_reward: Callable[..., list[float]]
    max_completion_length: int


def load_task(name: str, seed: int) -> Task:
    """Return a task's sets; other seeds give other prompts."""
    if name == "reversal":
        return load_reversal(seed)
    total = NUM_FEW_SHOT + NUM_TRAIN + NUM_OTHER + NUM_SELECT + NUM_REPORT
    rows = Dataset.from_list(sums(total, seed))
    sets, start = [], 0
    for size in (NUM_FEW_SHOT, NUM_TRAIN, NUM_OTHER, NUM_SELECT, NUM_REPORT):
        sets.append(rows.select(range(start, start + size)))
        start += size
    few_shot, train, other, select, report = sets
    return Task(
        train,
        other,
        select,
        report,
        few_shot=few_shot.to_list(),
        graded_reward=share_of_lines,
        max_completion_length=40,
    )


def load_reversal(seed: int) -> Task:
    """Return the demo's sets, its training prompts divided in two."""
    split = words.demo_split(seed)
    train = words.gold_completions(split.train)
    return Task(
        train.select(range(NUM_TRAIN)),
        train.select(range(NUM_TRAIN, NUM_TRAIN + NUM_OTHER)),
        split.select,
        split.report,
        split.few_shot,
        graded_reward=words.position_reward,
        max_completion_length=demo_flags("rest_em")["max_completion_length"],
    )


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Return different sums with their worked answers."""
    import reasoning_gym

    puzzles = reasoning_gym.create_dataset(
        "chain_sum",
        size=count + 100,
        seed=_FIRST_SEED + seed * _SEED_STRIDE,
        min_terms=3,
        max_terms=3,
        min_digits=2,
        max_digits=2,
    )
    expressions = {entry["metadata"]["expression"]: entry["answer"] for entry in puzzles}
    return [
        {"prompt": f"{e} =\n", "solution": answer, "completion": worked_sum(e)}
        for e, answer in list(expressions.items())[:count]
    ]


def worked_sum(expression: str) -> str:
    r"""Return the steps of a sum, one a line, and the answer.

    >>> worked_sum("42 - 25 - 73")
    '42 - 25 = 17\n17 - 73 = -56\nAnswer: -56'
    """
    first, *rest = expression.split(" ")
    total, lines = int(first), []
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        following = total + int(number) if sign == "+" else total - int(number)
        lines.append(f"{total} {sign} {number} = {following}")
        total = following
    return "\n".join([*lines, f"Answer: {total}"])


def share_of_lines(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float]:
    """Return the share of lines that are those of the worked sum, in their place."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        found = completion.strip().splitlines()
        lines = worked_sum(prompt.removesuffix(" =\n")).splitlines()
        right = sum(a.strip() == b for a, b in zip(found, lines, strict=False))
        scores.append(right / max(len(lines), len(found)))
    return scores


def train_start(source: str, rows: Dataset, steps: int, seed: int, dtype: str = "float32") -> Any:
    """Fine-tune a model for a few steps on worked answers; return the trainer.

    A model that is never right teaches no method anything.

    Args:
        source: The model's name or folder.
        rows: Columns prompt and completion.
        steps: Steps of 4 rows, at a constant learning rate of `START_RATE`; 0 trains nothing.
        seed: Of the order of rows and of the adapter.
        dtype: Of the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(source)
    eos = tokenizer.eos_token_id
    examples = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["completion"])["input_ids"], eos]
        examples.append({"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids})
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(source, dtype=dtype),
            SFTConfig(
                folder, max_steps=max(steps, 1), learning_rate=START_RATE, seed=seed,
                per_device_train_batch_size=4, lr_scheduler_type="constant", save_strategy="no",
                report_to=[], disable_tqdm=True, gradient_checkpointing=False,
                bf16=torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            peft_config=demo_lora("rest_em"),
        )  # fmt: skip
        if steps:
            trainer.train()
    return trainer


def load_start(task_name: str, seed: int, steps: int) -> str:
    """Return the folder of a task's start, made once and kept in the user's cache."""
    source = Path(words.load_demo_model_path())
    folder = source.parent / f"start-{source.name}-{task_name}-{steps}-{seed}"
    if not folder.exists():
        trainer = train_start(str(source), load_task(task_name, seed).other, steps, seed)
        temporary = Path(tempfile.mkdtemp(dir=source.parent))
        trainer.model.merge_and_unload().save_pretrained(temporary)
        trainer.processing_class.save_pretrained(temporary)
        temporary.rename(folder)
    return str(folder)
