"""Work and the making of the next item overlap, in order, and errors come in their turn."""

import threading

import pytest

from trl_selfplay.rollouts.one_ahead import one_ahead


def test_the_next_item_is_made_while_the_last_is_worked_on() -> None:
    begun = [threading.Event() for _ in range(4)]

    def make():
        for number, event in enumerate(begun):
            event.set()
            yield number

    found = []
    for number in one_ahead(make(), threading.Event()):
        if number + 1 < len(begun):
            assert begun[number + 1].wait(timeout=30)  # would never come without a second thread
        if number + 2 < len(begun):
            assert not begun[number + 2].is_set()
        found.append(number)
    assert found == [0, 1, 2, 3]


def test_an_error_comes_after_the_items_before_it() -> None:
    def make():
        yield 1
        raise ZeroDivisionError("in the making")

    items = one_ahead(make(), threading.Event())
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError, match="in the making"):
        next(items)


def test_closing_closes_the_iterator_in_its_own_thread_and_ends_the_thread() -> None:
    closed = []

    def make():
        try:
            yield from range(10)
        finally:
            closed.append(threading.current_thread().name)

    before = threading.active_count()
    items = one_ahead(make(), threading.Event())
    assert next(items) == 0
    items.close()
    assert len(closed) == 1
    assert closed[0].startswith("ahead")
    assert threading.active_count() == before


def test_no_items_are_no_items() -> None:
    assert list(one_ahead(iter(()), threading.Event())) == []


def test_closing_tells_what_makes_the_items_to_end_early() -> None:
    stop, ended = threading.Event(), threading.Event()

    def make():
        yield 0
        assert stop.wait(timeout=30)  # an item that would take for ever
        ended.set()

    items = one_ahead(make(), stop)
    assert next(items) == 0
    items.close()
    assert ended.is_set()
