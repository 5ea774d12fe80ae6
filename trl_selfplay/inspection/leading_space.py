"""Whether a completion's first token begins with a space that its text lacks.

In: the folder of a run, with its tokenizer. Out: for each rollout the space, or nothing. Decoders of the
SentencePiece kind, as Llama 2's, drop the space at the beginning of what they decode, also where a completion
goes on after a prompt.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.record import Rollout

logger = logging.getLogger(__name__)


def leading_spaces(run: RunFolder) -> Callable[[Rollout], str]:
    """Return a function that returns what decoding dropped before a completion: " " or "".

    The tokenizer is that of the final model, or else of the newest round, and is loaded at the first call.
    Without one, nothing counts as dropped.
    """

    @cache
    def tokenizer() -> Any:
        folders = (run.output_dir, *sorted(run.root.glob("round-*/model"), reverse=True))
        for folder in folders:
            if (folder / "tokenizer_config.json").exists():
                from transformers import AutoTokenizer

                try:
                    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                except Exception as error:  # its own code, or a package, is missing
                    logger.warning(
                        "the tokenizer in %s can't be loaded (%s): completions are written as they were "
                        "graded, without a space that its decoder drops at their beginning.",
                        folder,
                        error,
                    )
        return None

    def decode(*ids: int) -> str:
        return str(tokenizer().decode(list(ids), clean_up_tokenization_spaces=False))

    @cache
    def before(token: int) -> str:
        alone = decode(token)
        return " " if decode(token, token) == f"{alone} {alone}" else ""

    def lead(rollout: Rollout) -> str:
        if not rollout.completion or tokenizer() is None:
            return ""
        return before(rollout.completion_ids[0])

    return lead
