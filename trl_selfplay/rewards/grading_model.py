"""A model that grades: on its device while it grades, in the CPU's memory while another trains.

In: a loaded model. Out: `GradingModel`, which moves it, and functions that make batches of bounded
memory.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from trl_selfplay.memory import return_freed_memory
from trl_selfplay.rewards.scores import Scores


class GradingModel:
    """A model that shares a device with one that trains.

    A reward function that holds one has it as its attribute `grading_model`. `Scorer` then gives it
    the trainer's device, and parks it before each training. It comes back when it grades.

    Args:
        model: A loaded model, which is put into eval mode.
        device: Where it grades. None: on the trainer's device, or where it is, if there is no
            trainer over rounds.
    """

    def __init__(self, model: nn.Module, device: Any = None) -> None:
        self._model: Any = model.eval()
        self._device = None if device is None else torch.device(device)
        # Quantized weights, and models divided over several devices, stay where they are.
        self._is_movable = all(map(_is_movable, model.modules()))

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return next(self._model.parameters()).device

    def grades_on(self, device: torch.device) -> bool:
        """Return whether it grades on this device; "cuda" is its first one."""
        own = self._device or self.device
        return (own.type, own.index or 0) == (device.type, device.index or 0)

    @property
    def model(self) -> nn.Module:
        """The model, wherever it is."""
        model: nn.Module = self._model
        return model

    def place(self, device: Any) -> None:
        """Grade on this device, unless another was chosen at construction."""
        if self._device is None:
            self._device = torch.device(device)

    def ready(self) -> Any:
        """Return the model, on the device where it grades."""
        if self._device is None:
            self._device = self.device
        self._move(self._device)
        return self._model

    def park(self) -> None:
        """Move the model to the CPU's memory, and give its memory back to its device."""
        if self._device is None:
            self._device = self.device
        if self._move(torch.device("cpu")):
            return_freed_memory()

    def _move(self, device: torch.device) -> bool:
        """Move the model if it isn't there; return whether it was moved."""
        if not self._is_movable or self.device == device:
            return False
        self._model.to(device)
        return True


def _is_movable(module: nn.Module) -> bool:
    parts = set((getattr(module, "hf_device_map", None) or {}).values())
    return not getattr(module, "is_quantized", False) and len(parts) <= 1


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids, padded on the right, and the attention mask: both (rows, tokens)."""
    shape = (len(rows), max(map(len, rows)))
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for index, ids in enumerate(rows):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        attention_mask[index, : len(ids)] = 1
    return input_ids, attention_mask


def token_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of sequences in batches of at most `max_tokens`, padding included.

    The longest come first, so that running out of memory shows at once. A sequence that is longer
    than `max_tokens` is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        count = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def score_in_batches(
    lengths: Sequence[int],
    max_tokens: int,
    causes: dict[int, str],
    score: Callable[[list[int]], list[float]],
) -> Scores:
    """Return a score per sequence, from batches of bounded memory.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: See `token_batches`.
        causes: Why sequences aren't scored, by index.
        score: Returns the scores of one batch, which it gets as indices.
    """
    scores = Scores([None] * len(lengths), causes)
    fitting = [index for index in range(len(lengths)) if index not in causes]
    for batch in token_batches([lengths[index] for index in fitting], max_tokens):
        chosen = [fitting[place] for place in batch]
        for index, value in zip(chosen, score(chosen), strict=True):
            scores[index] = value
    return scores
