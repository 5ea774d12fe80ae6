"""The cache that grows in place: what it holds, and what it lets go of."""

import pytest
import torch
from transformers import DynamicCache

from trl_selfplay.generation.buffered_cache import join_caches, keep_columns, new_cache

HEADS, DIM = 2, 8


def fill(cache: DynamicCache, rows: int, lengths: list[int]) -> list[tuple]:
    """Put random keys and values into every layer; return them joined, as the stock cache would."""
    expected = []
    for layer in range(len(cache.layers)):
        states = [torch.randn(2, rows, HEADS, length, DIM) for length in lengths]
        for keys, values in states:
            cache.update(keys, values, layer)
        expected.append(torch.cat(states, dim=3).unbind())
    return expected


@pytest.fixture
def config(build_model):
    return build_model().config


def test_it_holds_what_was_put_in(config) -> None:
    """Beyond its room as well."""
    cache = new_cache(config)
    expected = fill(cache, 3, [4, 1, 1, 70, 1])
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@pytest.mark.parametrize("change", ["join", "columns", "reorder"])
def test_a_rebuilt_cache_lets_its_old_buffers_go(config, change) -> None:
    """They would take the memory of keys and values once more until the next token."""
    cache, other = new_cache(config), new_cache(config)
    expected, joined = fill(cache, 2, [3, 1]), fill(other, 1, [2])
    if change == "join":
        join_caches(cache, other)
    elif change == "columns":
        keep_columns(cache, torch.tensor([True, False, True, True]))
    else:
        cache.reorder_cache(torch.tensor([1]))
    for layer, (keys, _), (more, _) in zip(cache.layers, expected, joined, strict=True):
        assert layer._buffers is None
        if change == "join":
            padded = torch.nn.functional.pad(more, (0, 0, 2, 0))
            assert torch.equal(layer.keys, torch.cat([keys, padded]))
        elif change == "columns":
            assert torch.equal(layer.keys, keys[:, :, [0, 2, 3]])
        else:
            assert torch.equal(layer.keys, keys[1:])


def settle(cache: DynamicCache, rows: int, columns: int) -> list[tuple]:
    buffers = []
    for layer in cache.layers:
        keys, values = (torch.zeros(rows, HEADS, columns, DIM) for _ in range(2))
        layer.settle(keys, values)
        buffers.append((keys, values))
    return buffers


@pytest.mark.parametrize("change", ["join", "columns", "reorder", "update"])
def test_a_settled_cache_stays_in_its_buffers(config, change) -> None:
    """With the same keys and values as a cache that isn't settled."""
    caches = []
    for is_settled in (True, False):
        torch.manual_seed(0)
        cache, other = new_cache(config), new_cache(config)
        fill(cache, 2, [3, 1])
        fill(other, 1, [2])
        if is_settled:
            buffers = settle(cache, 4, 8)
        if change == "join":
            join_caches(cache, other)
        elif change == "columns":
            keep_columns(cache, torch.tensor([True, False, True, True]))
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([1, 1, 0]))
        fill(cache, 3 if change in ("join", "reorder") else 2, [1])
        caches.append(cache)
    for layer, grown, (keys, values) in zip(*(c.layers for c in caches), buffers, strict=True):
        assert layer.lies_in(keys)
        assert layer.keys.data_ptr() == keys.data_ptr()
        assert layer.values.data_ptr() == values.data_ptr()
        assert torch.equal(layer.keys, grown.keys)
        assert torch.equal(layer.values, grown.values)


def test_a_settled_cache_leaves_buffers_that_are_too_small_or_needed(config) -> None:
    for change in ("rows", "columns", "leave"):
        cache = new_cache(config)
        expected = fill(cache, 2, [4, 1])
        buffers = settle(cache, 2, 5)
        for layer in cache.layers:
            if change == "leave":
                layer.leave()
        if change == "rows":
            cache.reorder_cache(torch.tensor([0, 1, 1]))
        elif change == "columns":
            fill(cache, 2, [1])
        for keys, values in buffers:
            keys.zero_()
            values.zero_()
        for layer, (keys, values), (home, _) in zip(cache.layers, expected, buffers, strict=True):
            assert not layer.lies_in(home)
            assert torch.equal(layer.keys[:2, :, :5], keys)
            assert torch.equal(layer.values[:2, :, :5], values)
