"""A key-value cache that grows in place.

In: a model's config. Out: transformers' `DynamicCache` with each full-attention layer on a buffer
that has room for the tokens to come. The stock layer concatenates, and so copies every earlier
token at every step; on a CPU that took half of the time of decoding with few-shot prompts.
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Tokens of room that a full buffer gets when it grows: the memory it wastes against the copies.
_ROOM = 64


class BufferedLayer(DynamicLayer):
    """A full-attention layer whose `keys` and `values`, (B, H, S, D), are views into larger buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._key_buffer: torch.Tensor | None = None
        self._value_buffer: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, (B, H, S, D) each, and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self._key_buffer is None or self._value_buffer is None or self._is_full(end):
            self._key_buffer = _grown(self.keys, key_states, length, end)
            self._value_buffer = _grown(self.values, value_states, length, end)
        self._key_buffer[:, :, length:end] = key_states
        self._value_buffer[:, :, length:end] = value_states
        self.keys = self._key_buffer[:, :, :end]
        self.values = self._value_buffer[:, :, :end]
        return self.keys, self.values

    def _is_full(self, end: int) -> bool:
        """Say whether the buffer has no room, or `keys` was replaced and isn't a view of it.

        Rows that were joined or columns that were dropped show as another storage.
        """
        assert self._key_buffer is not None
        assert self.keys is not None
        return (
            end > self._key_buffer.shape[-2] or self.keys.data_ptr() != self._key_buffer.data_ptr()
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Repeat, select or drop rows; the next token finds new room."""
        super().reorder_cache(beam_idx)
        self.release_buffers()

    def release_buffers(self) -> None:
        """Let go of the buffers once `keys` and `values` are no longer views of them."""
        self._key_buffer = self._value_buffer = None


def _grown(held: torch.Tensor | None, states: torch.Tensor, length: int, end: int) -> torch.Tensor:
    batch, heads, _, dim = states.shape
    # A prefill gets room only with the first decoded token, when its rows have been repeated.
    room = _ROOM if length > 0 else 0
    buffer = states.new_empty((batch, heads, end + room, dim))
    if length > 0 and held is not None:
        buffer[:, :, :length] = held
    return buffer


def keep_columns(cache: DynamicCache, columns: torch.Tensor) -> None:
    """Keep the cached tokens where `columns`, bool (S,), is True; full attention layers only."""
    for layer in _filled(cache):
        chosen = columns.to(layer.keys.device)
        _replace(layer, layer.keys[:, :, chosen], layer.values[:, :, chosen])


def drop_leading(cache: DynamicCache, count: int) -> None:
    """Drop the oldest `count` cached tokens, which every row masks; attention layers only.

    A layer with a sliding window holds its newest tokens alone, and counts the others.
    """
    for layer in _filled(cache):
        keys, first = layer.keys, count
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= count
            first = max(keys.shape[-2] - layer.cumulative_length, 0)
        _replace(
            layer, layer.keys[:, :, first:].contiguous(), layer.values[:, :, first:].contiguous()
        )


def join_caches(first: DynamicCache, second: DynamicCache) -> None:
    """Add the rows of `second` to `first`, the shorter of both padded with zeros on the left.

    The caller masks the padding. Attention layers only: a recurrent state can't be padded.
    """
    for layer, other in zip(_filled(first), _filled(second), strict=True):
        _replace(layer, _joined(layer.keys, other.keys), _joined(layer.values, other.values))
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = max(layer.cumulative_length, other.cumulative_length)


def _filled(cache: DynamicCache) -> list[Any]:
    """Return the layers that hold keys; others share those of a layer before them."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.keys is not None]


def _replace(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Set a layer's keys and values; what they were copied from is freed before the next layer's."""
    layer.keys, layer.values = keys, values
    if isinstance(layer, BufferedLayer):
        layer.release_buffers()


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    length = max(first.shape[-2], second.shape[-2])
    return torch.cat(
        [pad(states, (0, 0, length - states.shape[-2], 0)) for states in (first, second)]
    )


def new_cache(config: PretrainedConfig) -> DynamicCache:
    """Return an empty cache with the layers that a model of this config needs."""
    cache = DynamicCache(config=config)
    cache.layers = [
        BufferedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
