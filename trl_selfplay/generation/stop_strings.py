"""Find the token that completes a stop string.

In: the growing token ids of a completion. Out: whether its text now contains one of the strings.
Each step decodes only the last few tokens. A string may begin or end anywhere in a token, or inside
a character that is spread over several tokens.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStringScanner:
    """Follows one completion; call `is_complete` after every token.

    Text is decoded in overlapping windows: tokens of the previous window are the context (a
    tokenizer may strip a leading space), the tokens after it give the new text. A window never ends
    in the middle of a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._overlap = max(map(len, stop_strings)) - 1
        self._tail = ""  # the last characters before the new text
        self._context_text = ""
        self._context_start = 0
        self._context_stop = 0

    def is_complete(self, completion_ids: Sequence[int]) -> bool:
        """Return whether the text of `completion_ids` contains a stop string.

        Expects the ids of the previous call and one more token.
        """
        text = self._decode(completion_ids[self._context_start :])
        new_text = text[len(self._context_text) :]
        if any(string in self._tail + new_text for string in self._stop_strings):
            return True
        if new_text and not new_text.endswith("\ufffd"):
            self._tail = (self._tail + new_text)[-self._overlap :] if self._overlap else ""
            self._context_start, self._context_stop = self._context_stop, len(completion_ids)
            self._context_text = self._decode(
                completion_ids[self._context_start : self._context_stop]
            )
        return False

    def _decode(self, ids: Sequence[int]) -> str:
        # Keep special tokens, so that they can be stop strings.
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # one sequence decodes to one string
        return text
