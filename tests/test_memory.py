"""Garbage collections within `fast_collections`."""

import gc
import weakref

import pytest

from trl_selfplay.memory import fast_collections


class Node:
    """Can be part of a cycle."""


def cycle():
    """Return a weak reference to an object that only a collection frees."""
    node = Node()
    node.itself = node
    return weakref.ref(node)


def test_collections_pass_over_what_existed_and_free_what_came_later() -> None:
    waiting = cycle()  # the collection at the start takes what is garbage already
    earlier, kept = Node(), Node()
    kept.itself = kept
    unneeded, in_cycle = weakref.ref(earlier), weakref.ref(kept)
    num_objects = len(gc.get_objects())
    with fast_collections():
        assert waiting() is None
        assert len(gc.get_objects()) < num_objects / 10
        later = cycle()
        del earlier, kept
        gc.collect()
        assert later() is None
        assert unneeded() is None
        assert in_cycle() is not None
    gc.collect()
    assert in_cycle() is None


def test_collections_are_whole_again_after_an_error() -> None:
    with pytest.raises(KeyError), fast_collections():
        raise KeyError
    assert gc.get_freeze_count() == 0
