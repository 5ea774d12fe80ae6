"""The lease on a store: one run at a time, until it ends, is killed or doesn't renew."""

import json
import os
import subprocess
import sys
import time
from uuid import uuid4

import psutil
import pytest
from patience import ENDS_S

from trl_selfplay.rounds.lease import NAME, Lease, LeaseError, LeaseOfMain
from trl_selfplay.rounds.store import RoundsStore, StoreError


@pytest.fixture
def store() -> RoundsStore:
    return RoundsStore(f"memory://{uuid4().hex}/run", pauses_s=())


def written(store) -> dict:
    return json.loads(store.read(NAME))


def test_a_second_run_is_refused_while_the_first_lasts_and_is_told_by_whom(store) -> None:
    with (
        Lease(store),
        pytest.raises(LeaseError, match=rf"process {os.getpid()} on .*in (300|2\d\d) s"),
        Lease(store),
    ):
        pass
    assert store.read(NAME) is None
    with Lease(store):
        pass


def test_a_lease_is_renewed_while_it_lasts(store) -> None:
    with Lease(store, seconds=0.5):
        first = written(store)["expires"]
        ends = time.monotonic() + ENDS_S
        while written(store)["expires"] == first:
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert written(store)["expires"] > first


def test_a_run_of_this_machine_that_was_killed_holds_nothing(store) -> None:
    with Lease(store):
        held = written(store)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held |= {"pid": child.pid, "started": psutil.Process(child.pid).create_time()}
    store.write(NAME, json.dumps(held).encode())
    with pytest.raises(LeaseError, match=f"process {child.pid}"), Lease(store):
        pass
    child.kill()
    child.communicate()
    with Lease(store):
        assert written(store)["pid"] == os.getpid()


def test_a_run_of_another_machine_holds_the_store_until_its_lease_expires(store) -> None:
    with Lease(store):
        held = {**written(store), "place": "another", "host": "far-away", "pid": 2**30}
    store.write(NAME, json.dumps(held).encode())
    with pytest.raises(LeaseError, match="far-away"), Lease(store):
        pass
    store.write(NAME, json.dumps({**held, "expires": time.time() - 1.0}).encode())
    with Lease(store):
        pass


def test_a_run_whose_lease_was_taken_over_puts_nothing_more(store) -> None:
    with Lease(store) as lease:
        lease.ensure()
        taken = {**written(store), "token": "another", "host": "far-away"}
        store.write(NAME, json.dumps(taken).encode())
        with pytest.raises(LeaseError, match=r"taken over .*far-away"):
            lease.renew()
        with pytest.raises(LeaseError, match="taken over"):
            lease.ensure()
    assert written(store) == taken  # it isn't ours to delete


def test_a_lease_that_expired_is_checked_before_anything_is_put(store) -> None:
    with Lease(store, seconds=-1.0) as lease:
        store.write(NAME, json.dumps({**written(store), "token": "another"}).encode())
        with pytest.raises(LeaseError, match="taken over"):
            lease.ensure()


def test_other_processes_of_a_run_put_nothing_once_another_run_holds_the_store(store) -> None:
    with Lease(store) as lease:
        held = written(store)
        LeaseOfMain(store, lease.token).ensure()
    taken = {**held, "token": "another", "host": "far-away"}
    store.write(NAME, json.dumps(taken).encode())
    other = LeaseOfMain(store, lease.token)
    with pytest.raises(LeaseError, match=r"taken over .*far-away"):
        other.ensure()
    store.delete(NAME)
    with pytest.raises(LeaseError, match="taken over"):
        other.ensure()  # whoever had it may have deleted what this run believes to be there


def test_other_processes_of_a_run_wait_while_its_lease_has_expired(store) -> None:
    with Lease(store, seconds=-1.0) as lease:
        other = LeaseOfMain(store, lease.token)
        with pytest.raises(StoreError, match="has expired"):
            other.ensure()
        store.write(NAME, json.dumps({**written(store), "expires": time.time() + 900.0}).encode())
        other.ensure()
    other.ensure()  # the main process has ended its part, and this one puts its last shard


def test_other_processes_of_a_run_read_its_lease_as_often_as_it_is_renewed(
    store, monkeypatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    with Lease(store) as lease:
        other = LeaseOfMain(store, lease.token)
        other.ensure()
        store.write(NAME, json.dumps({**written(store), "token": "another"}).encode())
        other.ensure()
        monkeypatch.setattr(time, "time", lambda: now + 65.0)
        with pytest.raises(LeaseError, match="taken over"):
            other.ensure()


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b"null", b"5", b"\xff", b'{"expires": null}', b'{"expires": "x"}',
        b'{"expires": 1e12}', b'{"expires": 1e400}', b'{"expires": NaN}',
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)  # fmt: skip
def test_a_lease_that_cant_be_read_counts_for_nothing(store, content, caplog) -> None:
    store.write(NAME, content)
    with Lease(store):
        pass
    assert "can't be read" in caplog.text
