"""Which tokens control a model, and the tokens of text that must not have any.

In: a tokenizer, and text from outside, such as a tool's result. Out: token ids in which no text that spells out a
control token counts as one.
"""

from collections.abc import Callable, Iterable
from typing import Any


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the texts that a tokenizer reads as special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def control_tokens(tokenizer: Any) -> set[str]:
    """Return the special tokens, and other added ones that the chat template writes, such as <tool_call>."""
    template = str(tokenizer.chat_template or "")
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    written = {text for text in added if text.strip() and text in template}
    return (
        special_tokens(tokenizer)
        | written
        | {*(getattr(tokenizer, "chat_control_tokens", None) or ())}
    )


def split_control_tokens(text: str, tokenizer: Any) -> str:
    """Put a space into each special token that a text spells out, so that it is read as text."""
    return split_tokens(text, special_tokens(tokenizer))


def split_tokens(text: str, tokens: Iterable[str]) -> str:
    """Put a space into each of these tokens that a text spells out."""
    for token in sorted(tokens, key=len, reverse=True):
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of text, none of which is a control token.

    A control token that the tokenizer can't read as text gets a space.
    """
    tokens = control_tokens(tokenizer)
    control = {*tokenizer.convert_tokens_to_ids([*tokens])} - {tokenizer.unk_token_id}
    for each in (text, split_tokens(text, tokens)):
        ids = tokenizer(each, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not control & {*ids}:
            break
    return list(ids)


def continuation_ids(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Return the tokens of text that follows other text, as a model would sample them.

    Args:
        encode: Returns a text's tokens, without start tokens.
        text: The text.
    """
    # After a line break, since SentencePiece puts a space before the start of a text.
    before, both = encode("\n"), encode(f"\n{text}")
    return both[len(before) :] if both[: len(before)] == before else encode(text)
