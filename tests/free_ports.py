"""Ports of the loopback interface that nobody else gets.

A port that was found to be free may be another process's by the time it is used.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """Give a port on which nothing listens, and keep it from others until the block ends.

    A socket that may reuse addresses, as those of servers, can listen on it; the system gives it to no one
    who takes any port.
    """
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]
