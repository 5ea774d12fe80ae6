"""The processes of a run: how they wait for each other, share work, and notice that one has ended.

In: the trainer's accelerator. Out: waits without a time limit, a counter that all processes draw from,
and `PeerError` where another process has ended.

Collectives of NCCL and gloo fail after their timeout, and processes that sample are ready at different
times. So they wait here, and only then use a collective. One of them holds a `TCPStore`, and a
connection to each other one, by which all learn of an end: a process that stops says why, and that of a
killed one is closed by its system.
"""

import logging
import os
import secrets
import selectors
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from threading import Event, Thread
from typing import Any, TypeVar, cast

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from trl_selfplay.disk import RESUME
from trl_selfplay.forks import in_forks

logger = logging.getLogger(__name__)

# A process that hangs in a collective or in foreign code, and so doesn't see that another has ended,
# is ended after this time.
_GRACE_S = 30.0
# How long an error that a collective raises may be ahead of the news that a process has ended.
_NEWS_S = 3.0
_CONNECT_S = 60.0
# How long one that has connected may take to say who it is, before it is taken for a stranger.
_HELLO_S = 20.0
_TOKEN_BYTES, _RANK_BYTES = 16, 4
_GOODBYE = b"\0"
# A link is given up for lost after 25 s without an answer from the other machine.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}

Value = TypeVar("Value")


class PeerError(RuntimeError):
    """Another process of the run has ended, so that this one can't go on."""


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Notice within this context if a process ends; all processes enter and leave it together.

    Raises:
        PeerError: Another process has ended, or raised an error. It is raised by the functions below,
            and in place of the error of a collective. A process in which none of this happens within
            30 s ends with exit code 1.
    """
    global _current
    if accelerator.num_processes == 1 or _current is not None:
        yield
        return
    peers = _current = _Peers(accelerator)
    try:
        with in_forks(_forget):
            yield
            peers.wait()
    except PeerError:
        raise
    except BaseException as error:
        is_from_collective = type(error) is RuntimeError or isinstance(error, dist.DistError)
        if is_from_collective and peers.lost.wait(_NEWS_S):
            raise PeerError(peers.reason) from error
        peers.tell(f"process {accelerator.process_index} stopped ({_describe(error)})".encode())
        raise
    else:
        peers.leave()
    finally:
        _current = None
        peers.close()


def wait_for_all(accelerator: Accelerator) -> None:
    """Return when all processes have called this, however long that takes.

    Raises:
        PeerError: Another process has ended.
    """
    if accelerator.num_processes > 1:
        with together(accelerator):
            assert _current is not None
            _current.wait()


def from_main(accelerator: Accelerator, value: Value) -> Value:
    """Return the main process's value in all processes, however long it took to make.

    Raises:
        PeerError: Another process has ended.
    """
    if accelerator.num_processes == 1:
        return value
    wait_for_all(accelerator)
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def gather(accelerator: Accelerator, items: list[Value]) -> list[Value]:
    """Return the items of all processes, by rank, however long they took to make.

    Raises:
        PeerError: Another process has ended.
    """
    if accelerator.num_processes == 1:
        return items
    wait_for_all(accelerator)
    return cast("list[Value]", gather_object(items))


def check_peers() -> None:
    """Raise PeerError if another process has ended."""
    if _current is not None:
        _current.check()


def shared_counter() -> Callable[[], int]:
    """Return a function that gives 0, 1, 2, …, each number in one process alone.

    Every process within `together` calls this equally often, in the same order.
    """
    return count().__next__ if _current is None else _current.counter()


class _Peers:
    """The processes within a `together`, as one of them sees them.

    Attributes:
        lost: Set when another process has ended.
        reason: What is known of it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        """Connect the processes; all of them call this.

        Raises:
            OSError: They can't reach each other.
        """
        self.lost, self.reason = Event(), ""
        self._num_processes = accelerator.num_processes
        self._num_waits = self._num_counters = 0
        self._closed, self._all_left = Event(), Event()
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        if accelerator.is_main_process:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            token = secrets.token_bytes(_TOKEN_BYTES)
            with _listen() as listener:
                port = listener.getsockname()[1]
                broadcast_object_list([(host, self._store.port, port, token)])
                self._links = _accept(listener, token, self._num_processes - 1)
        else:
            shared: list[Any] = [None]
            broadcast_object_list(shared)
            host, store_port, port, token = shared[0]
            self._store = dist.TCPStore(host, store_port, is_master=False)
            link = socket.create_connection((host, port), timeout=_CONNECT_S)
            link.sendall(token + accelerator.process_index.to_bytes(_RANK_BYTES, "big"))
            self._links = {link: 0}
        for link in self._links:
            _keep_alive(link)
        self._is_main = accelerator.is_main_process
        self._wake, self._woken = socket.socketpair()
        self._thread = Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise PeerError if another process has ended."""
        if self.lost.is_set():
            raise PeerError(self.reason)

    def wait(self) -> None:
        """Return when all processes have called this as often."""
        self._num_waits += 1
        key, delay = f"wait-{self._num_waits}", 0.002
        self._store.add(key, 1)
        # `Store.wait` writes to stderr whenever its timeout passes.
        while self._store.add(key, 0) < self._num_processes:
            if self.lost.wait(delay):
                raise PeerError(self.reason)
            delay = min(2.0 * delay, 0.5)

    def counter(self) -> Callable[[], int]:
        """Return a counter that all processes share."""
        self._num_counters += 1
        key = f"counter-{self._num_counters}"
        return lambda: self._store.add(key, 1) - 1

    def tell(self, words: bytes) -> None:
        """Send the processes that this one is connected with why it stops, or that it is ready."""
        for link in self._links:
            with suppress(OSError):
                link.sendall(words)

    def leave(self) -> None:
        """Say that this process is ready; the main one, which holds the store, waits for the others."""
        if self._is_main:
            self._all_left.wait(_GRACE_S)
        else:
            self.tell(_GOODBYE)

    def close(self) -> None:
        """Close the connections; the others notice."""
        self._closed.set()
        # Closing it wouldn't end the thread while a forked process has a copy.
        with suppress(OSError):  # it is closed already in a fork
            self._wake.shutdown(socket.SHUT_WR)
        self._thread.join()
        self.close_sockets()

    def close_sockets(self) -> None:
        """Close this process's sockets, or a fork's copies, which would outlive the process."""
        for each in (*self._links, self._wake, self._woken):
            each.close()

    def _watch(self) -> None:
        """Listen to the connections until this process closes them, or another one has ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for link in self._links:
                selector.register(link, selectors.EVENT_READ)
            while len(selector.get_map()) > 1:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        return
                    link = cast("socket.socket", key.fileobj)
                    selector.unregister(link)
                    if (words := _read(link)) != _GOODBYE:
                        self._lose(self._links[link], words)
                        return
            self._all_left.set()

    def _lose(self, rank: int, words: bytes) -> None:
        """Tell all what is known of an end, and end this process if it doesn't end by itself."""
        what = words.decode(errors="replace") or (
            f"process {rank} has ended without a word: it was killed, ran out of memory, or its machine "
            "is gone"
        )
        if self._is_main:
            self.tell(what.encode())
        self.reason = (
            f"{what}. The processes of a run need each other. Samples, scores, finished rounds and "
            f"complete checkpoints are kept: see to the cause, then {RESUME}."
        )
        self.lost.set()
        if not self._closed.wait(_GRACE_S):
            logger.critical("PeerError: %s", self.reason)
            os._exit(1)


_current: _Peers | None = None


def _listen() -> socket.socket:
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=is_dual)


def _accept(listener: socket.socket, token: bytes, count: int) -> dict[socket.socket, int]:
    """Return the connections of the other processes, with their ranks; no one else's."""
    listener.settimeout(_CONNECT_S)
    links: dict[socket.socket, int] = {}
    while len(links) < count:
        link, _ = listener.accept()
        given = _read(link, _TOKEN_BYTES + _RANK_BYTES, _HELLO_S)
        if secrets.compare_digest(given[:_TOKEN_BYTES], token):
            links[link] = int.from_bytes(given[_TOKEN_BYTES:], "big")
        else:
            link.close()
    return links


def _read(link: socket.socket, size: int = 1 << 16, pause_s: float = 1.0) -> bytes:
    """Return what comes until the other side closes, pauses for as long or has sent `size` bytes."""
    read = b""
    link.settimeout(pause_s)
    with suppress(OSError):
        while len(read) < size and read != _GOODBYE and (more := link.recv(size - len(read))):
            read += more
    return read


def _keep_alive(link: socket.socket) -> None:
    """Let the system ask a silent connection whether the other machine is still there."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):  # they differ between systems
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _forget() -> None:
    """Close the connections in a process that this one has forked."""
    global _current
    if _current is not None:
        _current.close_sockets()
        _current = None


def _describe(error: BaseException) -> str:
    """Return an error's type and text, short enough for one message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:2000]}" if text else type(error).__name__
