"""Turn rows of SFT and preference datasets into prompts and the tokens of the data's completions.

In: a dataset with `prompt` and `completion`, `messages`, or `prompt` and `chosen`. Out: `PromptRow`s
whose `solution` is the data's completion, and `ChosenTokens`: the prompt as sampled from, and the
completion as if it had been sampled, with EOS at the end.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trl import extract_prompt

from trl_selfplay.rewards.functions import columns_read
from trl_selfplay.rollouts.prompts import (
    Prompt,
    PromptRow,
    as_plain_rows,
    check_dataset,
    check_message,
    check_nesting,
    collect_rows,
    message_text,
)
from trl_selfplay.rollouts.rendering import PromptFormatter

logger = logging.getLogger(__name__)

# What a row passes to the chat template besides its messages.
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Columns that hold the prompt (None: all messages but the last) and the data's completion, in the
# order in which they are looked for.
_FORMS = (("prompt", "completion"), ("prompt", "chosen"), (None, "messages"), (None, "chosen"))


@dataclass(frozen=True, slots=True)
class ChosenTokens:
    """The tokens of a prompt, the same in sampling and training, and of the data's completion."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]


def load_chosen_rows(dataset: Any, name: str, reward_funcs: Any = None) -> list[PromptRow]:
    """Check a dataset row by row; return prompts with the data's completion as `solution`.

    The completion is text, or a list with one assistant message for chat prompts. A row's `tools`
    and `chat_template_kwargs` go with it. Rows with equal prompt and completion are merged, unless
    they differ in what reward functions read; those with `label=False` hold completions to avoid
    and are left out.

    Args:
        dataset: A `datasets.Dataset` with `prompt` and `completion`, `messages` (the last turn is
            the completion), or `prompt` and `chosen`. A `rejected` column is not used.
        name: Name of the dataset for errors, such as "train_dataset".
        reward_funcs: Reward functions for completions of these prompts, as a trainer takes them.

    Raises:
        TypeError: Not a `Dataset`, or a row of another kind.
        ValueError: No completions, a conversation that doesn't end with an assistant turn, an
            empty completion, or an empty dataset.
    """
    check_dataset(dataset, name, "`prompt` and `completion`, `messages`, or `prompt` and `chosen`")
    columns = set(dataset.column_names)
    form = next((f for f in _FORMS if {c for c in f if c is not None} <= columns), None)
    if form is None:
        raise ValueError(
            f"`{name}` has no completions to learn from; its columns are {dataset.column_names}. "
            "Each prompt needs the data's completion: the columns `prompt` and "
            "`completion`, `messages` that end with an assistant turn, or `prompt` and `chosen`."
        )
    if "rejected" in columns:
        logger.warning(
            "%s: the column `rejected` is not used; only the data's own completions are.",
            name,
        )
    read = columns_read(reward_funcs, columns - {*form, "rejected"})
    records, extra = [], {}
    for index, record in enumerate(as_plain_rows(dataset)):
        if form[1] == "completion" and record.get("label") is False:
            continue
        where = f"`{name}` row {index}"
        check_nesting(record, where)
        prompt, completion = _split(record, form, where)
        kept = {c: record[c] for c in _TEMPLATE_COLUMNS if c in columns}
        own = {"prompt": prompt, "solution": completion, **kept}
        records.append((index, own, {c: record[c] for c in read}))
        extra[index] = {c: v for c, v in record.items() if c not in (*form, "rejected")}
    if dropped := len(dataset) - len(records):
        what = f"{dropped} of {len(dataset)} rows of `{name}` have label=False"
        if not records:
            raise ValueError(f"{what}: there is no completion to learn from.")
        logger.warning("%s: completions to avoid, which are left out.", what)
    rows = collect_rows(records, name)
    return [replace(row, columns=_columns_of(row, extra[row.row_index])) for row in rows]


def _columns_of(row: PromptRow, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return what reward functions get of a row; without a `solution` it is the data's completion."""
    text = row.solution if isinstance(row.solution, str) else message_text(row.solution[0])
    return {"solution": text, **extra}


def _split(
    record: Mapping[str, Any], form: tuple[str | None, str], where: str
) -> tuple[Prompt, str | list[dict[str, Any]]]:
    """Return a row's prompt and completion."""
    prompt_column, column = form
    completion: Any = record[column]
    prompt: Any = None if prompt_column is None else record[prompt_column]
    if isinstance(completion, list):
        # Some preference datasets repeat the prompt as the first messages of `chosen`.
        messages = completion if not isinstance(prompt, list) else [*prompt, *completion]
        if isinstance(prompt, list) and completion[: len(prompt)] == prompt:
            messages = completion
        last = messages[-1] if messages else {"role": "no"}
        if not isinstance(last, Mapping) or "role" not in last:
            raise TypeError(
                f"{where}: the last of the messages is {last!r:.200}; expected "
                '{"role": "assistant", "content": "…"}.'
            )
        if last["role"] != "assistant":
            role = last["role"]
            raise ValueError(
                f"{where}: the conversation ends with a turn of the role {role!r}, but its last "
                "turn must be the assistant's: that is the completion to learn from. Remove the "
                "turns after the last assistant turn, or drop such rows."
            )
        prompt, completion = messages[:-1], messages[-1:]
        if not prompt:
            raise ValueError(
                f"{where}: there is no prompt before the assistant's turn; give the conversation "
                "from its first user turn on, or a `prompt` of chat messages."
            )
        check_message(last, f"{where}, the completion")
        if last.get("tool_calls"):
            return prompt, completion
        text = message_text(last)
    else:
        text = completion
        if prompt_column is None:
            if not isinstance(text, str) or not isinstance(record.get("rejected"), str):
                raise TypeError(
                    f"{where}: `{column}` is {completion!r:.200}, and there is no `prompt`. Add the "
                    "column `prompt`, or give messages, of which the last one is the completion."
                )
            # As DPOTrainer: what both completions begin with.
            both: Any = extract_prompt({"chosen": text, "rejected": record["rejected"]})
            prompt, text = both["prompt"], both["chosen"]
            completion = text
            if not prompt.strip():
                raise ValueError(
                    f"{where}: there is no `prompt`, and `chosen` and `rejected` don't begin with the "
                    "same text, which would be it. Add the column `prompt`."
                )
        if not isinstance(prompt, str):
            raise TypeError(
                f"{where}: `{column}` is {completion!r:.200} and `{prompt_column}` is "
                f"{prompt!r:.200}; give both as text or both as lists of messages."
            )
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{where}: the completion is {text!r}. The data's completions are learnt from: drop "
            "rows that have none."
        )
    return prompt, completion


def tokenize_chosen(
    formatter: PromptFormatter,
    rows: Sequence[PromptRow],
    eos_token_ids: Sequence[int],
    eos_token_id: int,
) -> dict[str, ChosenTokens]:
    """Return the tokens of each row by `prompt_id`, the completion as the policy would sample it.

    Prompt and completion are tokenized together if that leaves the prompt's tokens as they are. If
    tokens would merge across the boundary, the completion of a plain-text row is tokenized by
    itself: the policy, which samples after the prompt's last token, can't merge them either. The
    completion ends with the first EOS that the chat template writes after it, or with
    `eos_token_id`. What a template adds after EOS, such as a line break, is left out, since no
    sampled completion has it.

    Args:
        formatter: Renders the prompts.
        rows: From `load_chosen_rows`.
        eos_token_ids: Tokens that end a sampled completion.
        eos_token_id: The one to add if the text has none.

    Raises:
        ValueError: The chat template renders the prompt differently when a completion follows.
    """
    tokens = {}
    for row in rows:
        prompt_ids = formatter.token_ids(row, few_shot=False)
        if row.is_conversational:
            completion = _chat_completion(formatter, row, prompt_ids)
        else:
            completion = _text_completion(formatter, row, prompt_ids)
        end = _find_end(formatter.tokenizer, completion, eos_token_ids)
        chosen = [*completion, eos_token_id] if end is None else completion[: end + 1]
        tokens[row.prompt_id] = ChosenTokens(prompt_ids, tuple(chosen))
    return tokens


def _find_end(tokenizer: Any, completion: list[int], eos_token_ids: Sequence[int]) -> int | None:
    """Return the index of the first EOS after the text, or None; a template may write several."""
    ends = [i for i, token in enumerate(completion) if token in eos_token_ids]
    if not ends:
        return None
    end = ends.pop()
    while ends and not tokenizer.decode(completion[ends[-1] + 1 : end]).strip():
        end = ends.pop()
    return end


def _text_completion(
    formatter: PromptFormatter, row: PromptRow, prompt_ids: tuple[int, ...]
) -> list[int]:
    together = formatter.text_ids(formatter.with_tools(f"{row.prompt}{row.solution}", row))
    if tuple(together[: len(prompt_ids)]) == prompt_ids:
        return together[len(prompt_ids) :]
    return formatter.continuation_ids(row.solution)


def _chat_completion(
    formatter: PromptFormatter, row: PromptRow, prompt_ids: tuple[int, ...]
) -> list[int]:
    tokenizer: Any = formatter.tokenizer
    together = formatter.chat_ids([*row.prompt, *row.solution], row, complete=True)
    if tuple(together[: len(prompt_ids)]) != prompt_ids:
        raise ValueError(
            f"{row.where}: the chat template renders the prompt as "
            f"{tokenizer.decode(list(prompt_ids))[-200:]!r} before sampling, but as "
            f"{tokenizer.decode(together)[:400]!r} before the data's completion. Samples would "
            "answer another prompt than the one trained on: use a template that renders both alike "
            "(`chat_template_kwargs` may switch what differs)."
        )
    return together[len(prompt_ids) :]


def drop_long_rows(
    rows: Sequence[PromptRow],
    tokens: Mapping[str, ChosenTokens],
    max_length: int | None,
    max_completion_length: int,
    name: str,
) -> list[PromptRow]:
    """Return the rows that fit in `max_length`, with one warning on those that don't.

    Nothing is ever truncated: a truncated completion would teach the model to stop at `max_length`.

    Raises:
        ValueError: No row fits.
    """
    lengths = {i: len(t.prompt_ids) + len(t.chosen_ids) for i, t in tokens.items()}
    kept = [r for r in rows if max_length is None or lengths[r.prompt_id] <= max_length]
    dropped = len(rows) - len(kept)
    longest = max((row for row in rows), key=lambda row: lengths[row.prompt_id])
    what = (
        f"`{name}`: {dropped} of {len(rows)} rows are longer than max_length={max_length} tokens "
        f"with prompt and completion (the longest, row {longest.row_index}, has "
        f"{lengths[longest.prompt_id]})"
    )
    if not kept:
        raise ValueError(f"{what}, so none is left. Raise max_length or shorten the completions.")
    if dropped:
        logger.warning(
            "%s; they are left out, since a cut completion would give itself away. Raise "
            "max_length to keep them.",
            what,
        )
    beyond = sum(len(tokens[r.prompt_id].chosen_ids) > max_completion_length for r in kept)
    if beyond:
        logger.warning(
            "%s: %d of %d completions of the data are longer than max_completion_length=%d, which "
            "the opponent can't exceed: length alone would tell the two apart. Raise "
            "max_completion_length, or drop such rows.",
            name,
            beyond,
            len(kept),
            max_completion_length,
        )
    return kept
