"""One sampler of many, as it runs in an actor of Ray's on some node of a cluster.

In: the current weights as folders, which the node has or is sent, and requests. Out: completions in
groups, as they finish. Only the in-process sampler, or a vLLM engine, does the work.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from trl_selfplay.generation.engine import EngineSettings, EngineWeights
from trl_selfplay.generation.model_traits import ModelTraits
from trl_selfplay.generation.sampler import (
    SampledCompletion,
    Sampler,
    SampleRequest,
    SamplingOptions,
)
from trl_selfplay.generation.transformers_sampler import TransformersSampler

# Completions that finish within this time travel together.
_SECONDS_PER_GROUP = 0.2
# Of each file's beginning and end, for its folder's digest.
_COMPARED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """How a worker samples.

    Attributes:
        tokenizer: The trainer's.
        traits: The model's.
        device: "cuda" or "cpu".
        settings: Of the engine; without one, its precision is that of the model.
        uses_vllm: Whether vLLM samples, or transformers.
        attention: The trainer's `attn_implementation`; None for the default.
    """

    tokenizer: PreTrainedTokenizerBase
    traits: ModelTraits
    device: str
    settings: EngineSettings
    uses_vllm: bool = False
    attention: str | None = None


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder with weights.

    Attributes:
        path: Where it is on the trainer's machine.
        digest: Of the names and sizes of its files, and of how each begins and ends.
    """

    path: str
    digest: str


def describe_folder(path: Path | str) -> Folder:
    """Return a folder's digest; the files of folders within it don't count."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files_of(path):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            digest.update(content.read(_COMPARED_BYTES))
            content.seek(max(0, size - _COMPARED_BYTES))
            digest.update(content.read(_COMPARED_BYTES))
    return Folder(str(path), digest.hexdigest())


def files_of(path: Path | str) -> list[Path]:
    """Return the files of a folder in the order of their names."""
    return sorted(file for file in Path(path).iterdir() if file.is_file())


class RayWorker:
    """A sampler in a process of its own.

    Args:
        plan: How it samples.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan
        self._sampler: Sampler | None = None
        self._weights: EngineWeights | None = None
        self._copies: set[Path] = set()

    def lacks(self, folders: Sequence[Folder]) -> list[Folder]:
        """Return those of the folders that this node doesn't have, at their place or as a copy."""
        return [folder for folder in folders if _find(folder) is None]

    def load(
        self,
        weights: EngineWeights,
        folders: Sequence[Folder],
        files: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Sample with these weights from now on; return the record of what samples.

        Args:
            weights: As they are called on the trainer's machine.
            folders: The folders of the weights.
            files: The content of each folder that `lacks` named: by path, the bytes of each file, or
                references to them in Ray's object store.
        """
        places = {}
        for folder in folders:
            place = _find(folder)
            if place is None:
                place = _write_copy(folder, files[folder.path])
                self._copies.add(place)
            places[folder.path] = place
        local = replace(
            weights,
            model=str(places.get(weights.model, weights.model)),
            adapter=None if weights.adapter is None else places[str(weights.adapter)],
        )
        settings = self._plan.settings
        if self._plan.uses_vllm:
            self._weights = local  # before the engine asks for them
            self._sampler = self._sampler or self._build_engine()
        else:
            self._sampler = None  # frees the model before
            self._sampler = self._build_sampler(local)
            self._weights = local
        return {
            "engine": "ray",
            "sampler": "vllm" if self._plan.uses_vllm else "transformers",
            "version": transformers.__version__,
            "device": self._plan.device,
            "dtype": settings.dtype,
            "quantization": settings.quantization,
        }

    def suggest_batch_size(self, longest_prompt: int, max_completion_length: int) -> int:
        """Return how many sequences this worker takes at once."""
        return self._loaded().suggest_batch_size(longest_prompt, max_completion_length)

    def sample(
        self,
        version: int | str,
        requests: Sequence[SampleRequest],
        options: SamplingOptions,
        batch_size: int,
    ) -> Iterator[list[tuple[int, SampledCompletion]]]:
        """Yield `(index of the request, completion)` pairs in lists, each request once.

        Raises:
            RuntimeError: The worker has another version of the weights.
        """
        held = None if self._weights is None else self._weights.version
        if held != version:
            raise RuntimeError(
                f"the worker has weights {held!r} and is to sample with {version!r}."
            )
        group, since = [], time.monotonic()
        for index, completion in self._loaded().sample(requests, options, batch_size):
            group.append((index, completion))
            if time.monotonic() - since >= _SECONDS_PER_GROUP:
                yield group
                group, since = [], time.monotonic()
        if group:
            yield group

    def close(self) -> None:
        """End an engine, and delete the copies of weights that this worker has written."""
        if self._sampler is not None:
            self._sampler.release()
        for copy in self._copies:
            shutil.rmtree(copy, ignore_errors=True)

    def _loaded(self) -> Sampler:
        if self._sampler is None:
            raise RuntimeError("the worker has no weights yet; report this.")
        return self._sampler

    def _build_sampler(self, weights: EngineWeights) -> Sampler:
        plan = self._plan
        model: Any = AutoModelForCausalLM.from_pretrained(
            weights.model,
            dtype=getattr(torch, plan.settings.dtype),
            attn_implementation=plan.attention,
            trust_remote_code=plan.settings.trust_remote_code,
        )
        if weights.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(weights.adapter))
        model.to(plan.device).eval()
        return TransformersSampler(model, plan.tokenizer, traits=plan.traits)

    def _build_engine(self) -> Sampler:
        from trl_selfplay.generation.vllm_sampler import VLLMSampler

        plan = self._plan
        return VLLMSampler(
            plan.settings, self._current_weights, plan.tokenizer, plan.traits, plan.device
        )

    def _current_weights(self) -> EngineWeights:
        assert self._weights is not None
        return self._weights


def _find(folder: Folder) -> Path | None:
    """Return where this node has the folder; None if it hasn't."""
    if (copy := _place_of_copies() / folder.digest).is_dir():
        return copy
    path = Path(folder.path)
    try:
        same = path.is_dir() and describe_folder(path) == folder
    except OSError:  # a disk of its own, where it may not be read
        same = False
    return path if same else None


def _write_copy(folder: Folder, files: Mapping[str, Any]) -> Path:
    """Write a folder that was sent; it is there whole or not at all."""
    place = _place_of_copies() / folder.digest
    temporary = Path(tempfile.mkdtemp(dir=place.parent))
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(_bytes_of(content))
        temporary.rename(place)
    except OSError:
        if not place.is_dir():  # by another worker of this node
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def _bytes_of(content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    import ray

    return ray.get(content)


def _place_of_copies() -> Path:
    """Return this user's folder for copies, in the node's folder for temporary files.

    Raises:
        PermissionError: Somebody else has made it.
    """
    place = Path(tempfile.gettempdir()) / f"trl-selfplay-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise PermissionError(f"{place} belongs to another user; set TMPDIR on this node.")
    return place
