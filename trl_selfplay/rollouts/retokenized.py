"""Rollouts in the tokens of another model.

In: rollouts of a policy, and the formatter of a model with another tokenizer. Out: the same rollouts with that
model's tokens and masks, or the reason why one can't be had without guessing where the policy's own text ends.

Text is divided where the policy's mask divides its tokens, and each part is tokenized by itself. Messages of a
trajectory with tools go through the model's own chat template, a message at a time: what is rendered before
must stay as it is. Control tokens of that model in such text are read as plain text.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_selfplay.generation.control_tokens import continuation_ids, plain_ids
from trl_selfplay.rollouts.prompts import PromptRow, check_embedded
from trl_selfplay.rollouts.readable import decode_without_special, find_tag_ids
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.rendering import PromptFormatter

# Tokens of the prompt that are decoded before a completion: some decoders drop a text's first space.
_BEFORE = 8


class _InexactError(ValueError):
    """A rollout has no exact form in the other model's tokens; the message is a cause to be counted."""


def retokenize(
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    formatter: PromptFormatter,
    eos_token_ids: Sequence[int],
    rows: Mapping[str, PromptRow],
) -> tuple[list[Rollout], Counter[str]]:
    """Return rollouts with the completions' tokens, and masks, of another model.

    Args:
        rollouts: With the policy's tokens.
        tokenizer: The policy's.
        formatter: The other model's.
        eos_token_ids: What ends its completions; the first is added after a completion that ended with the
            policy's EOS.
        rows: The prompts of trajectories whose messages the other model's chat template is to render, by id;
            of others, the text is taken.

    Returns:
        The rollouts, and how many are missing for each cause.
    """
    formatter = copy(formatter)
    formatter.sanitize_control_tokens = True
    tag_ids = find_tag_ids(tokenizer)
    found: list[Rollout] = []
    missing: Counter[str] = Counter()
    for rollout in rollouts:
        try:
            if rollout.messages and rollout.prompt_id in rows:
                row = rows[rollout.prompt_id]
                parts = list(_of_messages(rollout, row, formatter, eos_token_ids))
                rollout = replace(rollout, finish="eos")
            else:
                parts = list(_of_text(rollout, tokenizer, formatter, tag_ids))
                if rollout.finish == "eos":
                    parts.append(([eos_token_ids[0]], True))
            found.append(_with_parts(rollout, parts, formatter))
        except _InexactError as cause:
            missing[str(cause)] += 1
    return found, missing


def _with_parts(
    rollout: Rollout, parts: Sequence[tuple[list[int], bool]], formatter: PromptFormatter
) -> Rollout:
    tokenizer = formatter.tokenizer
    ids = tuple(token for part, _ in parts for token in part)
    mask = tuple(is_own for part, is_own in parts for _ in part)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise _InexactError("text that the student's tokenizer doesn't know")
    check_embedded(list(ids), tokenizer, formatter.num_embeddings, repr(rollout.completion[:200]))
    return replace(
        rollout, completion_ids=ids, completion_mask=None if all(mask) else mask, logprob=None
    )


def _of_text(
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    formatter: PromptFormatter,
    tag_ids: Collection[int],
) -> Iterator[tuple[list[int], bool]]:
    """Yield tokens, and whether the policy wrote them, for each run of tokens with one author."""

    def decode(count: int) -> str:
        ids = [*rollout.prompt_ids[-_BEFORE:], *rollout.completion_ids[:count]]
        return decode_without_special(tokenizer, ids, tag_ids)

    mask = rollout.completion_mask or (True,) * len(rollout.completion_ids)
    end, before = 0, decode(0)
    for is_own, run in groupby(mask):
        end += len(list(run))
        text = decode(end)
        if not text.startswith(before):
            raise _InexactError("text that can't be divided where the policy's part ends")
        encode = partial(plain_ids, formatter.tokenizer)
        yield continuation_ids(encode, text[len(before) :]), is_own
        before = text


def _of_messages(
    rollout: Rollout, row: PromptRow, formatter: PromptFormatter, eos_token_ids: Sequence[int]
) -> Iterator[tuple[list[int], bool]]:
    """Yield the tokens of each turn and of the results before the next one, and whether it is a turn."""
    messages: list[Any] = [dict(message) for message in rollout.messages]
    so_far: list[Any] = list(row.prompt)
    done = list(formatter.token_ids(row, few_shot=False))
    for number, message in enumerate(messages):
        so_far.append(message)
        is_turn = message["role"] == "assistant"
        is_last = number == len(messages) - 1
        if not (is_turn or is_last) and messages[number + 1]["role"] != "assistant":
            continue  # results are rendered together
        rendered = formatter.chat_ids(so_far, row, complete=is_turn)
        if rendered[: len(done)] != done:
            raise _InexactError(
                "turns that the student's chat template renders otherwise once others follow"
            )
        part = rendered[len(done) :]
        if is_turn:
            ends = [place for place, token in enumerate(part) if token in eos_token_ids]
            if ends:
                part = part[: ends[0] + 1]
            elif is_last:
                part = [*part, eos_token_ids[0]]
        done += part
        yield part, is_turn
