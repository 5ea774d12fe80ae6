"""A sequence classifier as a reward function.

In: prompts and completions as text or chat messages. Out: the classifier's score of each, or None
where the text is longer than the classifier's context: a score of half an answer says nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# Scores are computed in groups of this many texts.
_BATCH_SIZE = 16


class RewardModel:
    """A reward function over a sequence classifier with one label.

    Args:
        model: Its id or folder, or the model itself, which is used as it is, in eval mode.
        tokenizer: Its tokenizer; None loads the one of the model's source.
        device: Where a model given by id is put.

    Raises:
        ValueError: The classifier has more than one label.
    """

    def __init__(self, model: str | nn.Module, tokenizer: Any = None, device: Any = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        loaded: Any = model
        if isinstance(model, str):
            loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
            loaded = loaded.to(device) if device is not None else loaded
        source = model if isinstance(model, str) else loaded.config.name_or_path
        self._model: Any = loaded.eval()
        if self._model.config.num_labels != 1:
            raise ValueError(
                f"the reward model {source!r} has {self._model.config.num_labels} labels; a reward "
                "is one number, so give a classifier with num_labels=1."
            )
        self._tokenizer: Any = tokenizer or AutoTokenizer.from_pretrained(source)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # The score is read at the last token that is not padding.
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._context_length = getattr(self._model.config, "max_position_embeddings", None)
        self.__name__ = str(source).rstrip("/").split("/")[-1] or type(loaded).__name__

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any
    ) -> list[float | None]:
        """Score each prompt with its completion."""
        scores: list[float | None] = [None] * len(prompts)
        encoded = [
            self._tokenizer(self._render(p, c), add_special_tokens=isinstance(p, str))["input_ids"]
            for p, c in zip(prompts, completions, strict=True)
        ]
        fitting = [
            i
            for i, ids in enumerate(encoded)
            if ids and (self._context_length is None or len(ids) <= self._context_length)
        ]
        fitting.sort(key=lambda i: len(encoded[i]))
        for start in range(0, len(fitting), _BATCH_SIZE):
            chosen = fitting[start : start + _BATCH_SIZE]
            batch = self._tokenizer.pad(
                {"input_ids": [encoded[i] for i in chosen]},
                padding_side="right",
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                # By name: some tokenizers return token types that the model doesn't know.
                logits = self._model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits[:, 0]
            for index, score in zip(chosen, logits.float().tolist(), strict=True):
                scores[index] = score
        return scores

    def _render(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return self._tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
