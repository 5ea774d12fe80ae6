"""A sequence classifier as a reward function.

In: prompts and completions as text or chat messages. Out: the classifier's score of each, or None
if the text is longer than the classifier's context, since the score of half an answer is
meaningless.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trl_selfplay.rewards.grading_model import GradingModel, pad_rows, score_in_batches
from trl_selfplay.rewards.scores import Scores

# Keywords of `from_pretrained` that the tokenizer needs as well as the model.
_ACCESS = ("token", "trust_remote_code", "revision", "cache_dir", "local_files_only")


class RewardModel:
    """A reward function over a sequence classifier with one label.

    The memory of a forward pass is bounded by `max_tokens_per_batch`. While a trainer over rounds
    trains, the model is in the CPU's memory.

    Args:
        model: A Hub id, a folder, or a loaded model, which is put into eval mode.
        tokenizer: The model's tokenizer; None loads it from the model's source.
        device: Where it grades. None: on the trainer's device, or where the model is, if there is
            no trainer over rounds.
        model_init_kwargs: Keywords of `from_pretrained` for a model given by id or folder. Those
            about access to the repository also go to its tokenizer.
        max_tokens_per_batch: Maximum number of tokens scored together, padding included. A longer
            text is scored alone.
        calibrate: In a trainer over rounds, a sample's reward is the share of round 0's scores that
            are below its own, from 0.0 to 1.0, in all rounds. The scores themselves are kept beside
            it. Elsewhere, as in GRPOTrainer, it changes nothing.

    Raises:
        ValueError: The classifier has more than one label, or lacks trained weights.
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        device: Any = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        max_tokens_per_batch: int = 16_384,
        calibrate: bool = False,
    ) -> None:
        from transformers import AutoTokenizer

        if max_tokens_per_batch < 1:
            raise ValueError(f"max_tokens_per_batch={max_tokens_per_batch}; it must be at least 1.")
        loaded: Any = model
        if isinstance(model, str):
            loaded = _load_classifier(model, model_init_kwargs or {})
        source = model if isinstance(model, str) else loaded.config.name_or_path
        _check_labels(source, loaded.config.num_labels)
        self.grading_model = GradingModel(loaded, device)
        self.max_tokens_per_batch = max_tokens_per_batch
        self.calibrate = calibrate
        access = {k: v for k, v in (model_init_kwargs or {}).items() if k in _ACCESS}
        self._tokenizer: Any = tokenizer or AutoTokenizer.from_pretrained(source, **access)
        self._config = config = loaded.config.get_text_config()
        self._pad_id: int | None = self._tokenizer.pad_token_id
        if self._pad_id is None:
            self._pad_id = config.pad_token_id
        # Models like RoBERTa have two more positions than tokens, so check the tokenizer as well.
        limits = (
            getattr(config, "max_position_embeddings", None),
            self._tokenizer.model_max_length,
        )
        self._context_length = min(limit for limit in limits if limit is not None)
        self._source = str(source)
        self.__name__ = str(source).rstrip("/").split("/")[-1] or type(loaded).__name__

    @property
    def identity(self) -> dict[str, Any]:
        """What the scores depend on, but for the weights."""
        return {"model": self._source, "context_length": self._context_length}

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Scores:
        """Score each prompt with its completion, using the model's own chat template for messages.

        Plain text gets the special tokens that the tokenizer adds by default (GRPOTrainer omits
        them).
        """
        encoded = [
            self._tokenizer(self._render(p, c), add_special_tokens=isinstance(p, str))["input_ids"]
            for p, c in zip(prompts, completions, strict=True)
        ]
        causes = {}
        for index, ids in enumerate(encoded):
            if not ids:
                causes[index] = "the text is empty"
            elif len(ids) > self._context_length:
                causes[index] = "the text is longer than the reward model's context"
        return score_in_batches(
            [len(ids) for ids in encoded],
            self.max_tokens_per_batch,
            causes,
            lambda batch: self._score([encoded[i] for i in batch]),
        )

    def _score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        pad_id = self._pad_id
        if pad_id is None:
            # The score is read at the last token other than the padding, so it can't be EOS.
            last = {row[-1] for row in rows}
            pad_id = next(i for i in itertools.count() if i not in last)
        self._config.pad_token_id = pad_id
        input_ids, attention_mask = pad_rows(rows, pad_id)
        model = self.grading_model.ready()
        device = self.grading_model.device
        with torch.inference_mode():
            logits = model(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)
            ).logits  # (B, 1)
        return logits[:, 0].float().tolist()

    def _render(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return self._tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)


def _load_classifier(source: str, model_init_kwargs: Mapping[str, Any]) -> Any:
    """Load a classifier with one label; its weights must all be in the checkpoint."""
    from transformers import AutoModelForSequenceClassification

    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        source,
        **{**model_init_kwargs, "num_labels": 1},
        ignore_mismatched_sizes=True,  # said below
        output_loading_info=True,
    )
    for _, stored, _ in info["mismatched_keys"]:
        _check_labels(source, stored[0])
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"the reward model {source!r} lacks trained weights ({', '.join(missing[:3])}), so its "
            "scores would be random. Give a sequence classifier that was trained as a reward model."
        )
    return loaded


def _check_labels(source: str, count: int) -> None:
    if count != 1:
        raise ValueError(
            f"the reward model {source!r} has {count} labels; a reward is one number, so give a "
            "classifier with num_labels=1, or a function of your own that turns its labels into one."
        )
