"""What TRL's trainers take and ours don't: the error, and what to do instead.

One entry per feature. docs/drop_in.md shows them as a table, which `as_table` writes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from trl import DPOConfig, GRPOConfig, SFTConfig

SFT = ("STaR", "ReST^EM")
GRADED = (*SFT, "IRPO")
PAIRS = ("SPIN", "IRPO", "V-STaR")
ROUNDS = (*SFT, *PAIRS)
QUIET = ("Quiet-STaR",)
ALL = (*ROUNDS, *QUIET)


@dataclass(frozen=True)
class Refusal:
    """A feature that is refused at construction.

    Attributes:
        feature: What a script of TRL passes, in Markdown.
        methods: The trainers that refuse it.
        changes: Fields and arguments, or a function that makes them of a trainer's parts.
        message: A pattern that the error matches.
        remedy: What to do instead, for the table.
    """

    feature: str
    methods: tuple[str, ...]
    changes: dict[str, Any] | Callable[[Any], dict[str, Any]]
    message: str
    remedy: str


def function(*args: Any, **kwargs: Any) -> None:
    """Stand where a function is expected."""


def labelled(text: str) -> str:
    """Return a label.

    Args:
        text: What to label.
    """
    return f"label: {text}"


def reads_environments(completions: Any, environments: Any, **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


class Sums:
    """An environment that says a sum."""

    def reset(self, **columns: Any) -> str:
        return "1 + 1 ="


def config_of(config_class: type, **fields: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda parts: {"args": config_class("run", use_cpu=True, bf16=False, **fields)}


_ROWS = "Rows are made in each round, as token ids. Prepare the dataset beforehand."
_LOGITS = "Log a number with `log_metric` in a reward function."
_GRPO = "Leave it out."

REFUSALS = (
    # Arguments.
    Refusal("`args=GRPOConfig(…)`", ALL, config_of(GRPOConfig, beta=0.1), "this trainer needs", "Change the class name; the error lists the fields to leave out."),
    Refusal("`args=SFTConfig(…)`", PAIRS, config_of(SFTConfig), "change the class name", "Change the class name."),
    Refusal("`args=DPOConfig(…)`", SFT, config_of(DPOConfig), "change the class name", "Change the class name."),
    Refusal("`optimizers`", ROUNDS, lambda parts: {"optimizers": (torch.optim.SGD(parts.model.parameters()), None)}, "fresh optimizer", "Set `optim`, or `optimizer_cls_and_kwargs` where the parent is SFTTrainer."),
    Refusal("`optimizers`", QUIET, lambda parts: {"optimizers": (torch.optim.SGD(parts.model.parameters()), None)}, "Use optimizer_cls_and_kwargs", "Set `optim` or `optimizer_cls_and_kwargs`."),
    Refusal("`compute_metrics`", ROUNDS, {"compute_metrics": function}, "log_metric", _LOGITS),
    Refusal("`compute_metrics`", QUIET, {"compute_metrics": function}, "never held for a whole batch", "Losses with and without thoughts are logged."),
    Refusal("`preprocess_logits_for_metrics`", (*SFT, *QUIET), {"preprocess_logits_for_metrics": function}, "Leave it out", "Leave it out."),
    Refusal("`compute_loss_func`", (*PAIRS, *QUIET), {"compute_loss_func": function}, "[Ll]eave it out", "Override `compute_loss` in a subclass."),
    Refusal("`formatting_func`", SFT, {"formatting_func": str}, "Format the `prompt` column", "Format the `prompt` column with `dataset.map`."),
    Refusal("`formatting_func`", PAIRS, {"formatting_func": str}, "dataset.map", "Format the columns with `dataset.map`."),
    Refusal("`ref_model`", PAIRS, lambda parts: {"ref_model": parts.model}, "as it enters each round", "The reference is the policy as it enters a round. Override `compute_ref_log_probs` for another."),
    Refusal("`tools`, `environment_factory`", ("SPIN", "V-STaR", *QUIET), {"tools": [function], "environment_factory": function}, "STaRTrainer, ReSTEMTrainer and IRPOTrainer take it", "Take STaR, ReST^EM or IRPO ([tools](tools.md))."),
    Refusal("`max_tool_calling_iterations`", ("SPIN", "V-STaR", *QUIET), {"max_tool_calling_iterations": 2}, "one turn without tools", "The same."),
    Refusal("reward functions with a parameter `environments`", GRADED, lambda parts: {"tools": [labelled], "reward_funcs": reads_environments}, "graded from disk", "Give the environment `get_reward`, or read the messages."),
    Refusal("no `train_dataset` beside `environment_factory`", GRADED, {"train_dataset": None, "environment_factory": Sums}, "a column", "A dataset whose columns `reset` gets."),
    Refusal("`rollout_func`", GRADED, {"rollout_func": function}, "`play_round`", "Override `play_round`."),
    Refusal("`reward_funcs`", ("SPIN", "V-STaR", *QUIET), {"reward_funcs": function}, "nothing is graded", "Nothing is graded. SPIN takes `eval_reward_funcs`."),
    Refusal("no `reward_funcs`", GRADED, {"reward_funcs": None}, "`reward_funcs` is missing", "Pass what says which completions are right."),
    Refusal("several `reward_funcs` without weights", GRADED, {"reward_funcs": [function, function]}, "reward_threshold=2.0", "Set `reward_threshold` or `reward_weights`."),
    Refusal("one of `reward_processing_classes` for several functions", GRADED, lambda parts: {"reward_funcs": [function, function], "reward_weights": [1.0, 0.0], "reward_processing_classes": parts.tokenizer}, "give one each", "One each, None for callables."),
    Refusal("`eval_dataset`", ("V-STaR",), lambda parts: {"eval_dataset": parts.rows}, "VerifierReward", "Score held-out samples with `VerifierReward`."),
    Refusal("`IterableDataset`", ROUNDS, lambda parts: {"train_dataset": parts.rows.to_iterable_dataset()}, "finite set", "`Dataset.from_list(list(iterable.take(n)))`."),
    Refusal("`DatasetDict` as `train_dataset`", ALL, lambda parts: {"train_dataset": DatasetDict(train=parts.rows)}, "Dataset", "Pass a split."),
    Refusal("columns `image`, `images`", ALL, lambda parts: {"train_dataset": parts.rows.add_column("images", [[]] * len(parts.rows))}, "image", "Text models alone."),
    # PEFT.
    Refusal("prompt learning (`PromptTuningConfig`, `PrefixTuningConfig`, …)", ALL, {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "adds virtual tokens", "Use LoRA."),
    Refusal("prompt learning (`PromptTuningConfig`, `PrefixTuningConfig`, …)", SFT, {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "adds virtual tokens", "Use LoRA."),
    Refusal("`init_lora_weights` that change the base (PiSSA, OLoRA, …)", ALL, {"peft_config": LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"])}, "changes the base model's weights", '`init_lora_weights=True`, `"gaussian"` or `"orthogonal"`.'),
    # Fields of the data.
    Refusal("`assistant_only_loss`", ROUNDS, {"assistant_only_loss": True}, "completion", "The loss is on completions alone."),
    Refusal("`completion_only_loss`", PAIRS, {"completion_only_loss": True}, "on the completions alone", "The loss is on completions alone."),
    Refusal("`dataset_text_field`", ROUNDS, {"dataset_text_field": "x"}, "[Ll]eave (this|it) out", "Rename the column to `prompt`."),
    Refusal("`dataset_kwargs`", ROUNDS, {"dataset_kwargs": {"skip_prepare_dataset": True}}, "as token ids", _ROWS),
    Refusal("`packing`", PAIRS, {"packing": True}, "pairs aren't packed", "Pairs aren't packed."),
    Refusal("`packing`, `padding_free`", QUIET, {"packing": True}, "see other texts", "Leave it out."),
    Refusal('`packing_strategy="wrapped"`', SFT, {"packing": True, "max_length": 64, "packing_strategy": "wrapped"}, "'bfd' packs whole rows", '`"bfd"`.'),
    Refusal("`eval_packing`", ROUNDS, {"eval_packing": True}, "packed", "Held-out prompts are sampled."),
    Refusal("`padding_free`", PAIRS, {"padding_free": True}, "TRL pads pairs", "TRL itself has switched it off for pairs."),
    Refusal("`eos_token`, `chat_template_path`", PAIRS, {"eos_token": "so"}, "tokenizer.eos_token", "Set it on the tokenizer and pass that as `processing_class`."),
    Refusal("`length_column_name`", ROUNDS, {"length_column_name": "x"}, "with their lengths", "Leave it out."),
    # Fields of the loss.
    Refusal("GRPO's `loss_type`", GRADED, {"loss_type": "dapo"}, "one of GRPOConfig's", "Leave it out; `'nll'` and `'dft'` are SFT's."),
    Refusal("`loss_type`", ("IRPO",), {"loss_type": ["ipo"]}, "IRPO's loss", "IRPO's loss is fixed; SPIN takes all of DPO's."),
    Refusal("`loss_type`", QUIET, {"loss_type": "dft"}, "set loss_type='nll'", "`'nll'`."),
    Refusal('`loss_type=["sft"]` alone', ("SPIN",), {"loss_type": ["sft"]}, "SFTTrainer", "Use SFTTrainer."),
    Refusal("`label_smoothing_factor`", (*PAIRS, *QUIET), {"label_smoothing_factor": 0.1}, "label", "Leave it out."),
    Refusal("`neftune_noise_alpha`", (*PAIRS, *QUIET), {"neftune_noise_alpha": 5.0}, "noise", "Leave it out."),
    Refusal("`sync_ref_model`", PAIRS, {"sync_ref_model": True}, "without any setting", "It is so without a setting."),
    Refusal("`precompute_ref_log_probs=False`", PAIRS, {"precompute_ref_log_probs": False}, "Leave it True", "Leave it out."),
    Refusal("`disable_dropout=False`", PAIRS, {"disable_dropout": False}, "Leave it True", "Leave it out."),
    Refusal("`router_aux_loss_coef`", QUIET, {"router_aux_loss_coef": 0.1}, "count thoughts as text", "Leave it out."),
    Refusal("`beta`, `ref_model_*`, `sync_ref_model` of GRPO", SFT, {"beta": 0.1, "sync_ref_model": True}, "start_from", "There is no reference; `start_from` says where a round begins."),
    Refusal("`epsilon`, `delta`, `importance_sampling_level`, …", GRADED, {"epsilon": 0.1, "importance_sampling_level": "sequence"}, "no ratio of policies", "No ratio is clipped."),
    Refusal("`scale_rewards`", GRADED, {"scale_rewards": "none"}, "loss_weighting='reward'", "Rewards select; ReST^EM can weigh by them."),
    Refusal("`num_iterations`", GRADED, {"num_iterations": 2}, "num_train_epochs", "`num_train_epochs`."),
    Refusal("`steps_per_generation`, `generation_batch_size`", GRADED, {"steps_per_generation": 2}, "num_prompts_per_round", "`num_prompts_per_round`."),
    Refusal("`mask_truncated_completions`", GRADED, {"mask_truncated_completions": True}, "never trained on", "Truncated completions are never trained on."),
    # Sampling.
    Refusal("`generation_kwargs` of beam search and others", GRADED, {"generation_kwargs": {"num_beams": 2}}, "doesn't support", "The error lists the keys that work."),
    Refusal("`do_sample` in `generation_kwargs`", GRADED, {"generation_kwargs": {"do_sample": False}}, "Set `temperature`", "`temperature=0.0` is greedy."),
    Refusal("`max_prompt_length`", GRADED, {"max_prompt_length": 2}, "never truncated", "Filter long prompts."),
    Refusal("`vllm_enable_sleep_mode`, `vllm_group_port`", GRADED, {"vllm_enable_sleep_mode": True}, "ends before training", "Leave it out; see [vLLM](vllm.md)."),
    Refusal("`use_vllm`", ("V-STaR", *QUIET), {"use_vllm": True}, "samples|sampled", "Nothing is sampled by an engine."),
    Refusal("`cache_implementation`, `use_transformers_*`", GRADED, {"cache_implementation": "static"}, "sampled by the trainer itself", _GRPO),
    # Training.
    Refusal("layerwise optimizers", ROUNDS, {"optim": "galore_adamw_layerwise", "optim_target_modules": ["q_proj"]}, "outlive a round's optimizer", "An optimizer that updates in its step."),
    Refusal("`bf16_full_eval`, `fp16_full_eval`", ALL, {"bf16_full_eval": True}, "Leave it out", "Leave it out."),
    Refusal("`use_liger_kernel`, `torch_compile`", QUIET, {"use_liger_kernel": True}, "replaces the model's forward", "Leave it out."),
    Refusal("`activation_offloading` on a CPU", ALL, {"activation_offloading": True}, "computes on the CPU", "Leave it out."),
    Refusal('`hub_strategy="checkpoint"`', ROUNDS, {"push_to_hub": True, "hub_strategy": "checkpoint"}, "push_to_hub", '`"end"`, and `push_to_hub()` after `train()`.'),
    Refusal("`metric_for_best_model` of TRL", ROUNDS, {"metric_for_best_model": "eval_reward"}, "There are eval_", "The error lists the metrics."),
)  # fmt: skip


def as_table() -> str:
    """Return the table of docs/drop_in.md: one row per feature and remedy, in the order above."""
    methods: dict[tuple[str, str], list[str]] = {}
    for each in REFUSALS:
        known = methods.setdefault((each.feature, each.remedy), [])
        known += [name for name in each.methods if name not in known]
    rows = ["| What TRL takes | Refused by | Instead |", "|---|---|---|"]
    names = {ALL: "all", ROUNDS: "all but Quiet-STaR"}
    rows += [
        f"| {feature} | {names.get(tuple(who), ', '.join(who))} | {remedy} |"
        for (feature, remedy), who in methods.items()
    ]
    return "\n".join(rows)
