"""The readable form of a completion: its text, and the messages that reward functions get.

In: tokens of a completion, or a rollout. Out: what the policy wrote as text, or the turns as chat messages.
"""

import re
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

from trl_selfplay.generation.sampler import SampledCompletion
from trl_selfplay.generation.valid_text import valid_text
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.tools.chat import parse_message


def decode(tokenizer: Any, ids: Sequence[int], **kwargs: Any) -> str:
    """Return tokens as text that can be written as UTF-8."""
    text: str = tokenizer.decode(list(ids), **kwargs)
    return valid_text(text)  # a tokenizer in Python may leave half a surrogate pair


def completion_text(tokenizer: Any, sampled: SampledCompletion, tag_ids: Collection[int]) -> str:
    """Return what the policy wrote as text without special tokens, except tags such as `<answer>`.

    What tools and environments gave between its turns is left out: graders, votes, leak checks and normal
    forms read the policy's own words. Each turn begins on a line of its own.

    Args:
        tokenizer: Decodes.
        sampled: The completion.
        tag_ids: Special tokens that are text: see `find_tag_ids`.
    """
    ids, mask = sampled.completion_ids, sampled.completion_mask
    if sampled.finish == "eos":
        ids = ids[:-1]
    if mask is None:
        return decode_without_special(tokenizer, ids, tag_ids)
    marked = zip(mask, ids, strict=False)
    turns = [[i for _, i in run] for own, run in groupby(marked, lambda pair: pair[0]) if own]
    text = ""
    for turn in turns:
        said = decode_without_special(tokenizer, turn, tag_ids)
        text += f"\n{said}" if text and not text.endswith("\n") else said
    return text


def decode_without_special(tokenizer: Any, ids: Sequence[int], tag_ids: Collection[int]) -> str:
    """Return tokens as text without special tokens, except tags."""
    kept = {i for i in ids if i in tag_ids}
    if not kept:
        return decode(tokenizer, ids, skip_special_tokens=True)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - kept
    return decode(tokenizer, [i for i in ids if i not in special])


def find_tag_ids(tokenizer: Any) -> frozenset[int]:
    """Return the special tokens that form pairs of tags, such as `<answer>` and `</answer>`.

    Reward functions read them, and decoding without special tokens removes them.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token): i for i, token in added.items() if token.special}
    tags = [tag for tag in special if re.fullmatch(r"<[A-Za-z][\w-]+>", tag)]
    pairs = [(tag, f"</{tag[1:]}") for tag in tags if f"</{tag[1:]}" in special]
    return frozenset(special[tag] for pair in pairs for tag in pair)


def completion_messages(tokenizer: Any, rollout: Rollout) -> list[dict[str, Any]]:
    """Return a completion as chat messages, in the form in which GRPOTrainer hands them to reward functions.

    A trajectory has its assistant turns, with their calls, and the results of tools in between. Any other
    completion is one assistant message, which the tokenizer's `response_template`, where it has one, divides
    into thoughts and content. An agent's answer, which follows no prompt, isn't divided.
    """
    if rollout.messages:
        return list(map(dict, rollout.messages))
    parsed = None
    if rollout.prompt_ids and getattr(tokenizer, "response_template", None) is not None:
        parsed = parse_message(tokenizer, rollout.completion_ids, rollout.prompt_ids)
    return [parsed or {"role": "assistant", "content": rollout.completion}]
