"""SPIN's demo: small questions answered in a fixed style that the model doesn't write by itself.

In: a seed. Out: disjoint sets of conversations, and how many held-out answers are right in style
and result. The model is that of demo.py.
"""

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_selfplay.evaluation.report import plot_rounds
from trl_selfplay.generation.sampler import SampleRequest, build_sampling_options

# SPINConfig's fields for the demo, small enough for minutes on one core. The paper fine-tunes all
# weights of a 7B model at 5e-7; LoRA on a model of this size needs a rate that is far higher. As
# there, the rate falls and beta rises over the rounds. Beta begins above the paper's 0.1, at which
# the policy unlearns to end: 16 % of its completions were cut in round 2 instead of 41 % (seed 100),
# and at twice this rate all of them (seed 1).
STYLE_SETTINGS: dict[str, Any] = {
    "output_dir": "spin-demo",
    "num_rounds": 3,
    "num_prompts_per_round": 32,
    # Almost three times the data's completions: the untrained model's that are longer are lost.
    "max_completion_length": 56,
    "max_length": 128,
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "round_learning_rates": [5e-4, 5e-4, 2.5e-4],
    "round_betas": [0.5, 1.0, 2.0],
    "logging_steps": 4,
    "save_strategy": "no",
    "report_to": [],
    "gradient_checkpointing": False,
}
STYLE_LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
}
# In place of the system message of the model's template, which is longer and has it ramble.
SYSTEM = "Answer in a few words."
_SMOKE_SETTINGS: dict[str, Any] = {
    "num_rounds": 2,
    "round_learning_rates": [5e-4, 5e-4],
    "round_betas": [0.5, 1.0],
    "max_steps": 2,
    "num_prompts_per_round": 8,
    "on_empty_round": "stop",
}
NUM_TRAIN, NUM_HELD_OUT, _NUM_HELD_OUT_SMOKE = 128, 32, 8


def build_questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Return different questions with answers in one style: given, one step, the result.

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
    """Return conversations to train on, held-out ones, and the held-out rows with their results.

    Args:
        seed: Other seeds give other questions, but for the few that both draw by chance.
        smoke: Leave a handful of held-out ones.
    """
    questions = build_questions(NUM_TRAIN + NUM_HELD_OUT, seed)
    heldout = questions[: _NUM_HELD_OUT_SMOKE if smoke else NUM_HELD_OUT]
    train, test = (
        Dataset.from_list([{"messages": row["messages"]} for row in part])
        for part in (questions[NUM_HELD_OUT:], heldout)
    )
    return train, test, heldout


def recipe_defaults(smoke: bool = False) -> dict[str, Any]:
    """Return the demo's settings under the names of a recipe's flags, to be its defaults."""
    lora = {f"lora_{key.removeprefix('lora_')}": value for key, value in STYLE_LORA.items()}
    return {**STYLE_SETTINGS, **(_SMOKE_SETTINGS if smoke else {}), **lora, "use_peft": True}


def share_right(trainer: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of greedy completions that name the right result in the data's style.

    Args:
        trainer: A SPINTrainer.
        rows: From `style_split`; 0.0 for none.
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
    """Print how many held-out answers were right before and are now; plot the rounds.

    Returns:
        The share that is right now.
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
