"""Call tools and environments, in a process that is there for it.

In: tools and factories of environments, as they were sent; on a socket, calls. Out: on the socket, what each came
to, as JSON: nothing that ran here can run code where it is read. Whatever a tool does ends with this process.
"""

import asyncio
import contextlib
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import pickle
import random
import re
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from trl_selfplay.confidential import masked
from trl_selfplay.file_mask import mask_of_new_files
from trl_selfplay.generation.valid_text import valid_text

LENGTH = struct.Struct("!Q")
# Longer results are cut: no policy reads them, and all that is kept of a trajectory holds them.
MOST_CHARACTERS = 100_000
_NOTHING = {"error": "the tool returned nothing"}
# How Python shows an object that has no text of its own; the number differs from process to process.
_ADDRESS = re.compile(r"^<.* at 0x[0-9a-fA-F]+>$", re.DOTALL)


class Tools:
    """The tools of this process, and the environment that it was made for, if any.

    Args:
        functions: Tools by name.
        factories: Environments' factories by name; None is the name of the only one.
    """

    def __init__(
        self, functions: Mapping[str, Callable[..., Any]], factories: Mapping[str | None, Any]
    ) -> None:
        self._functions = functions
        self._factories = factories
        self._environment: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_calls = 0
        self._seeds = _Seeds()

    @classmethod
    def load(cls, sent: bytes) -> "Tools":
        """Return what `dill` made bytes of."""
        import dill

        return cls(*dill.loads(sent))

    def serve(self, calls: socket.socket) -> None:
        """Answer calls until the socket closes."""
        own = os.getpid()
        sys.meta_path.insert(0, self._seeds)
        send_json(calls, {"ready": True})
        with calls.makefile("rb") as requests:
            while header := requests.read(LENGTH.size):
                request = requests.read(*LENGTH.unpack(header))
                answer = self._answer(request)
                if os.getpid() != own:
                    os._exit(1)  # a process that the tool forked, and that came back from it
                send_json(calls, answer)

    def _answer(self, request: bytes) -> dict[str, Any]:
        before = _settings()
        keeps_processes = False
        try:
            kind, seed, *rest = pickle.loads(request)
            self._seeds.set(seed)
            if kind == "call":
                called = self._functions.get(rest[0])
                keeps_processes = getattr(called, "keeps_processes", False)
            asked: dict[str, Callable[..., dict[str, Any]]] = {
                "reset": self._reset,
                "call": self._call,
                "reward": self._reward,
            }
            answer = asked[kind](*rest)
        # All that a tool raises is an observation, also SystemExit and what is no Exception.
        except BaseException as error:
            text = f"{type(error).__name__}: {_text_of_error(error)}"
            # A client's error may hold the address or the key that it was called with.
            answer = {"error": clean(masked(text)), "is_made": self._environment is not None}
        self._num_calls += 1
        # What a first call starts, as a pool of threads, may serve all that follow.
        may_grow = {"threads"} if self._num_calls == 1 else set()
        if keeps_processes:  # of a ready tool: its workers hold nothing of a call
            may_grow.add("processes")
        return {**answer, "is_spent": _has_changed(before, _settings(), may_grow)}

    def _reset(self, name: str | None, columns: Mapping[str, Any]) -> dict[str, Any]:
        self._environment = self._factories[name]()
        found = self._wait_for(self._environment.reset(**columns))
        if isinstance(found, list):
            json.dumps(found)  # raises what it can't hold
        elif isinstance(found, str):
            found = clean(found)
        elif found is not None:
            raise TypeError(
                f"it returned a {type(found).__name__}; expected text, a list of text parts, or None"
            )
        return {"observation": found}

    def _call(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        tool = self._functions.get(name) or getattr(self._environment, name)
        return _read(self._wait_for(tool(**arguments)))

    def _reward(self) -> dict[str, Any]:
        return {"reward": float(self._wait_for(self._environment.get_reward()))}

    def _wait_for(self, value: Any) -> Any:
        """Return what an async function comes to; its loop lives on, as connections may need it."""
        if not inspect.isawaitable(value):
            return value
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        return self._loop.run_until_complete(_awaited(value))


def send_json(answers: socket.socket, answer: Mapping[str, Any]) -> None:
    """Send an answer as a line."""
    answers.sendall(json.dumps(answer).encode() + b"\n")


def clean(text: str) -> str:
    """Return text that every tokenizer takes, cut with a note if it is too long."""
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]}… (cut: {len(text):,} characters)"
    return valid_text(text)


async def _awaited(value: Any) -> Any:
    return await value


def _read(value: Any) -> dict[str, Any]:
    """Return a tool's value as text, as GRPOTrainer does: `str(value)`, or a list of text parts."""
    if value is None:
        return _NOTHING
    if isinstance(value, list) and value and all(_is_part(part) for part in value):
        others = {str(part["type"]) for part in value} - {"text"}
        if others:
            return {"error": f"the tool returned {sorted(others)}; only text can be shown"}
        value = "".join(str(part.get("text", "")) for part in value)
    text = str(value)
    if _ADDRESS.match(text):
        return {"error": f"the tool returned a {type(value).__name__}, which is no text"}
    if not text.strip():
        return _NOTHING
    return {"content": clean(text)}


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and "type" in part


def _text_of_error(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of an error whose own text fails
        return "(an error that can't be printed)"


class _Seeds(importlib.abc.MetaPathFinder):
    """Makes what is drawn at random depend on the trajectory, not on what was called here before.

    A library that a call is the first to import is seeded when it has been loaded.
    """

    def __init__(self) -> None:
        self._seed = 0
        self._seeders: dict[str, Callable[[Any], None]] = {
            "numpy": lambda numpy: numpy.random.seed(self._seed % 2**32),
            "torch": lambda torch: torch.manual_seed(self._seed),
        }

    def set(self, seed: int) -> None:
        """Seed what is loaded, and remember the seed for what isn't."""
        self._seed = seed
        random.seed(seed)
        for name in self._seeders.keys() & sys.modules.keys():
            self._seeders[name](sys.modules[name])

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Return how a library is loaded and then seeded; None for any other module."""
        if fullname not in self._seeders:
            return None
        spec: Any = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_seed(module: ModuleType) -> None:
                load(module)
                self._seeders[fullname](module)

            spec.loader.exec_module = load_and_seed
        return spec


def _settings() -> dict[str, Any]:
    """Return what of this process a call may change for later ones."""
    found: dict[str, Any] = {
        "environment": dict(os.environ),
        "streams": [(stream, stream.closed) for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "handlers": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "timer": signal.getitimer(signal.ITIMER_REAL)[1],
        "recursion": sys.getrecursionlimit(),
        "threads": threading.active_count(),
        "processes": 0,
    }
    with contextlib.suppress(OSError):  # a folder that is gone, or closed streams
        found["folder"] = os.getcwd()  # noqa: PTH109  # a string
        found["files"] = [os.fstat(descriptor).st_ino for descriptor in range(3)]
    with contextlib.suppress(OSError):
        found["mask"] = mask_of_new_files()
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:  # noqa: PTH123
        found["processes"] = len(file.read().split())
    return found


def _has_changed(before: Mapping[str, Any], after: Mapping[str, Any], may_grow: set[str]) -> bool:
    """Return whether a call changed what later ones depend on."""
    grows = {"threads", "processes"}
    grown = any(after[name] > before[name] for name in grows - may_grow)
    return grown or any(before.get(n) != after.get(n) for n in {*before, *after} - grows)
