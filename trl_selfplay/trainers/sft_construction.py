"""What the trainers on SFTTrainer take and make in the same way: arguments, datasets, parts.

In: the constructor's arguments, by place or by name as SFTTrainer takes them. Out: an error that
says what to do, or what the parent gets and what the rounds need.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from trl import SFTTrainer

from trl_selfplay.rollouts.prompts import PromptRow, load_heldout_sets, load_prompt_rows
from trl_selfplay.rollouts.rendering import FewShotExample, load_few_shot_examples
from trl_selfplay.rounds.run import Run
from trl_selfplay.trainers.construction import (
    build_run,
    check_arguments,
    check_rewards,
    load_processing_class,
    placeholder_dataset,
    read_config,
)
from trl_selfplay.trainers.ported_scripts import refuse_foreign_arguments


class SFTArguments(TypedDict, total=False):
    """SFTTrainer's parameters after `model` and `args`, in its order."""

    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    compute_loss_func: Callable[..., Any] | None
    compute_metrics: Callable[..., Any] | None
    callbacks: list[Any] | None
    optimizers: tuple[Any, Any]
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None
    preprocess_logits_for_metrics: Callable[..., Any] | None
    quantization_config: Any
    peft_config: Any
    formatting_func: Callable[..., Any] | None


# What the rounds make themselves, or can't use (refused if given).
_NOT_FOR_THE_PARENT = (
    "compute_metrics",
    "optimizers",
    "preprocess_logits_for_metrics",
    "formatting_func",
)


@dataclass(frozen=True, slots=True)
class SFTParts:
    """What a trainer is built from.

    Attributes:
        args: The configuration.
        run: The state of a run that has not begun.
        rows: Training prompts.
        heldout: Held-out prompts by the name of their set.
        examples: Few-shot examples.
        eval_dataset: As the user gave it.
        for_parent: What SFTTrainer is built with, by name.
    """

    args: Any
    run: Run
    rows: list[PromptRow]
    heldout: dict[str, list[PromptRow]]
    examples: tuple[FewShotExample, ...]
    eval_dataset: Any
    for_parent: dict[str, Any]


def load_sft_parts(
    config_class: Any,
    method: str,
    model: Any,
    args: Any,
    positional: Sequence[Any],
    named: Mapping[str, Any],
    reward_funcs: Any,
    few_shot_examples: Sequence[Mapping[str, Any]] | None,
    eval_reward_funcs: Any = None,
) -> SFTParts:
    """Check a constructor's arguments and read its datasets, before a model is loaded.

    Args:
        config_class: The trainer's own configuration.
        method: Its name, for the default output directory.
        model: As the constructors below take it, like the rest.
        args: Likewise; None takes the defaults.
        positional: SFTTrainer's further arguments by place.
        named: And by name.
        reward_funcs: Of the trainer.
        few_shot_examples: Likewise.
        eval_reward_funcs: Grade held-out completions in place of `reward_funcs`.

    Raises:
        ValueError, TypeError: For arguments or rows that can't work.
    """
    refuse_foreign_arguments(f"{method}Trainer", named, SFTTrainer)
    given = inspect.signature(SFTTrainer).bind(model, None, *positional, **named).arguments
    args = read_config(args, config_class, model, method)
    unused = {name: given.get(name) for name in _NOT_FOR_THE_PARENT}
    peft_config = given.get("peft_config")
    check_rewards(args, reward_funcs, few_shot_examples)
    check_arguments(
        args,
        model=model,
        peft_config=peft_config,
        **unused,
    )
    hints = "rationalize=True, which shows the solution as a hint (set it to False otherwise),"
    rationalizes = getattr(args, "rationalize", False)
    rows = load_prompt_rows(
        given.get("train_dataset"),
        "train_dataset",
        needs_solution=hints if rationalizes else None,
        reward_funcs=reward_funcs,
    )
    graders = reward_funcs if eval_reward_funcs is None else eval_reward_funcs
    heldout = load_heldout_sets(given.get("eval_dataset"), rows, reward_funcs=graders)
    tokenizer = load_processing_class(model, given.get("processing_class"), args)
    placeholder = placeholder_dataset(tokenizer)
    kept = {name: value for name, value in given.items() if name not in _NOT_FOR_THE_PARENT}
    return SFTParts(
        args=args,
        run=build_run(args, model, peft_config, list(heldout)),
        rows=rows,
        heldout=heldout,
        examples=load_few_shot_examples(
            few_shot_examples, rows[0].is_conversational, needs_solution=rationalizes
        ),
        eval_dataset=given.get("eval_dataset"),
        for_parent={
            **kept,
            "args": args,
            "processing_class": tokenizer,
            "train_dataset": placeholder,
            "eval_dataset": placeholder if heldout else None,
        },
    )


def show_parent_parameters(init: Callable[..., None]) -> Callable[..., None]:
    """Let `help` and `inspect.signature` show SFTTrainer's parameters by name in a constructor."""
    own = inspect.signature(init).parameters.values()
    first = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword_only = [p for p in own if p.kind is p.KEYWORD_ONLY]
    parents = inspect.signature(SFTTrainer).parameters.values()
    inherited = [p for p in parents if p.name not in {q.name for q in first}]
    signature = inspect.Signature([*first, *inherited, *keyword_only])
    init.__signature__ = signature  # type: ignore[attr-defined]
    return init
