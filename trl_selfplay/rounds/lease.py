"""The lease on a `rounds_dir`: one run at a time, told by an object with an expiry.

In: a store. Out: a lease that is renewed in a thread while it lasts, or an error that names who holds
it. It is weaker than the lock on `output_dir`, which the system keeps: two runs that begin within the
same second may both believe that they hold it, until the first renewal tells one of them, and it relies
on clocks that agree.
"""

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import psutil

from trl_selfplay.rounds.store import RoundsStore, StoreError

logger = logging.getLogger(__name__)

NAME = "_lease.json"
LEASE_S = 300.0
_RENEWALS_PER_LEASE = 5
_TOKENS_HELD: set[str] = set()  # by this process


class LeaseError(RuntimeError):
    """Another run holds the store."""


class Lease:
    """Holds a store while the context lasts.

    The lease of a process of this machine that has ended counts no more; that of another machine, or
    from before a restart of this one, counts until it expires.

    Args:
        store: The store.
        seconds: How long the lease counts after its last renewal.

    Attributes:
        token: Tells this lease from all others.

    Raises:
        LeaseError: On entry, another run holds the store.
        StoreError: On entry, the store doesn't answer or may not be written to.
    """

    def __init__(self, store: RoundsStore, seconds: float = LEASE_S) -> None:
        self._store = store
        self._seconds = seconds
        self.token = uuid4().hex
        self._holder = {**_this_process(), "token": self.token}
        self._expires = 0.0
        self._taken_by: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)

    def __enter__(self) -> Self:
        found = _read(self._store)
        if found is not None and not _is_over(found):
            left = found["expires"] - time.time()
            until = datetime.fromtimestamp(found["expires"]).strftime("%H:%M:%S")
            raise LeaseError(
                f"another run holds rounds_dir={self._store.url!r}: process {found.get('pid')} on "
                f"{found.get('host')}. Wait until it has ended, or choose another rounds_dir. If it was "
                f"killed, its lease ends at {until} (in {left:.0f} s); if you know that it has ended, "
                f"delete {self._store.url}/{NAME}."
            )
        self._write()
        self._check()  # another may have written within the same moment
        _TOKENS_HELD.add(self.token)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        _TOKENS_HELD.discard(self.token)
        if self._taken_by is None:
            with suppress(StoreError, LeaseError):  # it expires
                self._check()
                self._store.delete(NAME)

    def ensure(self) -> None:
        """See that the lease is still held, before something is put or deleted.

        Raises:
            LeaseError: Another run has taken it.
            StoreError: It has expired, and the store doesn't tell whether another has taken it.
        """
        if self._taken_by is None and time.time() > self._expires:
            self.renew()
        if self._taken_by is not None:
            raise _taken_over(self._store, self._taken_by)

    def renew(self) -> None:
        """Extend the lease, unless another has taken it.

        Raises:
            LeaseError: Another has.
        """
        self._check()
        self._write()

    def _check(self) -> None:
        found = _read(self._store)
        if found is not None and found.get("token") != self.token:
            self._taken_by = found
            self.ensure()

    def _write(self) -> None:
        expires = time.time() + self._seconds
        content = {**self._holder, "expires": expires, "seconds": self._seconds}
        self._store.write(NAME, json.dumps(content, indent=1).encode())
        self._expires = expires

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._seconds / _RENEWALS_PER_LEASE):
            try:
                self.renew()
            except StoreError as error:  # tried again; what is put asks before
                logger.warning("the lease was not renewed: %s", error)
            except LeaseError as error:
                logger.error("%s", error)
                return


class LeaseOfMain:
    """The lease that the main process of this run holds, as its other processes see it.

    It is read again as often as it is renewed.

    Args:
        store: The store.
        token: Of the lease.
    """

    def __init__(self, store: RoundsStore, token: str) -> None:
        self._store = store
        self._token = token
        self._known_until = 0.0
        self._taken_by: dict[str, Any] | None = None

    def ensure(self) -> None:
        """See that no other run holds the store, before something is put.

        Raises:
            LeaseError: Another run has taken it.
            StoreError: The lease has expired, or the store doesn't answer.
        """
        now = time.time()
        if self._taken_by is None and now >= self._known_until:
            found = _read(self._store)
            if found is None:  # the main process has ended its part, or writes it anew
                return
            if found.get("token") != self._token:
                self._taken_by = found
            elif found["expires"] <= now:
                raise StoreError(
                    f"{self._store.url}/{NAME} has expired, because the main process of this run has "
                    "not renewed it. Nothing is put until it has."
                )
            self._known_until = min(found["expires"], now + LEASE_S / _RENEWALS_PER_LEASE)
        if self._taken_by is not None:
            raise _taken_over(self._store, self._taken_by)


def _taken_over(store: RoundsStore, holder: dict[str, Any]) -> LeaseError:
    return LeaseError(
        f"another run has taken over rounds_dir={store.url!r}: process {holder.get('pid')} on "
        f"{holder.get('host')}, after this one had not renewed its lease in time. This run ends; its "
        "files are in output_dir, and nothing more of it goes to the store."
    )


def _read(store: RoundsStore) -> dict[str, Any] | None:
    content = store.read(NAME)
    if content is None:
        return None
    try:
        found: dict[str, Any] = json.loads(content)
        datetime.fromtimestamp(found["expires"])  # which messages tell
        return found
    except (ValueError, LookupError, TypeError, OverflowError, OSError, RecursionError):
        logger.warning("%s/%s can't be read, and counts for nothing.", store.url, NAME)
        return None


def _is_over(found: dict[str, Any]) -> bool:
    """Return whether a lease has expired, or is that of a process of this machine that has ended."""
    if found["expires"] <= time.time():
        return True
    here = _this_process()
    if found.get("place") is None or found["place"] != here["place"]:
        return False
    if found.get("pid") == here["pid"] and found.get("token") not in _TOKENS_HELD:
        return True  # it could not be deleted at its end
    try:
        # A clock that is set anew moves it a little.
        return abs(psutil.Process(found["pid"]).create_time() - found["started"]) > 60.0
    except (psutil.Error, LookupError, TypeError, ValueError):
        return True


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "place": _place(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _place() -> str | None:
    """Return what tells apart machines, their restarts, and containers, in which process ids count anew."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux: a lease counts until it expires
        return None
