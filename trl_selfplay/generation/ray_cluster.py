"""Connect this process to a Ray cluster, or start one on this machine, and leave it again.

In: an address. Out: the module `ray`, connected. Whoever asks first connects, and the last one to leave
disconnects; a connection that the user's code made is used and left as it is.
"""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

logger = logging.getLogger(__name__)

# `ray.init` itself waits for two minutes, and then ends the process.
_PATIENCE_S = 20.0
_TRY = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
INSTALL = 'Install it: pip install "trl-selfplay[ray]".'


class RayCluster:
    """A process's way to a cluster.

    Args:
        address: "host:port" of the cluster's head, "auto" for the one that this machine is a node of, or
            None: that of the variable RAY_ADDRESS, and without it a Ray of this process's own.
    """

    # Of this process, since Ray connects a process and not an object.
    _lock = Lock()
    _users = 0
    _thread: ThreadPoolExecutor | None = None  # while the connection is ours

    def __init__(self, address: str | None = None) -> None:
        self._address = address
        self._is_used = False

    def connect(self) -> Any:
        """Return the module `ray`, connected to the cluster.

        Raises:
            ImportError: Ray isn't installed.
            ConnectionError: No cluster answers at the address, or this machine isn't one of its nodes.
        """
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"use_ray=True, and Ray isn't installed. {INSTALL}") from error
        with RayCluster._lock:
            if not ray.is_initialized():
                self._join(ray)
            if not self._is_used:
                self._is_used = True
                RayCluster._users += 1
        return ray

    def release(self) -> None:
        """Leave; the last one closes the connection, unless the user's code has made it."""
        with RayCluster._lock:
            if not self._is_used:
                return
            self._is_used = False
            RayCluster._users -= 1
            if RayCluster._users == 0 and RayCluster._thread is not None:
                import ray

                RayCluster._thread.submit(ray.shutdown).result()
                RayCluster._thread.shutdown()
                RayCluster._thread = None

    def _join(self, ray: Any) -> None:
        """Connect, in a thread that lives as long as the connection.

        The kernel ends the processes of a local Ray with the thread that has started them. Outside the
        main thread Ray can't replace the process's handler of SIGTERM.
        """
        address = self._address or ("auto" if os.environ.get("RAY_ADDRESS") else "local")
        if address != "local":
            _check_answers(address)
        # A thread pool may be left from a connection that the user's code has closed.
        thread = RayCluster._thread or ThreadPoolExecutor(1, thread_name_prefix="ray")
        thread.submit(
            ray.init,
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({"include_dashboard": False} if address == "local" else {}),
        ).result()
        RayCluster._thread = thread


def _check_answers(address: str) -> None:
    """Raise ConnectionError unless another process can connect."""
    advice = (
        'Run the script on a node of the cluster (after "ray start", or with "ray job submit"), give '
        'ray_address="host:port" of its head or "auto"; or leave ray_address out for a Ray on this '
        "machine alone."
    )
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _TRY, address],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stderr or b""  # bytes, whatever was asked for
        raise ConnectionError(
            f"no Ray cluster answers at ray_address={address!r} within {_PATIENCE_S:.0f} s "
            f"({_last_line(said if isinstance(said, str) else said.decode(errors='replace'))}). {advice}"
        ) from error
    if tried.returncode != 0:
        raise ConnectionError(
            f"ray_address={address!r} can't be connected to ({_last_line(tried.stderr)}). {advice}"
        )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]
