"""A second thread makes what the caller takes: in order, not too far ahead, and ended with it."""

import threading
from contextlib import closing

import pytest

from trl_selfplay.rollouts.ahead import run_ahead


def test_items_are_made_while_earlier_ones_are_worked_on_but_not_too_many() -> None:
    """The second thread waits with the item that doesn't fit any more."""
    begun = [threading.Event() for _ in range(7)]

    def make():
        for number, event in enumerate(begun):
            event.set()
            yield number

    found = []
    with closing(run_ahead(make(), threading.Event(), most=2)) as batches:
        for batch in batches:
            assert 1 <= len(batch) <= 2
            found += batch
            for event in begun[: len(found) + 3]:  # without a second thread it would never come
                assert event.wait(timeout=30)
            assert not any(event.is_set() for event in begun[len(found) + 3 :])
    assert found == list(range(7))


def test_all_that_has_been_made_is_taken_at_once() -> None:
    last = threading.Event()

    def make():
        yield from range(4)
        last.set()
        yield 4

    with closing(run_ahead(make(), threading.Event(), most=10)) as batches:
        found = next(batches)
        assert last.wait(timeout=30)
        for batch in batches:
            found += batch
    assert found == [0, 1, 2, 3, 4]


def test_an_error_comes_after_the_items_before_it() -> None:
    def make():
        yield 1
        raise ZeroDivisionError("in the making")

    batches = run_ahead(make(), threading.Event(), most=1)
    assert next(batches) == [1]
    with pytest.raises(ZeroDivisionError, match="in the making"):
        next(batches)


@pytest.mark.parametrize("most", [1, 100])
def test_closing_closes_the_generator_in_its_own_thread_and_ends_the_thread(most) -> None:
    """Also one that waits for its items to be taken."""
    closed = []

    def make():
        try:
            yield from range(10)
        finally:
            closed.append(threading.current_thread().name)

    before = threading.active_count()
    batches = run_ahead(make(), threading.Event(), most)
    assert next(batches)[0] == 0
    batches.close()
    assert len(closed) == 1
    assert closed[0].startswith("ahead")
    assert threading.active_count() == before


def test_no_items_are_no_items() -> None:
    assert list(run_ahead((i for i in ()), threading.Event(), most=1)) == []


def test_closing_tells_what_makes_the_items_to_end_early() -> None:
    stop, ended = threading.Event(), threading.Event()

    def make():
        yield 0
        assert stop.wait(timeout=30)  # an item that would take for ever
        ended.set()

    batches = run_ahead(make(), stop, most=5)
    assert next(batches) == [0]
    batches.close()
    assert ended.is_set()
