"""Find text that a tokenizer reads as control tokens.

In: a tokenizer, and texts that users wrote. Out: the first special token that stands in them.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from trl_selfplay.generation.control_tokens import special_tokens
from trl_selfplay.rollouts.prompts import texts_of

logger = logging.getLogger(__name__)


def control_token_finder(tokenizer: Any) -> Callable[[Any], str | None]:
    """Return a function that finds the first special token in a prompt, a solution or a list of these.

    An EOS at the end of a text is legitimate; one inside is not.
    """
    tokens = special_tokens(tokenizer)
    # Without special tokens nothing is found.
    either = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"
    pattern, eos = re.compile(either), str(tokenizer.eos_token)

    def find(own: Any) -> str | None:
        texts = (text.rstrip().removesuffix(eos) for text in texts_of(own))
        found = next((match for text in texts if (match := pattern.search(text))), None)
        return None if found is None else found[0]

    return find


def warn_of_examples(examples: Sequence[Any], find: Callable[[Any], str | None]) -> None:
    """Warn of the few-shot examples in whose texts `find` finds a special token."""
    for index, texts in enumerate(examples):
        if token := find(texts):
            logger.warning(
                "few_shot_examples[%d] has the special token %r in its text, which the model reads as a "
                "control token: remove it, or set sanitize_control_tokens=True to read it as text.",
                index,
                token,
            )
