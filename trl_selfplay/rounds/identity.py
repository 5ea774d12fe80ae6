"""Check that an output directory belongs to a run.

In: a trainer and the record of the run in its output directory. Out: nothing, a warning of changes
that affect the result from here on, or an error that names what differs and when it may change.
Rounds of two configurations in one directory would be the result of neither.
"""

import ast
import dataclasses
import hashlib
import inspect
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trl_selfplay.confidential import MASK, masked
from trl_selfplay.disk import NewerFormatError, naming_damage, save_text
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.prompts import canonical_prompt
from trl_selfplay.rounds.plan import OnResume, declared_rules, per_round_lists
from trl_selfplay.rounds.told_changes import TOOLS, TOOLS_SOURCE, diff, told, tools_that_differ
from trl_selfplay.tools.offer import Toolbox

# The format of a run's folder, which its record names. Records without a number are of format 1. Raise it
# where an earlier version would go on with a run and read something wrongly.
FORMAT = 1
_FORMAT_KEY = "format"
# In the record of a run whose scores were all taken back: its graders may be others.
GRADED_ANEW = "graded_anew"
_DIGEST_SIZE = 8

logger = logging.getLogger(__name__)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# When the parents' fields may change on resume, by exact name. Fields of ours say so in their
# annotation, see `OnResume`.
PARENTS_FIELDS = {
    OnResume.FREE: _names(
        """
        accelerator_config activation_checkpointing activation_checkpointing_kwargs
        activation_offloading batch_eval_metrics bf16_full_eval chat_template_path
        dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
        dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
        dataset_num_proc ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
        ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm
        do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay
        eval_do_concat_batches eval_on_start eval_packing eval_steps eval_strategy
        eval_use_gather_object fp16_full_eval fsdp fsdp_config full_determinism
        gradient_checkpointing gradient_checkpointing_kwargs hub_always_push hub_model_id
        hub_private_repo hub_revision hub_strategy hub_token include_for_metrics
        include_num_input_tokens_seen label_names liger_kernel_config local_rank log_level
        log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter
        logging_steps logging_strategy output_dir parallelism_config per_device_eval_batch_size
        precompute_ref_batch_size precompute_ref_log_probs prediction_loss_only project
        push_to_hub remove_unused_columns report_to restore_callback_states_from_checkpoint
        resume_from_checkpoint run_name save_on_each_node save_only_model save_steps
        save_strategy save_total_limit skip_memory_metrics tf32 torch_compile
        torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id
        trackio_space_id trackio_static_space_id trust_remote_code use_cache use_cpu
        use_liger_kernel
        """
    ),
    OnResume.WARNED: _names(
        """
        auto_find_batch_size average_tokens_across_devices dataloader_drop_last
        gradient_accumulation_steps greater_is_better ignore_data_skip load_best_model_at_end
        per_device_train_batch_size
        """
    ),
    OnResume.UNTIL_TRAINED: _names(
        """
        adam_beta1 adam_beta2 adam_epsilon beta bf16 completion_only_loss data_seed
        dataset_kwargs disable_dropout discopop_tau f_alpha_divergence_coef f_divergence_type
        fp16 label_smoothing label_smoothing_factor ld_alpha learning_rate length_column_name
        loss_type loss_weights lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_length
        max_steps neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules
        packing packing_strategy pad_to_multiple_of padding_free ref_model_mixup_alpha
        ref_model_sync_steps router_aux_loss_coef shuffle_dataset sync_ref_model
        train_sampling_strategy truncation_mode use_weighting warmup_steps weight_decay
        """
    ),
    OnResume.FIXED: _names(
        """
        assistant_only_loss dataset_text_field eos_token metric_for_best_model
        model_init_kwargs pad_token seed
        """
    ),
}
# What isn't a field. Everything else that makes a run is fixed.
_NO_FIELDS = {
    OnResume.WARNED: _names(
        """
        compute_loss_func_source eval_graders eval_reward_funcs_source graders number_of_processes
        reward_funcs_source tools_source
        """
    ),
    OnResume.UNTIL_TRAINED: _names(
        "compute_loss_func leak_filter normal_form optimizer_cls_and_kwargs"
    ),
}
# Functions of the package are recorded without their module, which may move. What records called
# those that a run may take before that was so.
_EARLIER_NAMES = {
    "trl_selfplay.normal_forms.default_normal_form": "trl_selfplay.default_normal_form",
    "trl_selfplay.normal_forms.reasoning_path": "trl_selfplay.reasoning_path",
    "trl_selfplay.rationalization.add_hint": "trl_selfplay.add_hint",
    "trl_selfplay.rationalization.find_leak": "trl_selfplay.find_leak",
    "(not recorded)": MASK,
}
# What grades, but for the names of the functions.
_GRADERS = _names("eval_graders eval_reward_funcs_source graders reward_funcs_source")
_OF_SCORES = _names("calibrated_reward_funcs eval_reward_funcs reward_funcs reward_weights")
_ADAPTERS = "peft_config"
_HELDOUT = "eval_dataset"
_VALUES_PER_WEIGHT = 16
# When settings may change, in an error that lists them.
_TITLES = {
    OnResume.FIXED: "never change",
    OnResume.MAY_GROW: "only grow",
    OnResume.UNTIL_TRAINED: "change until a round has been trained on, and one has",
    OnResume.ENGINE: "change with allow_engine_change=True",
}


@dataclass(frozen=True, slots=True)
class Description:
    """What makes a run.

    Attributes:
        settings: By name. Values in a dict have the dict's name before theirs, with a dot.
        defaults: What a setting is taken as where a record doesn't name it: it was written by a
            version of the package, of TRL or of PEFT that doesn't know it.
        rules: When a setting may change, by name; never where a name is missing.
        per_round: Lists with one value per round, and the field that each replaces.
    """

    settings: dict[str, Any]
    defaults: dict[str, Any]
    rules: dict[str, OnResume]
    per_round: dict[str, str]

    def rule(self, name: str) -> OnResume:
        """Return when a setting may change on resume."""
        return self.rules.get(_top(name), OnResume.FIXED)


def describe_run(
    config: Any, prompt_ids: Mapping[str, Iterable[str]], other: Mapping[str, Any]
) -> Description:
    """Return what must stay equal over all processes of one run.

    Args:
        config: The trainer's arguments.
        prompt_ids: For each dataset by name, its prompt ids.
        other: What else makes the run: model, reward functions, few-shot examples.
    """
    datasets = {
        name: f"{len(ids)} prompts, {_digest(sorted(ids))}"
        for name, ids in ((name, list(ids)) for name, ids in prompt_ids.items())
    }
    adapters = other.get("peft_config") or {}
    settings = _flatten({**config.to_dict(), **datasets, **other})
    fields = [f for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING]
    defaults = {f.name: f.default for f in fields}
    for name, adapter in adapters.items():
        defaults |= {f"peft_config.{name}.{k}": v for k, v in _default_adapter(adapter).items()}
    if "method" in other:  # records of before there were tools name none
        defaults |= {TOOLS: None, TOOLS_SOURCE: None}
    return Description(
        settings, _flatten(defaults), resume_rules(type(config)), per_round_lists(type(config))
    )


def resume_rules(config_class: type) -> dict[str, OnResume]:
    """Return when each setting of a run may change on resume, by name."""
    rules = {
        name: rule
        for table in (PARENTS_FIELDS, _NO_FIELDS)
        for rule, names in table.items()
        for name in names
    }
    return rules | declared_rules(config_class)


def describe_trainer(trainer: Any) -> Description:
    """Return what makes a trainer's run, see `describe_run`; its method adds `trainer.identity()`."""
    play = trainer.self_play
    scorer, eval_scorer = play.collector.scorer, play.collector.eval_scorer
    examples = [
        (canonical_prompt(e.prompt), e.completion, str(e.solution))
        for e in play.formatter.few_shot_examples
    ]
    sets = {f"{_HELDOUT} {name}".strip(): rows for name, rows in play.heldout.items()}
    compute_loss = getattr(trainer, "compute_loss_func", None)
    optimizer = getattr(trainer, "optimizer_cls_and_kwargs", None)
    quantization = getattr(trainer.model.config, "quantization_config", None)
    return describe_run(
        trainer.args,
        {
            name: [row.prompt_id for row in rows]
            for name, rows in {"train_dataset": play.rows, **sets}.items()
        },
        {
            "method": trainer._name,
            "model": trainer.model.config.name_or_path,
            "weights": trainer.weights_digest,
            "peft_config": describe_adapters(trainer.model),
            "quantization_config": getattr(quantization, "to_dict", lambda: quantization)(),
            "reward_funcs": None if scorer is None else str(scorer.names),
            "calibrated_reward_funcs": None if scorer is None else str(scorer.calibration.names),
            "eval_reward_funcs": None if eval_scorer is None else str(eval_scorer.names),
            "reward_funcs_source": None if scorer is None else source_digests(scorer.callables),
            "eval_reward_funcs_source": None
            if eval_scorer is None
            else source_digests(eval_scorer.callables),
            "graders": {} if scorer is None else _describe_graders(scorer),
            "eval_graders": {} if eval_scorer is None else _describe_graders(eval_scorer),
            "compute_loss_func": None if compute_loss is None else name_function(compute_loss),
            "compute_loss_func_source": source_digests([compute_loss]),
            "optimizer_cls_and_kwargs": None
            if optimizer is None
            else f"{name_function(optimizer[0])} {optimizer[1]}",
            "number_of_processes": trainer.accelerator.num_processes,
            "few_shot_examples": summarize(examples),
            **_describe_tools(play.toolbox),
            **trainer.identity(),
        },
    )


def _describe_tools(toolbox: Toolbox | None) -> dict[str, Any]:
    """Return what prompts show of each tool, and a digest of its source, by name."""
    if toolbox is None:
        return {TOOLS: None, TOOLS_SOURCE: None}
    functions = [schema.get("function", schema) for schema in toolbox.schemas]
    return {
        TOOLS: {f["name"]: {k: v for k, v in f.items() if k != "name"} for f in functions},
        TOOLS_SOURCE: {name: source_digests([f]) for name, f in toolbox.sources.items()},
    }


def _describe_graders(scorer: Scorer) -> dict[str, Any]:
    """Return what the scores of functions with options depend on, by the function's name."""
    return {
        name: {
            **function.identity,
            "own_weights": digest_weights(function.grading_model.ready(), restored=False)
            if getattr(function, "grading_model", None) is not None
            else None,
        }
        for name, function in scorer.with_identity.items()
    }


def summarize(values: Sequence[Any]) -> str:
    """Return how many values there are and a digest of them."""
    return f"{len(values)}, {_digest([repr(values)])}"


def summarize_each(values: Iterable[Any]) -> str:
    """Return what `summarize` returns of a list of these values, without having all in memory."""
    digest, count = hashlib.blake2b(b"[", digest_size=_DIGEST_SIZE), 0
    for value in values:
        digest.update(f"{', ' if count else ''}{value!r}".encode())
        count += 1
    digest.update(b"]")
    return f"{count}, {digest.hexdigest()}"


def name_function(function: Any) -> str:
    """Return the name of a function for the record; the package's own without their module."""
    named = function if hasattr(function, "__qualname__") else type(function)
    module = getattr(named, "__module__", None)  # str.upper has none
    package = __name__.partition(".")[0]
    if module is not None and module.partition(".")[0] == package:
        module = package
    return f"{module}.{named.__qualname__}"


def source_digests(functions: Iterable[Any]) -> str:
    """Return a digest of the functions' source, as far as it can be read."""
    texts = []
    for function in functions:
        try:
            texts.append(inspect.getsource(getattr(function, "func", function)))  # of a partial
        except (OSError, TypeError):  # built in, an object, or typed at a prompt
            texts.append("")
    return _digest(texts)


def digest_weights(model: Any, restored: bool) -> str | None:
    """Return a digest of some values of each weight that a run reads from the model's source.

    It tells models apart where their name or path doesn't. Quantized weights aren't plain numbers,
    and are left out.

    Args:
        model: The trainer's model, as it was loaded.
        restored: A resumed run takes the trainable weights from its own folder, not from there.
    """
    digest, count = hashlib.blake2b(digest_size=8), 0
    for _, weight in sorted(model.named_parameters()):
        is_plain = weight.is_floating_point() and not hasattr(weight, "quant_state")
        is_plain &= type(weight.data) is torch.Tensor  # torchao's weights are of their own class
        if (weight.requires_grad and restored) or not is_plain or weight.numel() == 0:
            continue
        # In integers: float32 rounds the last place of a large weight to one behind it.
        steps = torch.arange(_VALUES_PER_WEIGHT)
        places = steps * (weight.numel() - 1) // (_VALUES_PER_WEIGHT - 1)
        values = weight.detach().flatten()[places.to(weight.device)].float().cpu()
        digest.update(f"{tuple(weight.shape)} {values.tolist()}".encode())
        count += 1
    return f"{count}, {digest.hexdigest()}" if count else None


def describe_adapters(model: Any) -> dict[str, Any]:
    """Return the PEFT configurations without the base model's path."""
    return {
        name: _describe_adapter(config.to_dict())
        for name, config in getattr(model, "peft_config", {}).items()
    }


def _describe_adapter(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: sorted(value) if isinstance(value, set) else str(value)
        for key, value in sorted(values.items())
        if key not in ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
    }


def _default_adapter(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return what PEFT's configuration of the same kind has where nothing is said."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = str(described.get("peft_type", "")).split(".")[-1]
    config_class: Any = {k.value: v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(kind)
    if config_class is None:
        return {}
    # Of the fields, because some kinds can't be made without arguments.
    return _describe_adapter(
        {
            each.name: each.default
            if each.default_factory is dataclasses.MISSING
            else each.default_factory()
            for each in dataclasses.fields(config_class)
        }
    )


def check_identity(
    described: Description,
    path: Path,
    num_finished: int,
    *,
    is_trained: bool,
    num_sampled: int = 0,
) -> list[str]:
    """Compare a run with its record on disk, then record it as it is now.

    Args:
        described: The run as it is now.
        path: File of the record.
        num_finished: Finished rounds, whose values must not change.
        is_trained: A round has been trained on.
        num_sampled: Rounds that have begun to sample, if more than are finished.

    Returns:
        The settings of selection and training that changed; none once a round was trained on.

    Raises:
        DamagedFileError: The record can't be read.
        NewerFormatError: A later version of the package began the run.
        ValueError: With each differing setting, its value on disk and its value now, by when it
            may change.
    """
    changed: list[str] = []
    if not path.exists() and any(path.parent.glob("round-*")):
        logger.warning(
            "%s is gone: what this run was configured with isn't known and can't be compared.", path
        )
    if path.exists():
        with naming_damage(
            path,
            "Delete it and go on, with the settings that the run began with, or bring it back.",
        ):
            recorded = _with_present_names(_flatten(json.loads(path.read_text())))
        _refuse_newer(recorded.pop(_FORMAT_KEY, 1), path)
        free = _GRADERS | _OF_SCORES if recorded.pop(GRADED_ANEW, False) else ()
        num_used = {
            OnResume.UNTIL_TRAINED: num_finished,
            OnResume.FIXED: max(num_sampled, num_finished),
        }
        found = _differing(described, recorded, num_used)
        differing = {name: diff for name, diff in found.items() if _top(name) not in free}
        _refuse(described, differing, path, is_trained)
        changed = [name for name in differing if described.rule(name) is OnResume.UNTIL_TRAINED]
        if is_trained:
            _warn(differing)
        else:
            _warn_of_sources(differing)
    record = {**described.settings, _FORMAT_KEY: FORMAT}
    save_text(path, json.dumps(record, indent=1, sort_keys=True))
    return changed


def _refuse_newer(number: Any, path: Path) -> None:
    """Raise NewerFormatError for a run that a later version of the package began."""
    if number > FORMAT:
        raise NewerFormatError(
            f"{path.parent.parent} holds a run of format {number}, and this version of trl-selfplay reads "
            f"formats up to {FORMAT}. Nothing was changed: upgrade with pip install -U trl-selfplay to go on "
            "with that run, or choose another output_dir."
        )


def _differing(
    described: Description, recorded: Mapping[str, Any], num_used: Mapping[OnResume, int]
) -> dict[str, str]:
    """Return what differs and is not free to, with its value on disk and now, by name.

    Args:
        described: What the run is now.
        recorded: What it was.
        num_used: How many values of a list with one per round are used up, by the list's rule.
    """
    settings = described.settings
    before, now = {**described.defaults, **recorded}, {**described.defaults, **settings}
    known = {_top(name) for name in before} & {_top(name) for name in now}
    # Every version records held-out sets: one that is named on one side only was added or dropped.
    known |= {_top(name) for name in (*before, *now) if name.startswith(_HELDOUT)}
    # Versions also know the options of different functions.
    graders = {_of_grader(name) for name in before} & {_of_grader(name) for name in now}
    found = {}
    for name in sorted({*recorded, *settings}):
        was: Any = before.get(name)
        is_: Any = now.get(name)
        if (
            _top(name) not in known
            or (_top(name) == _ADAPTERS and (name not in before or name not in now))
            or _of_grader(name) not in graders
        ):  # only one version knows it
            continue
        rule = described.rule(name)
        if was == is_ or rule is OnResume.FREE or (rule is OnResume.MAY_GROW and is_ >= was):
            continue
        if name in described.per_round:
            count = num_used[rule]
            single = [before.get(described.per_round[name])] * count
            pairs = list(zip((was or single)[:count], (is_ or single)[:count], strict=False))
            changes = [
                f"{diff(*pair)} in round {i}" for i, pair in enumerate(pairs) if pair[0] != pair[1]
            ]
            if changes:
                found[name] = ", ".join(changes)
            continue
        found[name] = diff(was, is_)
    adapters = [sorted(_adapters(names)) for names in (recorded, settings)]
    if _ADAPTERS in known and adapters[0] != adapters[1]:
        found[_ADAPTERS] = diff(*adapters)
    for tool, text in tools_that_differ(before, now).items():
        found = {n: t for n, t in found.items() if n != tool and not n.startswith(f"{tool}.")}
        found.pop(tool.replace(TOOLS, TOOLS_SOURCE, 1), None)
        found[tool] = text
    if recorded.get("weights") == settings.get("weights") is not None:
        found.pop("model", None)  # the same weights under another name, or at another place
    return found


def _of_grader(name: str) -> str:
    """Return the beginning that all options of one function share; "" for any other setting."""
    return ".".join(name.split(".")[:2]) if _top(name) in ("graders", "eval_graders") else ""


def _adapters(names: Iterable[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith(f"{_ADAPTERS}.")}


def _refuse(
    described: Description, differing: Mapping[str, str], path: Path, is_trained: bool
) -> None:
    until_trained = {
        name
        for name in differing
        if described.rule(name) is OnResume.UNTIL_TRAINED and name not in described.per_round
    }
    allowed = {OnResume.WARNED}
    if described.settings.get("allow_engine_change"):
        allowed.add(OnResume.ENGINE)
    refused = {
        name: text
        for name, text in differing.items()
        if described.rule(name) not in allowed and (is_trained or name not in until_trained)
    }
    if "weights" in refused:
        refused["weights"] += ": the model's weights are not those that the run began with"
    if not refused:
        return
    text = f"{path.parent.parent} holds rounds of another configuration (on disk → now)."
    for title, names in _group(described, refused).items():
        text += f"\nThese may {title}:" + "".join(
            f"\n  {told(name)}: {refused[name]}" for name in names
        )
    text += "\nRestore these values to resume that run, or choose another output_dir."
    if kept := [f"{told(name)}: {text}" for name, text in differing.items() if name not in refused]:
        text += f"\nThese may stay as they are now: {'; '.join(kept)}."
    raise ValueError(text)


def _group(described: Description, refused: Iterable[str]) -> dict[str, list[str]]:
    """Return refused settings by when they may change, what never may first."""
    groups: dict[str, list[str]] = {title: [] for title in _TITLES.values()}
    for name in refused:
        if name in described.per_round:
            title = "change for later rounds alone"
        else:
            title = _TITLES[described.rule(name)]
            lists = [n for n, single in described.per_round.items() if single == name]
            if lists:
                title += f"; {lists[0]} may for later rounds"
        groups.setdefault(title, []).append(name)
    return {title: names for title, names in groups.items() if names}


def _warn(differing: Mapping[str, str]) -> None:
    for name, text in differing.items():
        logger.warning(
            "%s: %s (on disk → now). The run continues with it; its result differs from that without "
            "the change.",
            told(name),
            text,
        )


def _warn_of_sources(differing: Iterable[str]) -> None:
    """Warn that functions have changed while nothing was trained on yet."""
    for tops, what, kept in (
        (
            _GRADERS,
            ": reward functions have changed",
            "were graded keep their rewards: see trl-selfplay regrade",
        ),
        (
            {TOOLS_SOURCE},
            " changed since",
            "called it keep the results; to sample all alike, begin anew",
        ),
    ):
        if names := sorted(told(name) for name in differing if _top(name) in tops):
            logger.warning("%s%s. Completions that %s.", ", ".join(names), what, kept)


def _top(name: str) -> str:
    return name.split(".")[0]


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON gives them back, those in dicts by dotted name, without secrets."""
    flat: dict[str, Any] = {}
    for name, value in masked(json.loads(json.dumps(dict(values), default=str))).items():
        _add(flat, name, value)
    return flat


def _with_present_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _EARLIER_NAMES.get(value, value) if isinstance(value, str) else value
        for name, value in recorded.items()
    }


def _add(flat: dict[str, Any], name: str, value: Any) -> None:
    if value == "None" and "." not in name:  # older versions recorded all but fields as text
        value = None
    if name == _ADAPTERS and isinstance(value, str):  # the same
        value = ast.literal_eval(value)
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _add(flat, f"{name}.{key}", inner)
    else:
        flat[name] = value


def _digest(texts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=_DIGEST_SIZE).hexdigest()
