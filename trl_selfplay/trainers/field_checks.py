"""Check each field of a config by itself: its type, its range and its choices.

In: a config before its parent has checked it. Out: nothing, or an error that names the field, its value
and what it must be. Types come from annotations and choices from metadata, for inherited fields as well.
Ranges are in `_BOUNDS` of the class that declares the field; those of TRL's fields are in this file.
"""

import enum
import json
import math
import numbers
import os
import types
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from trl_selfplay.confidential import shown
from trl_selfplay.generation.generation_options import LEAST_TEMPERATURE

# Counts go into 32-bit integers, other numbers into float32 tensors, where larger ones are infinite.
_LARGEST_COUNT = 2**31 - 1
_LARGEST_NUMBER = 3.4e38
LARGEST_SEED = 2**32 - 1  # of numpy


@dataclass(frozen=True, slots=True)
class Bounds:
    """The range of a number; without bounds any finite number is allowed.

    Attributes:
        least: The minimum.
        most: The maximum.
        exclusive: `least` itself is not allowed.
        or_none: None is allowed although the annotation doesn't say so.
        or_zero: 0 is allowed although it is below `least`.
        infinite: Infinity is allowed, of either sign as far as `least` and `most` allow it.
        meaning: What special values mean, such as "0.0 is greedy".
    """

    least: float = -math.inf
    most: float = math.inf
    exclusive: bool = False
    or_none: bool = False
    or_zero: bool = False
    infinite: bool = False
    meaning: str = ""

    def contain(self, value: float, largest: float) -> bool:
        """Return whether a number is within the bounds, and no larger than `largest`."""
        if self.or_zero and value == 0:
            return True
        if math.isnan(_as_float(value)) or not self.least <= value <= self.most:
            return False
        if self.exclusive and value == self.least:
            return False
        return (
            self.infinite
            if value in (math.inf, -math.inf)
            else abs(value) <= max(largest, self.least)
        )

    def describe(self) -> str:
        """Return the range in words, to follow "a number"."""
        parts = []
        if self.least > -math.inf:
            parts.append(f"{'above' if self.exclusive else 'of at least'} {self.least:g}")
        if self.most < math.inf:
            parts.append(f"at most {self.most:.10g}")
        text = " and ".join(parts) + (", or 0" if self.or_zero else "")
        return text + (f" ({self.meaning})" if self.meaning else "")


AT_LEAST_0 = Bounds(0)
AT_LEAST_1 = Bounds(1)
ABOVE_0 = Bounds(0, exclusive=True)
SHARE = Bounds(0, 1)
TEMPERATURE = Bounds(LEAST_TEMPERATURE, or_zero=True, meaning="0.0 is greedy")
_COUNT_AT_LEAST_0 = Bounds(0, _LARGEST_COUNT)
_COUNT_ABOVE_0 = Bounds(0, _LARGEST_COUNT, exclusive=True)

_INHERITED_BOUNDS: dict[str, Bounds] = {
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "num_train_epochs": _COUNT_ABOVE_0,
    "max_steps": Bounds(-1, meaning="-1 and 0 count epochs instead"),
    "learning_rate": AT_LEAST_0,
    "warmup_steps": _COUNT_AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "adam_beta1": Bounds(0, 1 - 1e-9),
    "adam_beta2": Bounds(0, 1 - 1e-9),
    "adam_epsilon": ABOVE_0,  # with 0 a token that no row holds makes its weights NaN
    "max_grad_norm": Bounds(0, infinite=True, meaning="0 is off"),
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": AT_LEAST_0,
    "torch_empty_cache_steps": AT_LEAST_1,
    "logging_steps": _COUNT_AT_LEAST_0,
    "eval_steps": _COUNT_AT_LEAST_0,
    "eval_delay": _COUNT_AT_LEAST_0,
    "eval_accumulation_steps": AT_LEAST_1,
    "save_steps": _COUNT_AT_LEAST_0,
    "seed": Bounds(0, LARGEST_SEED),
    "data_seed": Bounds(0, LARGEST_SEED),
    "dataloader_num_workers": AT_LEAST_0,
    "dataloader_prefetch_factor": AT_LEAST_1,
    "ddp_bucket_cap_mb": AT_LEAST_1,
    "ddp_timeout": AT_LEAST_1,
    "router_aux_loss_coef": AT_LEAST_0,
    "dataset_num_proc": AT_LEAST_1,
    "max_length": Bounds(2),  # a prompt and a completion
    "debug": Bounds(or_none=True),
    "pad_to_multiple_of": AT_LEAST_1,
    "beta": ABOVE_0,
    "label_smoothing": SHARE,
    "ld_alpha": SHARE,
    "discopop_tau": ABOVE_0,
    "precompute_ref_batch_size": AT_LEAST_1,
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": AT_LEAST_1,
}
# What the parent takes although its annotation doesn't say so.
_TAKEN_TOO = {"fsdp": bool | list[str], "resume_from_checkpoint": bool}
# A dict that may also be the path of a JSON file.
_READ_FROM_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
# Text that the parent takes where its annotation allows any.
_CHOICES = {
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "torch_compile_mode": (
        "default", "lite", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead",
    ),
}  # fmt: skip
_FLOATS_ALONE = ("adam_beta1", "adam_beta2")  # torch refuses one of them as an integer
_NOT_EMPTY = ("output_dir", "run_name", "hub_model_id")


def refuse_strangers(config: Any) -> None:
    """Raise RuntimeError if a launcher started several processes and the config doesn't join them.

    transformers joins processes without a GPU only with `use_cpu=True`. Otherwise each would train on
    its own into the same folder.
    """
    started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    are_apart = PartialState().distributed_type is DistributedType.NO
    if started > 1 and (config.world_size == 1 or are_apart):
        raise RuntimeError(
            f"a launcher started {started} processes, and each would train on its own: without a GPU "
            "for each, they work together only with --use_cpu (use_cpu=True). Add it, or start one "
            "process."
        )


def check_fields(config: Any) -> None:
    """Raise ValueError for a value with the wrong type for its field, or out of range.

    Numbers written as text are converted in lists: YAML reads 1e-5 as text, which the parser fixes for
    single numbers but not in lists. A single string becomes a list of one, and a `Path` its text.
    """
    known = next(c for c in type(config).__mro__ if c.__module__.startswith("trl_selfplay."))
    hints, bounds = get_type_hints(known), bounds_of(known)
    for each in fields(known):
        name = each.name
        hint = hints[name] | _TAKEN_TOO[name] if name in _TAKEN_TOO else hints[name]
        value = _read(getattr(config, name), hint, name)
        setattr(config, name, value)
        choices = each.metadata.get("choices", _CHOICES.get(name))
        if choices and isinstance(value, str) and value not in choices:
            raise ValueError(f"{name}={value!r}; choose one of {tuple(choices)}.")
        check_value(name, value, hint, bounds.get(name, Bounds()))
        if value == "" and name in _NOT_EMPTY:
            raise ValueError(f"{name}=''; name it, or leave it out.")
        if name == "optim_args" and value and not all("=" in v for v in value.split(",")):
            raise ValueError(
                f"optim_args={shown(value)}; it must be pairs such as 'eps=1e-6,foreach=no'."
            )
    _check_loader(config)
    _check_savings(config)


def _check_loader(config: Any) -> None:
    """Raise ValueError for a way to start workers where there are none."""
    method = config.dataloader_multiprocessing_context
    if method is not None and config.dataloader_num_workers == 0:
        raise ValueError(
            f"dataloader_multiprocessing_context={method!r} says how workers are started, and with "
            "dataloader_num_workers=0 there are none. Set that, or leave it out."
        )


def _check_savings(config: Any) -> None:
    """Raise ValueError for ways to save memory or time that would fail late, or have no effect."""
    on_cpu = config.use_cpu or not torch.accelerator.is_available()
    checkpointing: Any = config.gradient_checkpointing_kwargs
    if getattr(config, "activation_checkpointing_kwargs", None):  # its name since transformers 5.23
        checkpointing = config.activation_checkpointing_kwargs
    for name, offloads in (
        ("activation_offloading=True", config.activation_offloading),
        (
            f"gradient_checkpointing_kwargs={shown(checkpointing)}",
            isinstance(checkpointing, dict) and checkpointing.get("offload"),
        ),
    ):
        if offloads and on_cpu:
            raise ValueError(
                f"{name} moves activations from an accelerator's memory to the CPU's, and this run "
                "computes on the CPU. Leave it out."
            )
    if config.liger_kernel_config and not config.use_liger_kernel:
        raise ValueError(
            f"liger_kernel_config={shown(config.liger_kernel_config)} has no effect without "
            "use_liger_kernel=True. Set that, or leave it out."
        )


def bounds_of(config_class: type) -> dict[str, Bounds]:
    """Return the range of each numeric field of a config that has one."""
    bounds = dict(_INHERITED_BOUNDS)
    for base in reversed(config_class.__mro__):
        bounds |= vars(base).get("_BOUNDS", {})
    return bounds


def check_value(name: str, value: Any, hint: Any, limits: Bounds) -> None:
    """Raise ValueError for a value that doesn't have a type, or is out of range."""
    if value is None and limits.or_none:
        return
    if not any(_fits(value, option, limits, name) for option in _options(hint)):
        raise ValueError(f"{name}={shown(value, name)}; it must be {_describe(hint, limits)}.")


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; text that stands for one of the others isn't any text."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(_is_written(option) for option in options):
        options = tuple(option for option in options if option is not str)
    return options


def _is_written(option: Any) -> bool:
    """Return whether the values of a type may be given as text too: dicts, enums and numbers."""
    is_dict = option is dict or get_origin(option) is dict
    return is_dict or option is int or _is_enum(option) or _is_enum(_element(option))


def _is_enum(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, enum.Enum)


def _element(option: Any) -> Any:
    return get_args(option)[0] if get_origin(option) is list else None


def _read(value: Any, hint: Any, name: str) -> Any:
    """Return a value in the form of its field where it means the same in another one."""
    options = _options(hint)
    if isinstance(value, os.PathLike) and str in options:
        return os.fspath(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        return int(value)  # numpy's
    if isinstance(value, str) and hint == int | str | None:  # `pad_to_multiple_of`, from a flag
        return _read_integer(value)
    if name in _FLOATS_ALONE and type(value) is int:
        return float(value)
    if options == (bool,) and type(value) is int and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and list[str] in options and str not in options:
        return [value]
    if isinstance(value, list | tuple) and list[float] in options:
        return [_read_number(element) for element in value]
    return value


def _read_integer(value: str) -> Any:
    if value.lower() in ("none", "null"):
        return None
    return int(value) if value.isdecimal() else value


def _read_number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _fits(value: Any, option: Any, limits: Bounds, name: str) -> bool:
    """Return whether a value is of a type and within limits."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if option is bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
    if option is int:
        if value == "auto" and name == "pad_to_multiple_of":
            return True
        is_integer = isinstance(value, int) and is_number
        return is_integer and limits.contain(value, max(_LARGEST_COUNT, _finite(limits.most)))
    if option is float:
        return is_number and limits.contain(_as_float(value), _LARGEST_NUMBER)
    if option is dict or get_origin(option) is dict:
        return _fits_dict(value, name)
    if get_origin(option) is list:
        element = _element(option)
        if _is_enum(element) and isinstance(value, str):
            value = value.split()
        elif not isinstance(value, list | tuple):
            return False
        return all(any(_fits(v, o, limits, name) for o in _options(element)) for v in value)
    if get_origin(option) is Literal:
        return any(value is allowed for allowed in get_args(option))
    if option is Any:
        return True
    if _is_enum(option):
        return isinstance(value, str | enum.Enum) and value in [member.value for member in option]
    return isinstance(value, option)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _fits_dict(value: Any, name: str) -> bool:
    """Return whether a value is a dict, an object in its place, JSON or, for some, a file of it."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value is not None and not isinstance(value, numbers.Number | list | tuple | set)
    if value.startswith("{"):
        try:
            return isinstance(json.loads(value), dict)
        except json.JSONDecodeError:
            return False
    return name in _READ_FROM_FILES and Path(value).is_file()


def _describe(hint: Any, limits: Bounds) -> str:
    options = _options(hint)
    words = [_name_type(option, limits) for option in options]
    if types.NoneType in options or limits.or_none:
        words = [w for w in words if w != "None"] + ["None"]
    return ", or ".join(dict.fromkeys(words))


def _name_type(option: Any, limits: Bounds) -> str:
    range_in_words = f" {limits.describe()}".rstrip()
    if option is bool:
        return "True or False"
    if option is int:
        return f"an integer{range_in_words}" if range_in_words else "an integer"
    if option is float:
        return f"a number{range_in_words}" if range_in_words else "a finite number"
    if option is str:
        return "text"
    if option is types.NoneType:
        return "None"
    if option is dict or get_origin(option) is dict:
        return "a dict"
    if _is_enum(option):
        return f"one of {tuple(member.value for member in option)}"
    if get_origin(option) is list:
        element = _name_type(_element(option), limits)
        return f"a list, each element {element}"
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    return f"a {getattr(option, '__name__', option)}"
