"""The help of a recipe: its flags in groups, those of the method first.

In: the dataclasses whose fields are the flags. Out: text. TRL's parser would print every flag in two
spellings, without an order, on some twelve hundred lines.
"""

import dataclasses
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field
from typing import Any, Union, get_args, get_origin, get_type_hints

from trl_selfplay.trainers.engine_config import EngineConfig

_RUN = ("output_dir", "resume", "dry_run", "preset", "smoke")
_ENGINE = tuple(EngineConfig.__dataclass_fields__)
_SAMPLING = {
    "chat_template_kwargs", "generation_kwargs", "log_completions", "max_completion_length", "min_p",
    "num_completions_to_print", "num_generations", "num_generations_eval", "repetition_penalty",
    "round_temperatures", "sanitize_control_tokens", "stop_strings", "temperature",
    "temperature_eval", "top_k", "top_p", *_ENGINE,
}  # fmt: skip
# Of the parents' fields, those that most runs set; the others are listed by name.
_OFTEN = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "beta", "loss_type",
    "optim", "bf16", "gradient_checkpointing", "eval_strategy", "save_strategy", "save_steps",
    "save_total_limit", "logging_steps", "report_to", "seed", "use_cpu", "push_to_hub",
)  # fmt: skip
_TITLES = {
    "run": "Run",
    "method": "Method: rounds, and what is trained on",
    "sampling": "Sampling",
    "training": "Training",
    "model": "Model",
    "data": "Data and rewards",
}
_KINDS: dict[Any, str] = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}
_DEFAULTS = """Without a dataset the demo runs, and its settings replace the defaults below.
A BOOL is true, false, or left out: then it is true."""
_COLUMN = 30


def program_name() -> str:
    """Return how the running script was called: "trl-selfplay star" or "python recipes/star.py"."""
    return getattr(sys.modules["__main__"], "COMMAND", f"python {sys.argv[0]}")


def describe_script(owners: Sequence[type], whole: bool) -> str:
    """Return the help of the running script: its docstring, then its flags.

    Args:
        owners: The dataclasses whose fields are the flags: the recipe's own, the trainer's
            configuration, TRL's arguments of the model, and those of several datasets.
        whole: Explain each of the parents' fields, and in full.
    """
    program, text = program_name(), sys.modules["__main__"].__doc__ or ""
    text = re.sub(r"python recipes/\w+\.py", program, text).strip()
    text = re.sub(r"(?<=\S) {9,}", " \\\\\n        ", text)  # lines that a backslash has joined
    parts = [f"Usage: {program} [FLAGS]", text, _DEFAULTS, _describe_flags(owners, whole)]
    return "\n\n".join(part for part in parts if part)


def _describe_flags(owners: Sequence[type], whole: bool) -> str:
    script_class, config_class = owners[:2]
    width = min(100, max(60, shutil.get_terminal_size().columns))
    groups: dict[str, list[str]] = {name: [] for name in _TITLES}
    groups["run"] = _entry("config", "FILE", "YAML file with flags, without dashes.", width)
    rest = []
    for owner in owners:
        hints = get_type_hints(owner)
        for each in _in_order(owner):
            group, is_ours = _group(each.name, owner, script_class, config_class)
            if group == "training" and not (whole or each.name in _OFTEN):
                rest.append(f"--{each.name}")
                continue
            text = " ".join(str(each.metadata.get("help") or "").split())
            if not (whole or is_ours):
                text = re.split(r"(?<=[.]) (?=[A-Z])", text)[0]
            text = f"{text} {_default(each)}".strip()
            groups[group] += _entry(each.name, _kind(each, hints[each.name]), text, width)
    parts = ["\n".join([f"{_TITLES[name]}:", *lines]) for name, lines in groups.items()]
    if rest:
        intro = "More of Training, in the words of TRL and transformers with --help_all:"
        parts.append(f"{intro}\n{textwrap.fill(' '.join(rest), width, **_indented(2))}")
    return "\n\n".join(parts)


def _in_order(owner: type) -> Iterator[Field[Any]]:
    """Yield the fields that are flags, those of `_RUN` and `_OFTEN` first, the engine's last."""
    places = {name: place for place, name in enumerate((*_RUN, *_OFTEN))}
    places |= dict.fromkeys(_ENGINE, len(places) + 1)
    found = [each for each in dataclasses.fields(owner) if each.init]
    return iter(sorted(found, key=lambda each: places.get(each.name, len(_RUN + _OFTEN))))


def _group(name: str, owner: type, script_class: type, config_class: type) -> tuple[str, bool]:
    """Return the group of a field, and whether it is one of this package's."""
    if name in _RUN:
        return "run", name != "output_dir"
    parents = [
        c for c in owner.__mro__ if not c.__module__.startswith(("trl_selfplay", "__main__"))
    ]
    is_ours = not any(name in getattr(c, "__dataclass_fields__", ()) for c in parents)
    if owner is not config_class:
        names = {"ModelConfig": "model"}
        return names.get(owner.__name__, "data"), is_ours
    if not is_ours:
        return "training", False
    return ("sampling" if name in _SAMPLING else "method"), True


def _kind(each: Field[Any], hint: Any) -> str:
    """Return the word for a flag's value, such as INT, or its choices."""
    if choices := each.metadata.get("choices"):
        return "{" + ",".join(map(str, choices)) + "}"
    union = get_origin(hint) in (Union, types.UnionType)
    options = [o for o in (get_args(hint) if union else (hint,)) if o is not types.NoneType]
    for option in options:
        if get_origin(option) is list or option is list:
            element = (get_args(option) or (str,))[0]
            return f"{_KINDS.get(element, 'TEXT')} …"
        if (kind := _KINDS.get(get_origin(option) or option)) is not None:
            return kind
    return "TEXT"


def _default(each: Field[Any]) -> str:
    default = each.default
    if default is MISSING and each.default_factory is not MISSING:
        default = each.default_factory()
    if default in (MISSING, None, "") or default is False or default == []:
        return ""
    return f"(default: {getattr(default, 'value', default)})"


def _entry(name: str, kind: str, text: str, width: int) -> list[str]:
    """Return the lines of a flag: its name, its kind, and the text in a column beside them."""
    head = f"  --{name} {kind}"
    lines = textwrap.wrap(text, width, **_indented(_COLUMN)) or [""]
    if len(head) < _COLUMN:
        return [head.ljust(_COLUMN) + lines[0][_COLUMN:], *lines[1:]]
    return [head, *lines]


def _indented(columns: int) -> dict[str, Any]:
    indent = " " * columns
    return {"initial_indent": indent, "subsequent_indent": indent, "break_on_hyphens": False}
