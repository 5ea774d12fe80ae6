"""A sequence classifier as a reward function.

In: prompts and completions as text or chat messages. Out: the classifier's score of each, or None
if the text is longer than the classifier's context, since the score of half an answer is
meaningless.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

# Number of texts scored together.
_BATCH_SIZE = 16
# Keywords of `from_pretrained` that the tokenizer needs as well as the model.
_ACCESS = ("token", "trust_remote_code", "revision", "cache_dir", "local_files_only")


class RewardModel:
    """A reward function over a sequence classifier with one label.

    Args:
        model: A Hub id, a folder, or a loaded model, which is put into eval mode.
        tokenizer: The model's tokenizer; None loads it from the model's source.
        device: Device for a model given by id or folder.
        model_init_kwargs: Keywords of `from_pretrained` for a model given by id or folder. Those
            about access to the repository also go to its tokenizer.

    Raises:
        ValueError: The classifier has more than one label.
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        device: Any = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        loaded: Any = model
        if isinstance(model, str):
            loaded = AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=1, **model_init_kwargs or {}
            )
            loaded = loaded.to(device) if device is not None else loaded
        source = model if isinstance(model, str) else loaded.config.name_or_path
        self._model: Any = loaded.eval()
        if self._model.config.num_labels != 1:
            raise ValueError(
                f"the reward model {source!r} has {self._model.config.num_labels} labels; a reward "
                "is one number, so give a classifier with num_labels=1."
            )
        access = {k: v for k, v in (model_init_kwargs or {}).items() if k in _ACCESS}
        self._tokenizer: Any = tokenizer or AutoTokenizer.from_pretrained(source, **access)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # The score is read at the last token that is not padding.
        config = self._model.config.get_text_config()
        config.pad_token_id = self._tokenizer.pad_token_id
        # Models like RoBERTa have two more positions than tokens, so check the tokenizer as well.
        limits = (
            getattr(config, "max_position_embeddings", None),
            self._tokenizer.model_max_length,
        )
        self._context_length = min(limit for limit in limits if limit is not None)
        self.__name__ = str(source).rstrip("/").split("/")[-1] or type(loaded).__name__

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any
    ) -> list[float | None]:
        """Score each prompt with its completion, using the model's own chat template for messages.

        Plain text gets the special tokens that the tokenizer adds by default (GRPOTrainer omits
        them).
        """
        scores: list[float | None] = [None] * len(prompts)
        encoded = [
            self._tokenizer(self._render(p, c), add_special_tokens=isinstance(p, str))["input_ids"]
            for p, c in zip(prompts, completions, strict=True)
        ]
        fitting = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= self._context_length]
        fitting.sort(key=lambda i: len(encoded[i]))
        for start in range(0, len(fitting), _BATCH_SIZE):
            chosen = fitting[start : start + _BATCH_SIZE]
            for index, score in zip(chosen, self._score([encoded[i] for i in chosen]), strict=True):
                scores[index] = score
        return scores

    def _score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        shape = (len(rows), max(map(len, rows)))  # (B, S)
        input_ids = torch.full(shape, self._tokenizer.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for index, ids in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            attention_mask[index, : len(ids)] = 1
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)
            ).logits  # (B, 1)
        return logits[:, 0].float().tolist()

    def _render(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return self._tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
