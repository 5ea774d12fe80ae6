"""Does what ends a turn in the chat template end a sampled completion too?

In: the stages of a trainer. Out: a warning, or None. Base models with a chat template that isn't theirs
are the usual case: the template writes `<|im_end|>`, and the tokenizer's EOS is `<|endoftext|>`.
"""

from itertools import takewhile
from typing import Any

from trl_selfplay.rollouts.prompts import PromptRow, message_text

# Two completions with nothing in common: what follows both comes from the template.
_REPLIES = ("yes", "4")


def end_of_turn(play: Any) -> tuple[int, ...] | None:
    """Return the tokens that the chat template writes after a completion.

    Returns:
        None for plain text, and if the template can't render a conversation with its answer.
    """
    row: PromptRow = play.rows[0]
    if isinstance(row.prompt, str):
        return None
    before, begun = row.prompt, ""
    if before[-1]["role"] == "assistant":  # the completion goes on with this turn
        before, begun = before[:-1], message_text(before[-1])
    try:
        first, second = (
            play.formatter.chat_ids(
                [*before, {"role": "assistant", "content": begun + reply}], row, complete=True
            )
            for reply in _REPLIES
        )
    except ValueError:  # no round needs such a rendering
        return None
    common = takewhile(
        lambda pair: pair[0] == pair[1], zip(first[::-1], second[::-1], strict=False)
    )
    return tuple(token for token, _ in common)[::-1]


def warn_of_end(play: Any) -> str | None:
    """Return what is wrong with how turns end, or None.

    Stop strings may end completions instead, so nothing is said where there are some.
    """
    ending = end_of_turn(play)
    if ending is None or play.config.stop_strings or {*ending} & {*play.eos_token_ids}:
        return None
    tokenizer = play.formatter.tokenizer
    eos = ", ".join(repr(tokenizer.decode([token])) for token in play.eos_token_ids)
    if not ending:
        return (
            f"the chat template writes nothing after the assistant's turn, and sampling ends at {eos}. "
            "If the model doesn't stop, use the chat template that it was trained with."
        )
    token = tokenizer.decode([ending[0]])
    return (
        f"the chat template ends the assistant's turn with {token!r}, and sampling ends at {eos}: a "
        "model that was trained with this template goes on to max_completion_length. Set "
        f"`tokenizer.eos_token = {token!r}` and pass the tokenizer as `processing_class`."
    )
