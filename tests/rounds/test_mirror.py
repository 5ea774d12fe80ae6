"""Rounds on disk and on a store: which of both counts, and what becomes of a store that fails."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from trl_selfplay.disk import delete, followed, replace_folder, save_text, tell_gone
from trl_selfplay.rounds.lease import Lease, LeaseError, LeaseOfMain
from trl_selfplay.rounds.mirror import Mirror
from trl_selfplay.rounds.store import RoundsStore, StoreError, scan


class FailingStore(RoundsStore):
    """A store that can be switched off."""

    is_off = False

    def _connect(self):
        if self.is_off:
            raise ConnectionError("off")
        return super()._connect()


class KilledError(BaseException):
    """Stands for the end of a process: nothing handles it."""


class Machine:
    """A disk with rounds, and its place on the store."""

    def __init__(self, output_dir: Path, store: RoundsStore) -> None:
        self.root, self.store, self.now = output_dir / "_rounds", store, 1000.0

    @contextmanager
    def running(self, resume: bool = True) -> Iterator[Mirror]:
        mirror = Mirror(self.store, self.root, lambda: self.now, last_tries_s=(0.0,))
        with Lease(self.store) as mirror.lease:
            mirror.bring_together(resume)
            with followed(self.root, mirror):
                yield mirror

    def start(self, resume: bool = True) -> None:
        with self.running(resume):
            pass

    def start_and_be_killed(self, method: str, calls: int) -> None:
        """Start, and end with one of the calls of a method of the store."""
        intact, left = getattr(self.store, method), iter(range(calls - 1))

        def call(*args) -> None:
            if next(left, None) is None:
                raise KilledError
            intact(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.store, method, call)
            with pytest.raises(KilledError):
                self.start()

    def texts(self) -> dict[str, str]:
        return {name: path.read_text() for name, path in scan(self.root).items() if path.is_file()}


def texts_on(store) -> dict[str, str]:
    return {name: store.read(name).decode() for name, e in store.entries().items() if "" in e.files}


@pytest.fixture
def store() -> FailingStore:
    return FailingStore(f"memory://{uuid4().hex}/run", pauses_s=())


@pytest.fixture
def here(tmp_path, store) -> Machine:
    return Machine(tmp_path / "here", store)


@pytest.fixture
def there(tmp_path, store) -> Machine:
    return Machine(tmp_path / "there", store)


def test_what_is_written_and_deleted_on_disk_is_so_on_the_store(here, store) -> None:
    root = here.root
    with here.running():
        save_text(root / "config.json", "{}")
        save_text(root / "round-000/samples/plan.json", "[]")
        for text in ("first", "second"):
            save_text(root / "round-000/.model/weights", text)
            replace_folder(root / "round-000/.model", root / "round-000/model")
            assert store.read("round-000/model/weights") == text.encode()
        assert set(store.entries()) == set(scan(root))
        delete(root / "round-000/samples/plan.json")
        delete(root / "round-000/model")
        save_text(root.parent / "card.md", "outside")
        assert set(store.entries()) == set(scan(root)) == {"config.json"}
    save_text(root / "later.json", "{}")
    assert set(store.entries()) == {"config.json"}


def test_a_checkpoint_that_counts_no_more_goes_from_the_store_and_stays_on_disk(
    here, store
) -> None:
    checkpoint = here.root / "round-000/checkpoint-1"
    with here.running():
        save_text(here.root / "round-000/.new/state", "1")
        replace_folder(here.root / "round-000/.new", checkpoint)
        assert "round-000/checkpoint-1" in store.entries()
        tell_gone(checkpoint)
        assert store.entries() == {}
    assert (checkpoint / "state").exists()


def test_an_empty_disk_gets_everything_from_the_store(here, there) -> None:
    with here.running():
        save_text(here.root / "round-000/.model/weights", "w")
        replace_folder(here.root / "round-000/.model", here.root / "round-000/model")
        save_text(here.root / "rounds.jsonl", "{}")
    there.start()
    assert set(scan(there.root)) == set(scan(here.root))
    assert (there.root / "round-000/model/weights").read_text() == "w"
    assert there.texts() == here.texts()


def test_rounds_that_began_without_a_store_are_put_there(here, store) -> None:
    save_text(here.root / "rounds.jsonl", "{}")
    here.start()
    assert texts_on(store) == {"rounds.jsonl": "{}"}


def test_the_disk_counts_where_it_went_on_while_the_store_did_not_answer(here, store) -> None:
    with here.running():
        save_text(here.root / "round-000/plan.json", "old")
        save_text(here.root / "round-000/gone.json", "{}")
        store.is_off = True
        save_text(here.root / "round-000/plan.json", "new")
        save_text(here.root / "round-000/more.json", "{}")
        delete(here.root / "round-000/gone.json")
    (here.root / "round-000/more.json").rename(here.root / "round-000/else.json")  # after a kill
    store.is_off = False
    assert texts_on(store)["round-000/plan.json"] == "old"
    here.start()
    expected = {"round-000/plan.json": "new", "round-000/else.json": "{}"}
    assert texts_on(store) == here.texts() == expected


def test_the_store_counts_where_a_run_on_another_disk_has_gone_on(here, there, caplog) -> None:
    with here.running():
        save_text(here.root / "same.json", "1")
        save_text(here.root / "plan.json", "here")
    with there.running():
        save_text(there.root / "plan.json", "there")
        save_text(there.root / "rounds.jsonl", "{}")
    save_text(here.root / "unknown.json", "here alone")
    here.start()
    assert here.texts() == {"same.json": "1", "plan.json": "there", "rounds.jsonl": "{}"}
    aside = here.root.with_name("_rounds_aside")
    for name, text in {"plan.json": "here", "unknown.json": "here alone"}.items():
        assert (aside / name).read_text() == text
    assert "moved to" in caplog.text


def test_rounds_of_two_runs_are_not_mixed(here, there, store) -> None:
    with here.running():
        save_text(here.root / "config.json", "{}")
    save_text(there.root / "config.json", "{}")
    with pytest.raises(ValueError, match="not of the same run"):
        there.start()
    with pytest.raises(FileExistsError, match="already holds rounds"):
        Machine(there.root.parent / "new", store).start(resume=False)


def test_a_run_goes_on_while_the_store_fails_and_puts_what_it_lacks_in_order(
    here, store, caplog
) -> None:
    root, order = here.root, []
    store._put_file = lambda name, path: (
        order.append(name),
        RoundsStore._put_file(store, name, path),
    )
    with here.running() as mirror:
        store.is_off = True
        for name in ("a.json", "b.json", "a.json"):
            save_text(root / name, name)
        assert caplog.text.count("goes on with the files") == 1
        store.is_off = False
        order.clear()
        save_text(root / "c.json", "c")
        assert texts_on(store) == {}  # it is tried again after a minute
        here.now += 61.0
        save_text(root / "d.json", "d")
    assert order == ["b.json", "a.json", "c.json", "d.json"]
    assert "answers again" in caplog.text
    mirror.finish(is_failing=False)


def test_a_run_that_ends_before_the_store_answers_says_what_it_lacks(here, store) -> None:
    with here.running() as mirror:
        store.is_off = True
        save_text(here.root / "rounds.jsonl", "{}")
    mirror.finish(is_failing=True)  # the run's own error is the one to see
    with pytest.raises(StoreError, match=r"lacks 1 of this run's files, rounds\.jsonl among them"):
        mirror.finish(is_failing=False)
    store.is_off = False
    mirror.finish(is_failing=False)
    assert texts_on(store) == {"rounds.jsonl": "{}"}


def test_a_torn_checkpoint_on_disk_gives_way_to_the_one_on_the_store(here, there, store) -> None:
    checkpoint = here.root / "round-000/checkpoint-2"
    with here.running():
        save_text(here.root / "round-000/.new/state", "whole")
        replace_folder(here.root / "round-000/.new", checkpoint)
    (checkpoint / "state").write_text("ha")
    torn = here.root / "round-000/checkpoint-3"
    torn.mkdir()
    here.start()
    assert (checkpoint / "state").read_text() == "whole"
    assert torn.exists()  # training passes it over
    assert set(store.entries()) == {"round-000/checkpoint-2"}


def test_another_process_of_a_run_puts_nothing_while_another_run_holds_the_store(
    tmp_path, here, store
) -> None:
    mirror = Mirror(store, tmp_path / "_rounds")
    with here.running() as main:
        mirror.lease = LeaseOfMain(store, main.lease.token)
        with followed(tmp_path / "_rounds", mirror):
            save_text(tmp_path / "_rounds/a.json", "a")
    assert texts_on(store) == {"a.json": "a"}
    mirror.lease = LeaseOfMain(store, main.lease.token)
    with Lease(store), followed(tmp_path / "_rounds", mirror):
        with pytest.raises(LeaseError, match="taken over"):
            save_text(tmp_path / "_rounds/b.json", "b")
        mirror.finish(is_failing=True)
    assert texts_on(store) == {"a.json": "a"}


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_run_killed_while_it_fetches_onto_an_empty_disk_goes_on(
    here, there, store, calls
) -> None:
    with here.running():
        for name in ("a.json", "b.json", "c.json"):
            save_text(here.root / "round-000" / name, name)
    there.start_and_be_killed("_get_file", calls)
    assert len(there.texts()) == calls - 1
    there.start()
    assert there.texts() == here.texts() == texts_on(store)


# The second write tells whose rounds these are; the first is the lease.
@pytest.mark.parametrize(
    ("method", "calls"), [("write", 2), ("_put_file", 1), ("_put_file", 2), ("_put_file", 3)]
)
def test_a_run_killed_while_rounds_that_began_without_a_store_are_put_goes_on(
    here, there, store, method, calls
) -> None:
    for name in ("a.json", "b.json", "c.json"):
        save_text(here.root / "round-000" / name, name)
    here.start_and_be_killed(method, calls)
    here.start()
    assert here.texts() == texts_on(store)
    assert len(here.texts()) == 3
    there.start()
    assert there.texts() == here.texts()


def test_a_store_where_a_run_was_killed_before_it_put_anything_is_free_for_another(
    here, there, store
) -> None:
    save_text(here.root / "config.json", "here")
    here.start_and_be_killed("_put_file", 1)
    with there.running(resume=False):
        save_text(there.root / "config.json", "there")
    with pytest.raises(ValueError, match="not of the same run"):
        here.start()
    assert here.texts() == {"config.json": "here"}


def test_the_record_on_disk_holds_the_run_and_no_place_of_the_store(here, store) -> None:
    here.start()
    record = json.loads((here.root.with_name("_rounds_store.json")).read_text())
    assert record == {**json.loads(store.read("_run.json")), "deleted": []}
    assert record["session"] == 1


DAMAGED = [
    b"", b"{", b"\xff", b"[]", b"5", b'{"format": 1, "run": 5, "session": 1}',
    b'{"format": 1, "run": "a", "session": null}', b'{"format": 1, "run": "a"}',
    b'{"format": 1, "run": "a", "session": 1, "deleted": 5}',
    b'{"format": 1, "run": "a", "session": 1, "deleted": [5]}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_record_that_cant_be_read_counts_for_nothing(here, there, store, content, caplog) -> None:
    with here.running():
        save_text(here.root / "config.json", "{}")
    store.write("_run.json", content)
    there.start()
    assert there.texts() == here.texts()
    assert "_run.json can't be read, and counts for nothing" in caplog.text
    there.root.with_name("_rounds_store.json").write_bytes(content)
    with pytest.raises(ValueError, match="not of the same run"):
        there.start()
    assert "_rounds_store.json can't be read, and counts for nothing" in caplog.text
    assert there.texts() == here.texts() == texts_on(store)


@pytest.mark.parametrize("name", ["_run.json", "_rounds_store.json"])
def test_rounds_of_a_later_version_are_refused_and_left_as_they_are(here, store, name) -> None:
    with here.running():
        save_text(here.root / "config.json", "{}")
    record = json.dumps({"format": 2, "run": {"id": "a"}})
    if name == "_run.json":
        store.write(name, record.encode())
    else:
        here.root.with_name(name).write_text(record)
    with pytest.raises(StoreError, match=rf"{name} was written by a later version.*format 2"):
        here.start()
    assert here.texts() == texts_on(store)
    left = store.read(name) if name == "_run.json" else here.root.with_name(name).read_bytes()
    assert left == record.encode()
