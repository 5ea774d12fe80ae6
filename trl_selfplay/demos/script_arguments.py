"""What the recipes share: flags, datasets by name, reward functions by name.

In: the flags of TRL's GRPO script and a few more. Out: datasets with the columns that the trainers
read, reward functions, and keyword arguments for loading the model.
"""

import contextlib
import dataclasses
import inspect
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
import trl.rewards
from datasets import load_dataset

import trl_selfplay.rewards as rewards
from trl_selfplay.demos.flags_help import describe_script, program_name
from trl_selfplay.demos.papers import Preset, describe
from trl_selfplay.disk import refuse_missing_path
from trl_selfplay.evaluation.progress import say
from trl_selfplay.inspection.html_report import write_report
from trl_selfplay.rewards.sent_function import import_function
from trl_selfplay.trainers.ported_scripts import explain_unknown_flags

logger = logging.getLogger(__name__)


class WrongFlagsError(ValueError):
    """A flag that a recipe doesn't have, or a value that it can't have."""

    exit_code = 2  # of the command line; that of a run that ended with an error is 1


@dataclass
class RunScriptArguments(trl.ScriptArguments):
    """Arguments of a recipe besides the configuration of the run."""

    resume: bool = field(
        default=False,
        metadata={"help": "Go on with the run in output_dir; without one there, begin it."},
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Settings, model, dataset and rewards of one of the paper's experiments, which "
            "flags and YAML override. A wrong name lists them."
        },
    )
    smoke: bool = field(default=False, metadata={"help": "Run the demo at its smallest size."})


@dataclass
class GradedScriptArguments(RunScriptArguments):
    """Arguments of a recipe that grades completions."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model: a Hub id or a folder."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions, by name (exact_reward, math_reward, … of trl_selfplay.rewards or "
            "trl.rewards) or by import path, or reward models by Hub id or folder. What makes a "
            "reward function of one argument is followed by it: puzzle_reward:countdown, "
            "checker_reward:my_checks.is_sorted."
        },
    )
    eval_reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions for held-out prompts, given like reward_funcs. None: the same."
        },
    )
    tools: list[str] | None = field(
        default=None,
        metadata={
            "help": "Functions that completions may call, by import path, such as my_tools.search "
            "(docs/tools.md)."
        },
    )
    environment_factory: str | None = field(
        default=None,
        metadata={
            "help": "A class, function or dict of these that makes the environment of each completion, by "
            "import path. With `get_reward`, reward_funcs may be left out."
        },
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column that holds the prompts. It is renamed to `prompt`."},
    )
    solution_column: str = field(
        default="solution",
        metadata={
            "help": "Column that holds the solutions. It is renamed to `solution`, which is how reward "
            "functions take it."
        },
    )
    chat: bool = field(
        default=False, metadata={"help": "Turn plain-text prompts into chat messages."}
    )


@dataclass
class StudentScriptArguments(GradedScriptArguments):
    """Arguments of a recipe that may train a smaller model on what the rounds selected."""

    student_model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a smaller model to train on the mixture of the last round, into "
            "output_dir/student. With --resume, also after the run."
        },
    )
    student_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of SFTConfig that the student's training has otherwise than the run, as JSON: "
            '{"learning_rate": 1e-4, "num_train_epochs": 2}.'
        },
    )


def parse_script_arguments(
    config_class: type,
    flags: list[str] | None,
    demo_defaults: Any,
    script_class: type = GradedScriptArguments,
    presets: Mapping[str, Preset] | None = None,
) -> tuple[Any, ...]:
    """Parse flags and YAML into script, training, model and dataset arguments.

    Args:
        config_class: The trainer's configuration.
        flags: Command-line flags; None takes those of the process.
        demo_defaults: `f(script_args)` returns the defaults to use when no dataset is named.
        script_class: Dataclass of the recipe's own arguments.
        presets: The paper's experiments, by the names that `--preset` takes.

    Raises:
        WrongFlagsError: A flag, YAML key or preset is unknown, or has a value that can't be. The message
            says what to use instead.
        SystemExit: The help was asked for, and printed; or a value has another type.
    """
    types: Any = (script_class, config_class, trl.ModelConfig, trl.DatasetMixtureConfig)
    given = sys.argv[1:] if flags is None else flags
    if asked := {"-h", "--help", "--help_all"}.intersection(given):
        print(describe_script(types, whole="--help_all" in asked))  # noqa: T201  # a script's help
        raise SystemExit(0)
    program = program_name()
    # The whole usage would list all flags. An abbreviation would hide a misspelt flag.
    said: Any = {
        "allow_abbrev": False,
        "prog": program,
        "usage": f"{program} [FLAGS]; --help lists them",
    }
    known = trl.TrlParser(types[::3], **said).parse_args_and_config(
        given, return_remaining_strings=True
    )
    parser = trl.TrlParser(types, **said)
    preset = find_preset(known[0], presets)
    if preset is not None:
        overrides = _given_values(config_class, given)
        parser.set_defaults_with_config(**preset.defaults(overrides, known[0].dataset_name))
    elif not (known[0].dataset_name or known[1].datasets):
        parser.set_defaults_with_config(**demo_defaults(known[0]))
    try:
        *parsed, unknown = parser.parse_args_and_config(given, return_remaining_strings=True)
    except ValueError as error:
        raise WrongFlagsError(str(error)) from error
    if unknown:
        names = [each.name for fields in map(dataclasses.fields, types) for each in fields]
        raise WrongFlagsError(
            f"this script doesn't take {' '.join(unknown)}:\n"
            f"{explain_unknown_flags(unknown, names)}"
        )
    script, config, model, _ = parsed
    try:
        refuse_missing_path(model.model_name_or_path or "", "model_name_or_path")
        refuse_missing_path(script.dataset_name or "", "dataset_name")
    except FileNotFoundError as error:
        raise WrongFlagsError(str(error)) from error
    if script.resume and not config.resume_from_checkpoint:
        config.resume_from_checkpoint = True
    if preset is not None:
        if parsed[2].model_name_or_path is None:
            raise WrongFlagsError(
                f"--preset {script.preset}: the paper's model isn't public, or is your own. Name "
                "one with --model_name_or_path."
            )
        say(describe(script.preset, preset, config))
    return tuple(parsed)


def find_preset(
    script_args: RunScriptArguments, presets: Mapping[str, Preset] | None
) -> Preset | None:
    """Return the preset that the flags name, or None if they name none.

    Raises:
        WrongFlagsError: There is no such preset, or `--smoke` is given as well.
    """
    if script_args.preset is None:
        return None
    if script_args.preset not in (presets or {}):
        raise WrongFlagsError(
            f"no preset {script_args.preset!r}; there are {tuple(presets or ())}."
        )
    if script_args.smoke:
        raise WrongFlagsError(
            "--smoke is the demo's smallest size. Make a preset smaller with flags such as "
            "--num_rounds 1 --max_steps 10."
        )
    return (presets or {})[script_args.preset]


def _given_values(config_class: Any, flags: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a configuration that flags and YAML set."""
    unset = [
        (each.name, each.type, field(default=None, metadata=each.metadata))
        for each in dataclasses.fields(config_class)
        if each.init
    ]
    given: Any = dataclasses.make_dataclass("Given", unset)
    parser = trl.TrlParser(given, allow_abbrev=False)
    parsed, *_ = parser.parse_args_and_config(flags, return_remaining_strings=True)
    return {name: value for name, value in vars(parsed).items() if value is not None}


def load_reward_func(name: str) -> Any:
    """Return the reward function with this name or import path, or the id or folder of a reward model.

    `name:argument` calls the function of that name, which makes a reward function, with the argument:
    a number if it is one, else text. `module:function` is a function of a module of one's own, as is
    `module.function`.

    Raises:
        ValueError: There is no function with this name, or it makes reward functions and the argument
            is missing.
    """
    if name == "get_soft_overlong_punishment":  # TRL's script uses these values
        return trl.rewards.get_soft_overlong_punishment(1280, 256)
    if is_reward_model(name):
        return name
    maker, colon, argument = name.partition(":")
    if argument.isidentifier() and not _is_function(maker):
        return import_function(f"{maker}.{argument}")
    function = _find_function(maker)
    if colon:
        return function(_number_or_text(argument))
    if inspect.isclass(function):
        raise ValueError(
            f"{name} makes reward functions; give its argument behind a colon, {name}:…"
        )
    return function


def is_reward_model(name: str) -> bool:
    """Return whether a name of a reward is the id or folder of a model."""
    return "/" in name or Path(name).is_dir()


def _is_function(name: str) -> bool:
    """Return whether a name is that of a function, and not of a module or of nothing."""
    try:
        return callable(_find_function(name))
    except (ValueError, ImportError):
        return False


def _find_function(name: str) -> Any:
    for module in (rewards, trl.rewards):
        if name.endswith("_reward") and hasattr(module, name):
            return getattr(module, name)
    if "." not in name:
        raise ValueError(
            f"no reward function {name!r}; give a name such as 'exact_reward', or an import path such "
            "as 'my_rewards.my_reward'"
        )
    return import_function(name)


def _number_or_text(argument: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(argument)
    return argument


def load_reward_funcs(script_args: GradedScriptArguments) -> list[Any]:
    """Return the reward functions and reward models named by the flags."""
    names = [*(script_args.reward_funcs or []), script_args.reward_model_name_or_path]
    return [load_reward_func(name) for name in names if name]


def reward_models(script_args: Any) -> list[str]:
    """Return the reward models named by the flags of a recipe, each once, without loading anything."""
    if not isinstance(script_args, GradedScriptArguments):
        return []
    funcs = [*(script_args.reward_funcs or ()), *(script_args.eval_reward_funcs or ())]
    model = script_args.reward_model_name_or_path
    return list(dict.fromkeys([*filter(is_reward_model, funcs), *([model] if model else [])]))


def load_eval_reward_funcs(script_args: GradedScriptArguments) -> list[Any] | None:
    """Return the reward functions of held-out prompts; None if the flags name none of their own."""
    return [load_reward_func(name) for name in script_args.eval_reward_funcs or ()] or None


def load_tools(script_args: GradedScriptArguments) -> dict[str, Any]:
    """Return the tools and the environments named by the flags, as a trainer takes them.

    Raises:
        ImportError: There is no module or function of a name.
    """
    factory = script_args.environment_factory
    return {
        "tools": [import_function(path) for path in script_args.tools or ()] or None,
        "environment_factory": None if factory is None else import_function(factory),
    }


def prepare(dataset: Any, script_args: GradedScriptArguments) -> Any:
    """Rename a dataset's columns to `prompt` and `solution`, with chat prompts on request.

    Raises:
        WrongFlagsError: There is no column of a name that was given.
    """
    names = {script_args.prompt_column: "prompt", script_args.solution_column: "solution"}
    renamed = {old: new for old, new in names.items() if old != new}
    for old, new in renamed.items():
        if old not in dataset.column_names:
            raise WrongFlagsError(
                f"--{new}_column {old}: the dataset has no such column; its columns are "
                f"{dataset.column_names}."
            )
    dataset = dataset.rename_columns(renamed)
    if not script_args.chat:
        return dataset
    return dataset.map(
        lambda row: (
            {"prompt": [{"role": "user", "content": row["prompt"]}]}
            if isinstance(row["prompt"], str)
            else {}
        )
    )


def load_named_dataset(dataset_name: str, split: str | None = None, **options: Any) -> Any:
    """Return a dataset of the Hub, or of a folder or file on disk, whose rows are its split "train".

    Args:
        dataset_name: A Hub id, a folder, or a file of `.json`, `.jsonl`, `.csv` or `.parquet`.
        split: As `load_dataset` takes it; None returns all splits.
        **options: `name`, the configuration, and `revision` of a dataset of the Hub.

    Raises:
        WrongFlagsError: A file of another kind.
    """
    path = Path(dataset_name)
    if not path.is_file():
        return load_dataset(dataset_name, split=split, **options)
    kind = path.suffix.removeprefix(".").replace("jsonl", "json")
    if kind not in ("json", "csv", "parquet"):
        raise WrongFlagsError(
            f"dataset_name={dataset_name!r} is a file, and its name ends in none of .json, .jsonl, .csv and "
            ".parquet. Give such a file, a folder of them, or a Hub id."
        )
    return load_dataset(kind, data_files=str(path), split=split)


def _tell_demo(script_args: RunScriptArguments, model_args: Any) -> None:
    """Say that the demo's task is used because no dataset is named, unless the flags ask for it.

    Raises:
        WrongFlagsError: A model is named, which is hardly meant for the demo's task.
    """
    if script_args.smoke or getattr(script_args, "quick", False):
        return
    if model_args is not None and model_args.model_name_or_path is not None:
        raise WrongFlagsError(
            "a model is named, but no dataset. Add --dataset_name, a Hub id, folder or file, and what "
            "the method needs besides, such as --reward_funcs. With --smoke, the model tries the "
            "demo's task."
        )
    say("No dataset is named (--dataset_name): this is the demo, on its own task.")


def load_sets(
    script_args: GradedScriptArguments,
    dataset_args: Any,
    presets: Mapping[str, Preset] | None = None,
    model_args: Any = None,
) -> dict[str, Any] | None:
    """Return the named dataset as `train_dataset` and `eval_dataset`, or None for the demo's.

    A preset's also has `few_shot_examples`, and `gold_dataset` where the paper trains on the data.

    Raises:
        ValueError: `dataset_streaming` is set, or a model is named and no dataset.
    """
    if script_args.dataset_streaming:
        raise ValueError(
            "dataset_streaming=True isn't supported: every round revisits the same prompts, so the "
            "dataset must be finite. Leave it out; to use part of a large dataset, give `datasets` "
            "in a YAML file with `split: train[:1000]`."
        )
    preset = find_preset(script_args, presets)
    if dataset_args.datasets:
        sets = trl.get_dataset(dataset_args)
    elif script_args.dataset_name:
        sets = load_named_dataset(
            script_args.dataset_name,
            name=script_args.dataset_config,
            revision=preset and preset.revision_of(script_args.dataset_name),
        )
    elif preset is not None and preset.rows is not None:
        sets = preset.rows()
    else:
        _tell_demo(script_args, model_args)
        return None
    test = sets.get(script_args.dataset_test_split)
    if preset is not None:
        return preset.as_arguments(sets[script_args.dataset_train_split], test, script_args.chat)
    return {
        "train_dataset": prepare(sets[script_args.dataset_train_split], script_args),
        "eval_dataset": None if test is None else prepare(test, script_args),
    }


def load_splits(
    script_args: RunScriptArguments,
    dataset_args: Any,
    presets: Mapping[str, Preset] | None = None,
    model_args: Any = None,
) -> tuple[Any, Any]:
    """Return the named training and held-out splits, which may be slices such as `train[:1000]`.

    Both are None for the demo's; the held-out one is also None without a name, or if the dataset is a
    file, which has no split of that name.

    Raises:
        ValueError: A model is named and no dataset.
    """
    preset = find_preset(script_args, presets)
    if dataset_args.datasets:
        sets = trl.get_dataset(dataset_args)
        splits = [sets.get(name) for name in ("train", "test")]
    elif script_args.dataset_name:
        revision = preset and preset.revision_of(script_args.dataset_name)
        names: list[str | None] = [
            script_args.dataset_train_split,
            script_args.dataset_test_split,
        ]
        if Path(script_args.dataset_name).is_file() and not (names[1] or "").startswith("train"):
            names[1] = None
        splits = [
            name
            and load_named_dataset(
                script_args.dataset_name,
                name,
                name=script_args.dataset_config,
                revision=revision,
            )
            for name in names
        ]
    else:
        _tell_demo(script_args, model_args)
        return None, None
    train, test = (preset.convert(s) if preset and s is not None else s for s in splits)
    return train, test


def model_arguments(training_args: Any, model_args: Any) -> dict[str, Any]:
    """Return the quantization and adapter arguments; put the loading options into the config."""
    loading = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
    }
    training_args.model_init_kwargs = loading | (training_args.model_init_kwargs or {})
    return {
        "quantization_config": trl.get_quantization_config(model_args),
        "peft_config": trl.get_peft_config(model_args),
    }


def student_arguments(script_args: StudentScriptArguments) -> dict[str, Any]:
    """Return the arguments of a smaller model to train.

    Raises:
        WrongFlagsError: `student_args` is no JSON object.
    """
    given: Any = script_args.student_args
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = ()
        if not isinstance(given, dict):
            raise WrongFlagsError(
                f"student_args={script_args.student_args!r} is no JSON object such as "
                "'{\"learning_rate\": 1e-4}'."
            )
    return {"student_model": script_args.student_model, "student_args": given}


def train_and_save(trainer: Any, training_args: Any, dataset_name: str | None) -> None:
    """Run or resume all rounds, save the model, write the report, and push the model if requested.

    Raises:
        SystemExit: With `dry_run=True`, after the checks: there is no trained model to go on with.
    """
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if training_args.dry_run:
        raise SystemExit(0)
    trainer.save_model(training_args.output_dir)
    report(trainer)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)


def report(trainer: Any) -> None:
    """Write the report of a finished training into its output directory and say where it is."""
    if trainer.is_world_process_zero():
        try:
            say(f"Report: {write_report(trainer.args.output_dir)}")
        except Exception:  # the run is finished, whatever its report lacks
            logger.warning("no report was written", exc_info=True)
