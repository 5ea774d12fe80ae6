"""Would a completion like the few-shot examples fit into `max_completion_length`?

In: the stages of a trainer. Out: a warning, or None. Results of tools count towards the limit, and those of a
search soon take more than a usual limit has.
"""

from typing import Any

from trl_selfplay.generation.sampler import build_sampling_options
from trl_selfplay.rollouts.prompts import message_text


def warn_of_long_examples(play: Any) -> str | None:
    """Return which few-shot examples are longer than any completion of the run may be, or None.

    Of messages, only their contents are counted, so that the number is a lower bound.
    """
    if not play.shows_examples(0):
        return None
    most = build_sampling_options(play.config, ()).max_completion_length
    lengths = []
    for example in play.formatter.few_shot_examples:
        turns = example.completion
        texts = [turns] if isinstance(turns, str) else map(message_text, turns)
        lengths.append(sum(len(play.formatter.continuation_ids(text)) for text in texts if text))
    too_long = [length for length in lengths if length > most]
    if not too_long:
        return None
    results = ", results of tools included" if play.toolbox is not None else ""
    return (
        f"{len(too_long)} of {len(lengths)} few_shot_examples have longer completions than "
        f"max_completion_length={most} allows, the longest {max(too_long)} tokens{results}. Completions like them are "
        "cut, and cut ones are never trained on. Raise it, or shorten what the examples show."
    )
