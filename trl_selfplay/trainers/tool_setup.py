"""Set up tools for a trainer: what may be called, in which form, and how trajectories are sampled.

In: the constructor's `tools` and `environment_factory`, the config, the tokenizer. Out: a toolbox, the form in
which prompts tell of it, and `Trajectories`; or an error, before anything is loaded or sampled.
"""

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import trl
from transformers import PreTrainedTokenizerBase

from trl_selfplay.rewards.environment_reward import EnvironmentReward
from trl_selfplay.rewards.functions import without_partial
from trl_selfplay.rollouts.rendering import FewShotExample
from trl_selfplay.tools.arguments import json_types
from trl_selfplay.tools.chat import ChatDialogue
from trl_selfplay.tools.environments import Environments
from trl_selfplay.tools.example_calls import find_failing_call, find_missing_turn
from trl_selfplay.tools.offer import Toolbox, ToolForm, name_of_schema
from trl_selfplay.tools.react import ReActDialogue
from trl_selfplay.tools.record import Dialogue, ToolResult
from trl_selfplay.tools.tool_set import ToolSet
from trl_selfplay.tools.trajectories import Trajectories

logger = logging.getLogger(__name__)


def read_toolbox(args: Any, tools: Any, environment_factory: Any) -> Any:
    """Return what completions may call; None if a script gives neither tools nor environments.

    Args:
        args: The trainer's config, with `tool_deadline`.
        tools: As GRPOTrainer takes them.
        environment_factory: As GRPOTrainer takes it: a callable, or a dict of them by the value of the
            column `environment`.

    Raises:
        TypeError, ValueError: For tools and environments that can't be called.
    """
    if environment_factory is not None:
        toolbox: Any = Environments(environment_factory, tools or (), args.tool_deadline)
    elif tools:
        toolbox = ToolSet(tools, args.tool_deadline)
    else:
        return None
    if toolbox.nondeterministic:
        logger.warning(
            "%s: declared as not deterministic. A call may give another result when it is made again: the "
            "results on disk are those that the policy read.",
            ", ".join(toolbox.nondeterministic),
        )
    functions = [schema["function"] for schema in toolbox.schemas]
    if lists := [f["name"] for f in functions if "array" in json_types(f.get("return"))]:
        logger.warning(
            "%s: returns a list. The policy and reward functions get it as text, `str(list)`, where GRPOTrainer hands "
            "reward functions the list itself; one that tests for a list has to read the text.",
            ", ".join(lists),
        )
    return toolbox


def environment_rewards(toolbox: Toolbox | None) -> list[EnvironmentReward]:
    """Return a reward function for each class of environment that has `get_reward`."""
    rewarding = {} if toolbox is None else toolbox.rewarding
    return [EnvironmentReward(name, of) for name, of in rewarding.items()]


def refuse_environments_parameter(reward_funcs: Sequence[Any]) -> None:
    """Raise ValueError for a reward function that asks for GRPOTrainer's live environments."""
    for function in filter(callable, reward_funcs):
        try:
            named = inspect.signature(without_partial(function)).parameters
        except (TypeError, ValueError):  # some built-ins have no signature
            continue
        if "environments" in named:
            raise ValueError(
                f"reward function {getattr(function, '__name__', function)!r} has a parameter "
                "`environments`. Completions are graded from disk, where no environment is left: give the "
                "environment a method `get_reward`, or read the messages in `completions`."
            )


def choose_form(
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    toolbox: Toolbox,
    conversational: bool,
    eos_token_ids: Collection[int],
) -> ToolForm:
    """Return how prompts tell of tools: through the chat template if it knows tools, else in words.

    The tokenizer gets TRL's `response_template` for its chat template if it has none. Where a template
    renders earlier turns otherwise once results follow, TRL's training template takes its place.

    Args:
        args: The trainer's config, with `tool_format`.
        tokenizer: The trainer's.
        toolbox: The tools.
        conversational: Whether prompts are chat messages.
        eos_token_ids: Tokens that end a turn.

    Raises:
        ValueError: `tool_format="chat"` can't be had, or calls in the template's form can't be read.
    """
    knows = conversational and knows_tools(tokenizer, toolbox.schemas)
    if args.tool_format == "chat" and not knows:
        why = (
            f"the chat template of {tokenizer.name_or_path!r} doesn't render tools, their calls and results"
            if conversational
            else "the prompts are plain text"
        )
        raise ValueError(
            f"tool_format='chat', but {why}. Leave it out: tools are then called in plain text (ReAct). Or "
            "give chat messages and a tokenizer whose chat template knows tools."
        )
    if args.tool_format == "react" or not knows:
        if conversational and args.tool_format is None and tokenizer.chat_template:
            logger.warning(
                "The chat template doesn't know tools: they are described in the prompt and called in plain "
                "text (ReAct). Set tool_format='react' to say so."
            )
        return ToolForm(toolbox, in_words=True)
    _make_calls_readable(tokenizer)
    form = ToolForm(toolbox, in_words=False)
    if _tells_results(tokenizer, form, eos_token_ids, args.chat_template_kwargs):
        return form
    try:
        form = replace(form, chat_template=trl.get_training_chat_template(tokenizer))
    except ValueError as error:
        raise ValueError(
            "the chat template renders a turn with calls otherwise once results follow, and TRL has no "
            "training template in its place. Set a `tokenizer.chat_template` that keeps earlier turns as they "
            "are, or tool_format='react'."
        ) from error
    logger.warning(
        "The chat template renders a turn with calls otherwise once results follow. TRL's training template "
        "takes its place in this run (trl.get_training_chat_template)."
    )
    return form


def check_examples(examples: Sequence[FewShotExample], form: ToolForm) -> None:
    """Raise ValueError for a few-shot example whose calls would fail in this run, or that lacks a turn."""
    for index, example in enumerate(examples):
        wrong = find_failing_call(example.completion, form.toolbox.schemas, form.in_words)
        if wrong is not None:
            raise ValueError(
                f"few_shot_examples[{index}]: {wrong}. Correct the example, or give the run such a tool. A call "
                'that is meant to fail has a result that begins with "Error: ".'
            )
        missing = find_missing_turn(example.completion, form.in_words)
        if missing is not None:
            raise ValueError(
                f"few_shot_examples[{index}]: {missing}. Show each call with its result, and the answer at the end."
            )


def knows_tools(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Any]) -> bool:
    """Return whether a chat template renders tools, calls of them, and their results."""
    if not trl.supports_tool_calling(tokenizer):
        return False
    messages = [{"role": "user", "content": "?"}]
    try:
        bare, shown = (
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            for tools in (None, list(schemas))
        )
    except Exception:  # whatever a template raises
        return False
    return bare != shown


def _make_calls_readable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer TRL's response template for its chat template, unless it has one."""
    if any(getattr(tokenizer, f"response_{kind}", None) for kind in ("template", "schema")):
        return
    try:
        trl.add_response_schema(tokenizer)
    except ValueError as error:
        raise ValueError(
            "the chat template knows tools, but how a model writes calls in its form isn't known to TRL. Set "
            "`tokenizer.response_template` (transformers' response parsing), or tool_format='react'."
        ) from error


def _tells_results(
    tokenizer: PreTrainedTokenizerBase,
    form: ToolForm,
    eos_token_ids: Collection[int],
    kwargs: Mapping[str, Any] | None,
) -> bool:
    """Return whether the tokens of a result can be told from the template's rendering."""
    dialogue = ChatDialogue(tokenizer, eos_token_ids, form.chat_template, kwargs)
    name = name_of_schema(form.toolbox.schemas[0])
    try:
        dialogue.observation_ids([next(iter(eos_token_ids))], [ToolResult(name, "?")])
    except ValueError:
        return False
    return True


def build_trajectories(
    args: Any,
    form: ToolForm,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Collection[int],
    context_length: int | None,
) -> Trajectories:
    """Return how completions with tools are sampled.

    Args:
        args: The trainer's config.
        form: How prompts tell of the tools.
        tokenizer: The trainer's.
        eos_token_ids: Tokens that end a turn.
        context_length: Most tokens of a prompt with its completion, or None.
    """
    toolbox: Any = form.toolbox
    dialogue: Dialogue
    if form.in_words:
        dialogue = ReActDialogue(tokenizer)
    else:
        dialogue = ChatDialogue(
            tokenizer, eos_token_ids, form.chat_template, args.chat_template_kwargs
        )
    return Trajectories(toolbox, dialogue, args.max_tool_calling_iterations, context_length)
