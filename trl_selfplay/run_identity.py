"""Recognise the run that an output directory belongs to.

In: a trainer and the record of the run that filled its output directory. Out: nothing, or an
error that names what differs: rounds of two configurations in one directory would be neither.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_selfplay.prompts import canonical_prompt
from trl_selfplay.rollouts import save_text

# Fields that may change between a run and its resumption: how fast, how often, how loud and where
# it runs, but not what is computed.
_FREE_PREFIXES = (
    "per_device_", "gradient_accumulation", "logging_", "log_", "save_", "hub_", "push_to_hub",
    "report_to", "run_name", "dataloader_", "disable_tqdm", "eval_", "do_", "output_dir", "ddp_",
    "fsdp", "deepspeed", "tensor_parallel", "accelerator_config", "local_rank", "use_cpu",
    "torch_compile", "activation_", "gradient_checkpointing", "tf32", "auto_find_batch_size",
    "resume_from_checkpoint", "load_best_", "stop_after_", "on_empty_round", "num_completions_to_print",
    "trackio_", "project", "remove_unused_columns", "prediction_loss_only", "skip_memory_metrics",
    "include_", "average_tokens", "dataset_num_proc", "torch_empty_cache", "restore_callback_states",
    "enable_jit_checkpoint", "jit_", "debug", "full_determinism", "restart_",
)  # fmt: skip
# May grow: rounds are added at the end.
_MAY_GROW = ("num_rounds",)
# One value a round; only those of finished rounds must stay, and a longer run needs more of them.
_PER_ROUND = ("round_learning_rates", "round_max_steps", "round_betas")


def describe_run(
    config: Mapping[str, Any], prompt_ids: Mapping[str, Iterable[str]], other: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what must stay equal over all processes of one run.

    Args:
        config: `args.to_dict()`.
        prompt_ids: For each dataset by name, its prompt ids.
        other: What else makes the run: model, reward functions, few-shot examples.
    """
    fields = {
        name: value
        for name, value in json.loads(json.dumps(config, default=str)).items()
        if not name.startswith(_FREE_PREFIXES)
    }
    datasets = {
        name: f"{len(list(ids))} prompts, {_digest(sorted(ids))}"
        for name, ids in ((name, list(ids)) for name, ids in prompt_ids.items())
    }
    return fields | datasets | {name: str(value) for name, value in other.items()}


def describe_trainer(trainer: Any) -> dict[str, Any]:
    """Return what makes a trainer's run, see `describe_run`; its method adds `run.identity`."""
    play = trainer.self_play
    scorer, eval_scorer = play.collector.scorer, play.collector.eval_scorer
    examples = [
        (canonical_prompt(e.prompt), e.completion, str(e.solution))
        for e in play.formatter.few_shot_examples
    ]
    sets = {f"eval_dataset {name}".strip(): rows for name, rows in play.heldout.items()}
    return describe_run(
        trainer.args.to_dict(),
        {
            name: [row.prompt_id for row in rows]
            for name, rows in {"train_dataset": play.rows, **sets}.items()
        },
        {
            "method": trainer._name,
            "model": trainer.model.config.name_or_path,
            "peft_config": describe_adapters(trainer.model),
            "reward_funcs": None if scorer is None else scorer.names,
            "eval_reward_funcs": None if eval_scorer is None else eval_scorer.names,
            "few_shot_examples": summarize(examples),
            **trainer.run.identity,
        },
    )


def summarize(values: Sequence[Any]) -> str:
    """Return how many values there are and a digest of them."""
    return f"{len(values)}, {_digest([repr(values)])}"


def name_function(function: Any) -> str:
    """Return what to know a function by in another process."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"  # str.upper has no module


def describe_adapters(model: Any) -> dict[str, Any]:
    """Return the PEFT configurations, without where the base lies."""
    return {
        name: {
            key: sorted(value) if isinstance(value, set) else str(value)
            for key, value in sorted(config.to_dict().items())
            if key not in ("base_model_name_or_path", "revision", "inference_mode")
        }
        for name, config in getattr(model, "peft_config", {}).items()
    }


def check_identity(described: Mapping[str, Any], path: Path, num_finished: int) -> None:
    """Compare with what is on disk, or write it down for the first time.

    Args:
        described: From `describe_run`.
        path: Of the record.
        num_finished: Rounds whose values were used; per-round values before that must not change.

    Raises:
        ValueError: With each differing field, its value on disk and its value now.
    """
    if path.exists():
        recorded = json.loads(path.read_text())
        if differing := [
            f"  {name}: {recorded.get(name)!r} on disk, {described.get(name)!r} now"
            for name in sorted({*recorded, *described})
            if not _may_be(name, recorded.get(name), described.get(name), num_finished)
        ]:
            raise ValueError(
                f"{path.parent.parent} holds rounds of another configuration:\n"
                + "\n".join(differing)
                + "\nSet these back to go on with that run, or choose another output_dir."
            )
    save_text(path, json.dumps(dict(described), indent=1, sort_keys=True))


def _may_be(name: str, recorded: Any, now: Any, num_finished: int) -> bool:
    if recorded == now:
        return True
    if name in _MAY_GROW:
        return recorded is not None and now is not None and now >= recorded
    if name in _PER_ROUND and recorded is not None and now is not None:
        return recorded[:num_finished] == now[:num_finished]
    return False


def _digest(texts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()
