"""The lease on a store: one run at a time, until it ends, is killed or doesn't renew."""

import json
import os
import subprocess
import sys
import time
from uuid import uuid4

import psutil
import pytest

from trl_selfplay.rounds.lease import NAME, Lease, LeaseError
from trl_selfplay.rounds.store import RoundsStore


@pytest.fixture
def store() -> RoundsStore:
    return RoundsStore(f"memory://{uuid4().hex}/run", pauses_s=())


def written(store) -> dict:
    return json.loads(store.read(NAME))


def test_a_second_run_is_refused_while_the_first_lasts_and_is_told_by_whom(store) -> None:
    with (
        Lease(store),
        pytest.raises(LeaseError, match=f"process {os.getpid()} on .*in 300 s"),
        Lease(store),
    ):
        pass
    assert store.read(NAME) is None
    with Lease(store):
        pass


def test_a_lease_is_renewed_while_it_lasts(store) -> None:
    with Lease(store, seconds=0.5):
        first = written(store)["expires"]
        ends = time.monotonic() + 20.0
        while written(store)["expires"] == first:
            assert time.monotonic() < ends
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


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"expires": null}'])
def test_a_lease_that_cant_be_read_counts_for_nothing(store, content, caplog) -> None:
    store.write(NAME, content)
    with Lease(store):
        pass
    assert "can't be read" in caplog.text
