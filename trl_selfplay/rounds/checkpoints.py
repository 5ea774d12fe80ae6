"""Check that a checkpoint of the parent's training is whole, so that it continues exactly.

In: a folder of `checkpoint-*`, as `transformers.Trainer` writes them, with DeepSpeed's and FSDP's
layouts. Out: the newest one from which training can resume exactly.
"""

import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import TrainerCallback, TrainerState
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from trl_selfplay.disk import refuse_changed, save_checksums, tell_gone
from trl_selfplay.peers import from_main

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
# Name of a checkpoint's state once training no longer continues from it.
_PASSED_OVER = "trainer_state.passed_over.json"
# Files of `torch.save`, which are zip archives with a checksum of each part.
_TORCH_FILES = re.compile(
    r"(optimizer|pytorch_model|adapter_model|rng_state|rank\d+-of-).*\.(pt|pth|bin)"
    r"|(scheduler|scaler)\.pt"
)
# Classes and functions that such files name besides those of plain tensors, all of which only make data.
# NumPy's are those of arrays and numbers, in random states.
_NUMPY_NAMES = frozenset(
    ["numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType"]
    + [
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ]
)
# DeepSpeed's are those of its files, which it unpickles without a check of its own.
_DEEPSPEED_NAMES = _NUMPY_NAMES | {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


class SumsCheckpoints(TrainerCallback):
    """Writes into each checkpoint the checksums by which a changed weight is found on resume."""

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Sum up the newest checkpoint."""
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and newest.is_dir():
            save_checksums(newest)


def last_whole_checkpoint(folder: Path, accelerator: Accelerator) -> str | None:
    """Return the newest checkpoint in `folder` from which training can continue exactly.

    It holds weights, optimizer, scheduler, the random state of each process, the gradient scaler
    where there is one, and the trainer's state, all readable. Others stay on disk and are passed
    over with a warning: the state file is renamed, since training may write into them again. All
    processes must call this; the main one decides.

    Raises:
        ValueError: A checkpoint is whole, for another number of processes.
    """
    found = _find(folder, accelerator) if accelerator.is_main_process else None
    return from_main(accelerator, found)


def refuse_broken(checkpoint: Path, accelerator: Accelerator) -> None:
    """Raise ValueError, naming the file, if training can't continue exactly from a checkpoint."""
    fault = _first_fault(checkpoint, accelerator)
    if fault is not None:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r}: {fault}, so training would not go on as if "
            "never stopped. Pass True to take the newest whole checkpoint of output_dir."
        )


def _find(folder: Path, accelerator: Accelerator) -> str | None:
    for checkpoint in sorted(list_checkpoints(folder), key=_step, reverse=True):
        fault = _first_fault(checkpoint, accelerator)
        if fault is None:
            return str(checkpoint)
        logger.warning(
            "%s is incomplete (%s) and is skipped: training resumes from the complete checkpoint "
            "before it, or begins again.",
            checkpoint,
            fault,
        )
        _pass_over(checkpoint)
    return None


def pass_over_checkpoints(folder: Path) -> None:
    """Keep training from continuing at the checkpoints in `folder`, which stay on disk."""
    for checkpoint in list_checkpoints(folder):
        _pass_over(checkpoint)


def _pass_over(checkpoint: Path) -> None:
    tell_gone(checkpoint)
    if (checkpoint / _STATE).exists():
        (checkpoint / _STATE).rename(checkpoint / _PASSED_OVER)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders named checkpoint-<step>, whole or not."""
    return [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _first_fault(checkpoint: Path, accelerator: Accelerator) -> str | None:
    """Return what is missing from a checkpoint or can't be read, None if nothing is."""
    return next(_faults(checkpoint, accelerator), None)


def _faults(checkpoint: Path, accelerator: Accelerator) -> Iterator[str]:
    try:
        TrainerState.load_from_json(str(checkpoint / _STATE))
    except (OSError, ValueError, TypeError) as error:
        yield _describe(_STATE, error)
    try:
        refuse_changed(checkpoint)
    except (OSError, ValueError) as error:
        yield str(error)
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        if (unreadable := _read_error(path)) is not None:
            yield _describe(str(path.relative_to(checkpoint)), unreadable)
    if any(checkpoint.glob("global_step*")):  # DeepSpeed's own layout, loaded by DeepSpeed
        yield from _missing_in_deepspeed(checkpoint)
    else:
        if not _has_weights(checkpoint):
            yield "the weights are missing"
        # FSDP writes a folder or one file per rank, XLA rank0-of-8-optimizer.pt.
        if not any(checkpoint.glob("*optimizer*")):
            yield "optimizer.pt is missing"
        if not (checkpoint / "scheduler.pt").exists():
            yield "scheduler.pt is missing"
        if accelerator.scaler is not None and not (checkpoint / "scaler.pt").exists():
            yield "scaler.pt is missing"
        if accelerator.scaler is None and (checkpoint / "scaler.pt").exists():
            yield "scaler.pt is that of a training with fp16=True"
    yield from _missing_random_states(checkpoint, accelerator.num_processes)


def _describe(name: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing"
    return f"{name} can't be read: {str(error) or type(error).__name__}"


def _read_error(path: Path) -> Exception | None:
    """Return why a file can't be read, as far as its directory and checksums tell."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return None
        if path.name.endswith(".index.json"):
            for name in set(json.loads(path.read_text())["weight_map"].values()):
                (path.parent / name).stat()
        if path.name == "config.json":  # of a whole model: the parent reads which version wrote it
            json.loads(path.read_text())
        is_deepspeed = path.name.endswith("_states.pt")
        if is_deepspeed or _TORCH_FILES.fullmatch(path.name):
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    return ValueError(f"{damaged} in it is damaged")
            known = _DEEPSPEED_NAMES if is_deepspeed else _NUMPY_NAMES
            if foreign := sorted(set(get_unsafe_globals_in_checkpoint(path)) - known):
                return ValueError(f"loading it would call {', '.join(foreign)}: don't trust it")
        if path.suffix == ".distcp" and path.stat().st_size == 0:
            return EOFError("it is empty")
    except Exception as error:  # the readers raise errors of many types for a damaged file
        if isinstance(error, FileNotFoundError) and error.filename != str(path):
            return ValueError(f"{Path(error.filename).name}, which it lists, is missing")
        return error
    return None


def _has_weights(checkpoint: Path) -> bool:
    adapters = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
    whole = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
    return (
        any((checkpoint / name).exists() for name in (*whole, *adapters))
        or any(any(checkpoint.glob(f"*/{name}")) for name in adapters)  # adapters with a name
        or any(checkpoint.glob("pytorch_model_fsdp*"))
    )


def _missing_in_deepspeed(checkpoint: Path) -> Iterator[str]:
    try:
        tag = (checkpoint / "latest").read_text().strip()
    except (OSError, ValueError) as error:
        yield _describe("latest", error)
        return
    # DeepSpeed loads from wherever it leads; only what lies in the checkpoint has been looked at.
    if tag not in [path.name for path in checkpoint.iterdir() if not path.is_symlink()]:
        yield f"`latest` names {tag!r}, which is no folder in it"
    elif not any((checkpoint / tag).glob("*_model_states.pt")):
        yield f"{tag}, which `latest` names, holds no model states"


def _missing_random_states(checkpoint: Path, num_processes: int) -> Iterator[str]:
    """Return which process's random state is missing.

    Raises:
        ValueError: Those of another number of processes are there.
    """
    is_single = (checkpoint / "rng_state.pth").exists()
    num_ranks = len(list(checkpoint.glob("rng_state_*.pth")))
    # Fewer ranks than processes: killed before all had written.
    if num_processes == 1 and is_single:
        return
    written_by = num_ranks or int(is_single)
    if written_by > num_processes or (num_ranks == 0 and is_single):
        raise ValueError(
            f"{checkpoint} was written by {written_by} process(es), and there are {num_processes} "
            f"now, which would train on the rows in other batches. Go on with {written_by}, or "
            "delete the checkpoint folders beside it to begin that training again."
        )
    ranks = [""] if num_processes == 1 else [f"_{rank}" for rank in range(num_processes)]
    for rank in ranks:
        if not (checkpoint / f"rng_state{rank}.pth").exists():
            yield f"rng_state{rank}.pth is missing"
