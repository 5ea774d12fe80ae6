"""A key-value cache that grows in place.

In: a model's config. Out: transformers' `DynamicCache` whose full-attention layers write into
buffers with room for later tokens. The stock layer concatenates, which copies every earlier token at
every step and took half of the decoding time with few-shot prompts on a CPU. Remove when
`DynamicLayer` grows in place; https://github.com/huggingface/transformers/pull/30536 has the cost.

Shapes: B rows, H key heads, S cached tokens, D channels per head.
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Spare tokens in a buffer that has grown. More waste memory, fewer mean more copies.
_ROOM = 64


class BufferedLayer(DynamicLayer):
    """A full-attention layer whose `keys` and `values`, (B, H, S, D), are views into larger buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._stays = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, (B, H, S, D) each, and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, rows = self.get_seq_length(), key_states.shape[0]
        end = length + key_states.shape[-2]
        # Grow the buffers if they lack room. Otherwise only the new tokens are written, and attention
        # reads the buffers directly.
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            self._buffers = (
                _grown(self.keys, key_states, length, end),
                _grown(self.values, value_states, length, end),
            )
            self._stays = False
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, length:end] = states
        self.show(rows, end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def show(self, rows: int, length: int) -> None:
        """Make keys and values the first rows and columns of the buffers."""
        assert self._buffers is not None
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self._buffers)

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace keys and values by those of other rows or columns.

        They are copied to buffers that stay, if they fit; other buffers are freed, and the next token
        allocates new ones.
        """
        rows, _, length, _ = keys.shape
        if self._stays and self._buffers is not None:
            room = self._buffers[0].shape
            self._stays = rows <= room[0] and length <= room[2]
        if not self._stays or self._buffers is None:
            self.keys, self.values, self._buffers = keys, values, None
            return
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:rows, :, :length] = states
        self.show(rows, length)

    def settle(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Move keys and values to buffers that stay, with room for more rows and columns."""
        assert self.keys is not None
        assert self.values is not None
        self._buffers, self._stays = (keys, values), True
        self.put(self.keys, self.values)

    def leave(self) -> None:
        """Take keys and values out of buffers that stay, which others need."""
        assert self.keys is not None
        assert self.values is not None
        self._stays = False
        self.put(self.keys.clone(), self.values.clone())

    def lies_in(self, keys: torch.Tensor) -> bool:
        """Return whether the layer is settled in these buffers."""
        return self._stays and self._buffers is not None and self._buffers[0] is keys

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Repeat, select or drop rows."""
        super().reorder_cache(beam_idx)
        if self.keys is not None and self.values is not None:
            self.put(self.keys, self.values)


def _grown(held: torch.Tensor | None, states: torch.Tensor, length: int, end: int) -> torch.Tensor:
    batch, heads, _, dim = states.shape
    # No spare room at prefill: rows are repeated for their samples before the first token is decoded,
    # which would copy it as well.
    room = _ROOM if length > 0 else 0
    buffer = states.new_empty((batch, heads, end + room, dim))
    if length > 0 and held is not None:
        buffer[:, :, :length] = held
    return buffer


def keep_columns(cache: DynamicCache, columns: torch.Tensor) -> None:
    """Keep the cached tokens where `columns`, bool (S,), is True; full-attention layers only."""
    for layer in _filled(cache):  # layers may be on several devices
        chosen = columns.to(layer.keys.device)
        _replace(layer, layer.keys[:, :, chosen], layer.values[:, :, chosen])


def drop_leading(cache: DynamicCache, count: int) -> None:
    """Drop the first `count` cached columns, which every row masks; attention layers only."""
    for layer in _filled(cache):
        keys, first = layer.keys, count
        if isinstance(layer, DynamicSlidingWindowLayer):
            # The layer holds only the newest tokens and counts all. Tokens that have left the window
            # are gone already, so drop what the reduced count doesn't cover.
            layer.cumulative_length -= count
            first = max(keys.shape[-2] - layer.cumulative_length, 0)
        _replace(
            layer, layer.keys[:, :, first:].contiguous(), layer.values[:, :, first:].contiguous()
        )


def join_caches(first: DynamicCache, second: DynamicCache) -> None:
    """Append the rows of `second` to `first`, padding the shorter cache with zeros on the left.

    The caller masks the padding. Attention layers only: a recurrent state can't be padded.
    """
    for layer, other in zip(_filled(first), _filled(second), strict=True):
        _replace(layer, _joined(layer.keys, other.keys), _joined(layer.values, other.values))
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = max(layer.cumulative_length, other.cumulative_length)


def _filled(cache: DynamicCache) -> list[Any]:
    """Return the layers that hold keys; the others share the keys of an earlier layer."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.keys is not None]


def _replace(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Set a layer's keys and values, and free the old ones before the next layer is copied."""
    if isinstance(layer, BufferedLayer):
        layer.put(keys, values)
    else:
        layer.keys, layer.values = keys, values


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    # (B1, H, S1, D) and (B2, H, S2, D) → (B1 + B2, H, max(S1, S2), D)
    length = max(first.shape[-2], second.shape[-2])
    return torch.cat(
        [pad(states, (0, 0, length - states.shape[-2], 0)) for states in (first, second)]
    )


def new_cache(config: PretrainedConfig) -> DynamicCache:
    """Return an empty cache with the layers that a model with this config needs."""
    cache = DynamicCache(config=config)
    cache.layers = [
        BufferedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
