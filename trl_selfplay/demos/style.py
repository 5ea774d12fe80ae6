"""SPIN's demo: small questions answered in a fixed style that the model doesn't write by itself.

In: a seed. Out: disjoint sets of conversations, and the share of held-out answers with the right
style and result. The model is that of words.py.
"""

import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_selfplay.demos.words import load_demo_model_path
from trl_selfplay.evaluation.report import plot_rounds
from trl_selfplay.generation.sampler import SampleRequest, build_sampling_options

# Replaces the default system message of the chat template, which is longer and makes it ramble.
SYSTEM = "Answer in a few words."
NUM_TRAIN, NUM_HELD_OUT, _NUM_HELD_OUT_SMOKE = 128, 32, 8
# With 4 conversations per step, one pass over the data.
NUM_FINE_TUNING_STEPS = 32


def build_questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Return distinct questions with answers in one style: given, one step, the result.

    Returns:
        Rows with `messages` (system, user and assistant) and `result`.
    """
    rng = random.Random(seed)
    words = [
        "amber",
        "birch",
        "cloud",
        "daisy",
        "ember",
        "fjord",
        "grove",
        "heron",
        "ivory",
        "jolly",
        "kayak",
        "lemon",
    ]
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        a, b = rng.randint(2, 60), rng.randint(2, 30)
        first, second, third = rng.sample(words, 3)
        question, given, step, result = rng.choice(
            [
                (f"What is {a} plus {b}?", f"{a}, {b}", "add", str(a + b)),
                (f"What is {a + b} minus {b}?", f"{a + b}, {b}", "subtract", str(a)),
                (f"Which is larger, {a} or {a + b}?", f"{a}, {a + b}", "compare", str(a + b)),
                (
                    f"Which comes last: {first}, {second}, {third}?",
                    f"{first}, {second}, {third}",
                    "read to the end",
                    third,
                ),
                (f"How many letters has {first}?", first, "count", str(len(first))),
            ]
        )
        completion = f"Given: {given}. Step: {step}. Result: {result}."
        rows[question] = {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
                {"role": "assistant", "content": completion},
            ],
            "result": result,
        }
    return list(rows.values())


def style_split(seed: int, smoke: bool = False) -> tuple[Dataset, Dataset, list[dict[str, Any]]]:
    """Return training and held-out conversations, and the held-out rows with their results.

    Args:
        seed: Different seeds give different questions, apart from a few chance repetitions.
        smoke: Keep only a handful of held-out conversations.
    """
    questions = build_questions(NUM_TRAIN + NUM_HELD_OUT, seed)
    heldout = questions[: _NUM_HELD_OUT_SMOKE if smoke else NUM_HELD_OUT]
    train, test = (
        Dataset.from_list([{"messages": row["messages"]} for row in part])
        for part in (questions[NUM_HELD_OUT:], heldout)
    )
    return train, test, heldout


def fine_tuned_model(folder: Path, train: Dataset, seed: int, smoke: bool = False) -> str:
    """Fine-tune the demo's model on conversations, and return the folder that holds it.

    SPIN begins with such a model. A folder that has one already is returned as it is.

    Args:
        folder: Where the model is saved.
        train: Conversations from `style_split`.
        seed: Of the order of the conversations.
        smoke: Train for two steps.
    """
    if folder.exists():
        return str(folder)
    import torch
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    sys.stdout.write(f"Fine-tuning on {len(train)} conversations, from which SPIN goes on.\n")
    turns = [row["messages"] for row in train]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        trainer = SFTTrainer(
            load_demo_model_path(),
            SFTConfig(
                temporary,
                seed=seed,
                max_steps=2 if smoke else NUM_FINE_TUNING_STEPS,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                bf16=torch.cuda.is_available(),
                gradient_checkpointing=False,
                save_strategy="no",
                logging_steps=10,
                report_to=[],
            ),
            train_dataset=Dataset.from_dict(
                {"prompt": [t[:-1] for t in turns], "completion": [t[-1:] for t in turns]}
            ),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
            ),
        )
        trainer.train()
        whole = Path(temporary) / "whole"
        model: Any = trainer.model
        model.merge_and_unload().save_pretrained(whole)
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(whole)
        whole.rename(folder)
    return str(folder)


def share_right(trainer: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of greedy completions that give the right result in the data's style.

    Args:
        trainer: A SPINTrainer.
        rows: Held-out rows from `style_split`. Without rows the share is 0.0.
    """
    play, tokenizer = trainer.self_play, trainer.processing_class
    options = build_sampling_options(trainer.args, play.eos_token_ids, temperature=0.0)
    prompts = [
        tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    requests = [SampleRequest(tuple(ids), stream_key=0) for ids in prompts]
    right = 0
    for index, sampled in play.collector.sampler.sample(requests, options, batch_size=16):
        right += f"Result: {rows[index]['result']}." in tokenizer.decode(sampled.completion_ids)
    return right / max(len(rows), 1)


def report_style_demo(trainer: Any, rows: Sequence[Mapping[str, Any]], before: float) -> float:
    """Print the share of right held-out answers before and after training, and plot the rounds.

    Returns:
        The share after training.
    """
    after = share_right(trainer, rows)
    picture = Path(trainer.args.output_dir) / "rounds.png"
    if trainer.run.lines:  # none if the first round kept nothing
        plot_rounds(trainer.run.lines, picture, "eval_win_rate")
    sys.stdout.write(
        f"Right result in the data's style, {len(rows)} held-out questions, greedy: "
        f"{before:.2f} before, {after:.2f} after. Plot: {picture}\n"
    )
    return after
