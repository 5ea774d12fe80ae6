"""Interpreters for tests of engines: one with a stand-in for vLLM, and one with vLLM itself.

The stand-in is a package `vllm` of a few lines over the standard library, so that the worker and its
protocol run as they are. `TRL_SELFPLAY_VLLM_PYTHON` names the interpreter of an environment that has
vLLM; tests with the mark `vllm` use it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STAND_IN = Path(__file__).parent / "stand_in_engine"
VLLM_PYTHON = os.environ.get("TRL_SELFPLAY_VLLM_PYTHON")

needs_vllm = pytest.mark.skipif(
    VLLM_PYTHON is None, reason="TRL_SELFPLAY_VLLM_PYTHON names no interpreter that has vLLM"
)


class StandIn:
    """An interpreter whose `vllm` is the stand-in, and what its engines were told.

    Attributes:
        python: Path of the interpreter.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._log = folder / "engines.jsonl"
        self._log.touch()
        self._monkeypatch = monkeypatch
        script = folder / "python"
        script.write_text(f'#!/bin/sh\nPYTHONPATH={STAND_IN} exec {sys.executable} -S "$@"\n')
        script.chmod(0o755)
        self.python = str(script)
        self.plan()

    def plan(self, **what: Any) -> None:
        """Say what goes wrong in engines that start from now on: see `_Plan` of the stand-in."""
        self._monkeypatch.setenv("STAND_IN", json.dumps({"log": str(self._log), **what}))

    def notes(self, kind: str) -> list[dict[str, Any]]:
        """Return what the engines noted: "engine", "request", "abort", "orphan", "wrong"."""
        notes = map(json.loads, self._log.read_text().splitlines())
        return [note for note in notes if kind in note]


def stand_in_text() -> Callable[..., Iterator[int]]:
    """Return the function from prompt, seed and adapter to what the stand-in's engines write."""
    kept = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "vllm"}
    sys.path.insert(0, str(STAND_IN))
    try:
        import vllm

        return vllm.tokens_of
    finally:
        sys.path.remove(str(STAND_IN))
        for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
            del sys.modules[name]
        sys.modules.update(kept)
