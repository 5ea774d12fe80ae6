"""Explain settings of other TRL trainers' scripts that these trainers don't have.

In: keyword arguments of a config or a trainer, or one of TRL's configs. Out: the arguments without those
at TRL's defaults, which are dropped with a log line, or an error that names each of the others, with the
reason and its replacement.
"""

import dataclasses
import difflib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig, SFTConfig

from trl_selfplay.confidential import shown

logger = logging.getLogger(__name__)

_CONFIGS = (GRPOConfig, RLOOConfig, SFTConfig, DPOConfig, KTOConfig)

_NO_RATIO = (
    "no ratio of policies is clipped or corrected: the loss is the log-likelihood of kept "
    "completions"
)
_NO_REFERENCE = (
    "there is no reference model to stay close to; `start_from` says from which weights a round "
    "trains, and `num_train_epochs` or `max_steps` how far"
)
_OWN_SAMPLER = (
    "completions are sampled by the trainer itself, with as many sequences at once as memory allows"
)
_ROUND_SIZE = (
    "a round samples `num_generations` completions of `num_prompts_per_round` prompts, and trains "
    "on what it keeps; the batch size of sampling follows from the memory"
)
_NO_ENTROPY = "the loss has no entropy term; `temperature` keeps samples diverse"
_ON_DISK = "the completions of all rounds are kept in `_rounds/` of `output_dir`"
_NOT_PACKED = "pairs aren't packed"
_OWN_ROWS = "the rows that are trained on are made in each round, as token ids"
_COMPLETIONS_ALONE = "the loss is on the completions alone"

# By name: why there is no such field, and what takes its place. A name that ends in _ is a prefix.
_FIELDS: dict[str, str] = {
    "beta": _NO_REFERENCE,
    "sync_ref_model": _NO_REFERENCE,
    "ref_model_": _NO_REFERENCE,
    "use_bias_correction_kl": _NO_REFERENCE,
    "num_iterations": "set `num_train_epochs`: how often a round's completions are trained on",
    "epsilon": _NO_RATIO,
    "epsilon_high": _NO_RATIO,
    "delta": _NO_RATIO,
    "sapo_": _NO_RATIO,
    "vespo_": _NO_RATIO,
    "importance_sampling_level": _NO_RATIO,
    "off_policy_mask_threshold": _NO_RATIO,
    "vllm_importance_sampling_": _NO_RATIO,
    "scale_rewards": "rewards select completions (`reward_threshold`) and aren't made advantages; "
    "ReSTEMConfig(loss_weighting='reward') weighs completions by them",
    "multi_objective_aggregation": "`reward_weights` say how rewards are added up",
    "mask_truncated_completions": "completions that are cut by length are never trained on",
    "top_entropy_quantile": "all tokens of a kept completion are trained on",
    "entropy_": _NO_ENTROPY,
    "use_adaptive_entropy": _NO_ENTROPY,
    "steps_per_generation": _ROUND_SIZE,
    "generation_batch_size": _ROUND_SIZE,
    "use_vllm": "thoughts are sampled inside the forward pass that trains, at every token, so an "
    "engine beside it can't sample them",
    "vllm_": "thoughts are sampled inside the forward pass that trains",
    "vllm_model_impl": "vLLM uses its own implementation of a model where it has one",
    "vllm_enable_sleep_mode": "the engine never sleeps: its process ends before training, and its "
    "memory is free",
    "vllm_structured_outputs_regex": "completions aren't constrained; a reward function rejects the "
    "others",
    "vllm_group_port": "no weights are sent by NCCL; the server loads each round's adapter from disk",
    "allow_engine_change": "thoughts are sampled inside the forward pass that trains",
    "use_transformers_": _OWN_SAMPLER,
    "transformers_continuous_batching_config": _OWN_SAMPLER,
    "cache_implementation": _OWN_SAMPLER,
    "ds3_gather_for_generation": _OWN_SAMPLER,
    "max_prompt_length": "prompts are never truncated, and one that doesn't fit the model is "
    "refused",
    "max_tool_calling_iterations": "completions are one turn without tools here; STaRTrainer, ReSTEMTrainer and "
    "IRPOTrainer take tools",
    "disable_dropout": "set the dropout in the model's config",
    "log_unique_prompts": _ON_DISK,
    "log_completions_hub_repo": _ON_DISK,
    "log_multimodal": _ON_DISK,
    "packing": _NOT_PACKED,
    "packing_strategy": _NOT_PACKED,
    "eval_packing": _NOT_PACKED,
    "shuffle_dataset": "rows are shuffled in each round",
    "dataset_text_field": _OWN_ROWS,
    "dataset_kwargs": _OWN_ROWS,
    "completion_only_loss": _COMPLETIONS_ALONE,
    "assistant_only_loss": _COMPLETIONS_ALONE,
    "eos_token": "set `tokenizer.eos_token` and pass the tokenizer as `processing_class`",
    "chat_template_path": "set `tokenizer.chat_template` and pass the tokenizer as "
    "`processing_class`",
    "desirable_weight": "there are no labelled completions: the data's is chosen, the model's own "
    "is rejected",
    "undesirable_weight": "there are no labelled completions: the data's is chosen, the model's "
    "own is rejected",
    "dry_run": "there are no rounds to try out; run with max_steps=1",
    "num_rounds": "there are no rounds: training runs once over the text",
    "reward_threshold": "nothing is graded",
    "rationalize": "nothing is graded, so nothing needs a hint",
    # Older names.
    "max_seq_length": "set `max_length`",
    "max_new_tokens": "set `max_completion_length`",
    "evaluation_strategy": "set `eval_strategy`",
    "warmup_ratio": "set `warmup_steps`, a share of the steps where it is below 1",
    "group_by_length": "set train_sampling_strategy='group_by_length'",
}
_ONE_TURN = "completions are one turn here, or the data's own. STaRTrainer, ReSTEMTrainer and IRPOTrainer take it"
_GRPO_LOSSES = ("bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo")

_ARGUMENTS: dict[str, str] = {
    "tools": f"{_ONE_TURN}; put what a tool returns into the prompt",
    "environment_factory": _ONE_TURN,
    "rollout_func": "completions are sampled by the trainer itself; a method of your own overrides "
    "`play_round`",
    "tokenizer": "pass it as `processing_class`",
    "formatting_func": "format the columns of the dataset beforehand, with `dataset.map`",
    "compute_loss_func": "the loss is DPO's, chosen by `loss_type`; another one overrides "
    "`compute_loss` in a subclass",
    "optimizer_cls_and_kwargs": "choose the optimizer with `args.optim` and `args.optim_args`",
    "preprocess_logits_for_metrics": "pairs are scored by log-probs of whole completions",
    "reward_funcs": "nothing is graded: the data's own text or completions are learnt from",
    **dict.fromkeys(
        ("reward_model", "reward_fn", "reward_func", "reward_function", "reward_functions"),
        "pass it as `reward_funcs`",
    ),
    "max_seq_length": "set `max_length` in the config",
    "dataset_text_field": _OWN_ROWS,
    "packing": "set it in the config",
}


def takes_ported_fields(config_class: Any) -> Any:
    """Let a config say what becomes of fields of TRL's other configs that it doesn't have.

    One that has TRL's default is dropped, with a line: it asks for nothing. Any other is an error.
    """
    init = config_class.__init__

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **_leave_out_defaults(config_class, kwargs))

    config_class.__init__ = wrapper
    return config_class


def _leave_out_defaults(config_class: type, given: dict[str, Any]) -> dict[str, Any]:
    own = inspect.signature(config_class).parameters
    foreign = {name: value for name, value in given.items() if name not in own}
    dropped = {name: value for name, value in foreign.items() if _is_a_default(name, value)}
    if refused := {name: value for name, value in foreign.items() if name not in dropped}:
        raise TypeError(
            f"{config_class.__name__} doesn't have these fields:\n{_explain(refused, _FIELDS, own)}"
        )
    if dropped:
        listed = ", ".join(f"{name}={shown(value, name)}" for name, value in dropped.items())
        logger.warning(
            "%s has no use for %s (the defaults of TRL's own config): leave them out.",
            config_class.__name__,
            listed,
        )
    return {name: value for name, value in given.items() if name not in dropped}


def _is_a_default(name: str, value: Any) -> bool:
    """Return whether the first of TRL's configs that has a field has it at this value."""
    owner = next((c for c in _CONFIGS if name in c.__dataclass_fields__), None)
    if owner is None:
        return False
    default = owner.__dataclass_fields__[name].default
    return type(value) is type(default) and value == default


def _explain(
    settings: Mapping[str, Any], reasons: Mapping[str, str], known: Iterable[str] = ()
) -> str:
    lines = []
    for name, value in settings.items():
        meant = next(iter(_similar(name, known)), name)  # hub_tokn holds a token as well
        lines.append(f"  {name}={shown(value, meant)}: {_advice(name, reasons, known)}")
    return "\n".join(lines)


def explain_unknown_flags(flags: Sequence[str], known: Iterable[str]) -> str:
    """Return a line for each flag that a script doesn't have: why, and what takes its place.

    Args:
        flags: What was left over on the command line, values included.
        known: The names that the script has.
    """
    names = [flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    return "\n".join(f"  --{name}: {_advice(name, _FIELDS, known)}" for name in names)


def _advice(name: str, reasons: Mapping[str, str], known: Iterable[str]) -> str:
    if name in reasons:
        return f"leave it out; {reasons[name]}."
    prefixes = [key for key in reasons if key.endswith("_") and name.startswith(key)]
    if prefixes:
        return f"leave it out; {reasons[max(prefixes, key=len)]}."
    for config in _CONFIGS:
        if name in config.__dataclass_fields__:
            return f"leave it out; it belongs to {config.__name__} and has no counterpart here."
    for other in _similar(name, known):
        return f"it is unknown; did you mean {other!r}?"
    return "leave it out; it is unknown."


def _similar(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.8)


def refuse_grpo_loss(loss_type: Any) -> None:
    """Raise ValueError for a `loss_type` of GRPOConfig, whose name SFTConfig has too."""
    if loss_type in _GRPO_LOSSES:
        raise ValueError(
            f"loss_type={loss_type!r} is one of GRPOConfig's: leave it out. {_NO_RATIO.capitalize()} "
            "('nll'; 'dft' weighs tokens by their probability)."
        )


def check_config_class(args: Any, config_class: type) -> None:
    """Raise TypeError if `args` is not the trainer's own config, and say how to make it that."""
    if isinstance(args, config_class):
        return
    name = config_class.__name__
    own = inspect.signature(config_class).parameters
    if not isinstance(args, TrainingArguments):
        message = f"args is {args!r:.200}; it must be a {name}."
        if "reward_weights" in own:
            message += (
                " GRPOTrainer's second parameter is `reward_funcs`; here it is passed by name: "
                "reward_funcs=…."
            )
        raise TypeError(message)
    settings = {
        each.name: getattr(args, each.name)
        for each in dataclasses.fields(args)
        if each.init and each.name not in own and not _has_default(args, each)
    }
    message = (
        f"args is of type {type(args).__name__}; this trainer needs {name}: change the class name in your "
        "script. "
    )
    if settings:
        message += f"It doesn't have these fields:\n{_explain(settings, _FIELDS)}"
    else:
        message += "It has all fields that are set there."
    raise TypeError(message)


def _has_default(args: Any, each: dataclasses.Field[Any]) -> bool:
    if each.name in ("generation_batch_size", "steps_per_generation"):
        return True  # GRPOConfig has computed them from other fields
    if each.default_factory is not dataclasses.MISSING:
        return getattr(args, each.name) == each.default_factory()
    return getattr(args, each.name) == each.default


def explains_foreign_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Let a trainer's constructor say what becomes of arguments that it doesn't take.

    Raises:
        TypeError: When it is called with some, from the constructor that is returned.
    """
    known = inspect.signature(init).parameters
    name = init.__qualname__.split(".")[0]

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if foreign := {key: _Shown(v) for key, v in kwargs.items() if key not in known}:
            raise TypeError(
                f"{name} doesn't take these arguments:\n{_explain(foreign, _ARGUMENTS, known)}"
            )
        init(self, *args, **kwargs)

    return wrapper


class _Shown:
    """Anything, shortly: arguments of a trainer may be whole models."""

    def __init__(self, value: Any) -> None:
        self.text = f"{value!r:.60}"

    def __repr__(self) -> str:
        return self.text
