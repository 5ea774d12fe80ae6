"""A Ray on this machine for the tests of a session, as a user's script would start it."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil
import pytest

# A worker's share, so that all that a test starts has room on two CPUs.
SHARE = 0.4


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray with two CPUs, which stays until the session ends."""
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "trl-selfplay[ray]"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for is_last in (False, False, True):
            try:
                ray.init(
                    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
                    logging_level=logging.ERROR,
                )  # fmt: skip
                break
            except Exception:  # it gives its own processes 30 s, which a busy machine may need
                ray.shutdown()
                if is_last:
                    raise
        yield
        ray.shutdown()


@pytest.fixture
def worker_processes() -> Callable[[], list[psutil.Process]]:
    """Return a function that finds the processes of the workers that sample, the oldest first."""

    def find() -> list[psutil.Process]:
        found = []
        for process in psutil.Process(os.getpid()).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "RayWorker" in process.name() or "RayWorker" in "".join(process.cmdline()):
                    found.append((process.create_time(), process))
        return [process for _, process in sorted(found, key=lambda each: each[0])]

    return find
