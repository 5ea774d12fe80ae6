"""Processes for tests, forked from one that has imported the trainers already.

In: a function or a script. Out: its exit code, negative where a signal ended it, and what it
printed. Importing takes a new interpreter longer than a tiny run does; the fork server imports
once, and what it forks has neither threads nor anything else of the test that asked for it. What
only a new interpreter shows, such as another hash seed, is tested with `subprocess`.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from free_ports import reserved_port

import trl_selfplay

_TIMEOUT_S = 1200  # a machine may be busy
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(sorted({*trl_selfplay._MODULE_OF.values()}))


def start(
    function: Callable[..., Any],
    *arguments: Any,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Call a function in a process of its own, with these changes to its environment.

    Args:
        function: A module's function, which is imported there by its name.
        arguments: Its arguments.
        log: File that gets what the process prints.
        environment: Variables that the process gets besides those of this one.
    """
    process = _CONTEXT.Process(
        target=_call, args=(function, arguments, log, {**os.environ, **(environment or {})})
    )
    process.start()
    return process


def _call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    log: Path | None,
    environment: Mapping[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # tests in other processes share the cores
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    function(*arguments)


def wait_for(process: BaseProcess) -> int:
    """Return the exit code of a process; one that hangs is killed, and an error."""
    process.join(_TIMEOUT_S)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"a process did not end in {_TIMEOUT_S} s")
    return process.exitcode


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """Call a function in a process of its own, wait for its end, and return its exit code."""
    return wait_for(start(function, *arguments, **options))


def call_group(
    count: int, function: Callable[..., Any], *arguments: Any, logs: Path | None = None
) -> list[int]:
    """Call a function in processes that know of each other as `torchrun` would tell them.

    Args:
        count: Number of processes.
        function: As for `start`.
        arguments: As for `start`.
        logs: Folder for what each prints, in a file named after its rank.

    Returns:
        Their exit codes.
    """
    with reserved_port() as port:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        started = [
            start(function, *arguments, environment=rank, log=logs and logs / rank["RANK"])
            for rank in ranks
        ]
        return [wait_for(process) for process in started]


def call_twice(function: Callable[..., Any], *arguments: Any) -> list[int]:
    """Call a function in two processes that know of each other, and return their exit codes."""
    return call_group(2, function, *arguments)


def run_script(path: Path, arguments: list[str], folder: Path) -> tuple[int, str]:
    """Run a script in a folder, and return its exit code and what it printed."""
    log = folder / "printed.txt"
    code = call(_run_script, str(path), arguments, str(folder), log=log)
    return code, log.read_text()


def _run_script(path: str, arguments: list[str], folder: str) -> None:
    os.chdir(folder)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
