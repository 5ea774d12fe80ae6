"""Find the token that ends a completion, above all the one that completes a stop string.

In: the growing token ids of a completion. Out: whether its text now contains one of the strings, and
why the completion ends.
Each step decodes only the last few tokens. A string may begin or end anywhere in a token, or inside
a character that is spread over several tokens.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from trl_selfplay.generation.sampler import Finish, SampleRequest, SamplingOptions


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


class CompletionEnd:
    """Finds the end of one completion; call `find` after every token.

    Args:
        tokenizer: Decodes the text that is searched for stop strings.
        options: Say what ends a completion.
        request: Its prompt, and its own limit.
        context_length: Most tokens of prompt and completion, or None.

    Attributes:
        limit: Most tokens of this completion.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        request: SampleRequest,
        context_length: int | None,
    ) -> None:
        self.limit = options.max_completion_length
        if request.max_completion_length is not None:
            self.limit = min(self.limit, request.max_completion_length)
        if context_length is not None:
            self.limit = min(self.limit, context_length - len(request.prompt_ids))
        self._eos_token_ids = frozenset(options.eos_token_ids)
        stops = options.stop_strings
        self._scanner = StopStringScanner(tokenizer, stops) if stops else None

    def find(self, completion_ids: Sequence[int]) -> Finish | None:
        """Return why the completion ends with its last token, or None if it doesn't.

        Expects the ids of the previous call and one more token.
        """
        if completion_ids[-1] in self._eos_token_ids:
            return "eos"
        if self._scanner is not None and self._scanner.is_complete(completion_ids):
            return "stop"
        return "length" if len(completion_ids) >= self.limit else None
