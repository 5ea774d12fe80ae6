"""A run whose files a stranger has written: going on with it runs no code of theirs."""

import os
import pickle
import shutil
from contextlib import suppress

import pytest
import torch
from transformers import TrainerCallback

from trl_selfplay.disk import DamagedFileError


class StopsAt(TrainerCallback):
    """Interrupts training after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class CallsSystem:
    """Runs a command where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def stopped(build_star, tmp_path):
    """An output directory with a finished round, and checkpoints in the next."""
    trainer = build_star(num_rounds=1)
    trainer.train()
    trainer = build_star(callbacks=[StopsAt(3)], save_steps=1, save_strategy="steps")
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    return tmp_path / "run"


@pytest.fixture
def write_evil(tmp_path):
    """Put a pickle that leaves a mark in the place of a file; return whether one was loaded."""
    mark, inside = tmp_path / "mark", CallsSystem(tmp_path / "mark")

    def write(path, form):
        if form == "zip":
            torch.save(inside, path)
        else:
            path.write_bytes(pickle.dumps(inside))

    write.was_loaded = mark.exists
    return write


def kinds_of_files(run):
    """Return the last file of each name."""
    return {path.name: path for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("form", ["zip", pytest.param("pickle", marks=pytest.mark.slow)])
def test_files_that_torch_saves_run_no_code(build_star, stopped, write_evil, form) -> None:
    pickled = [path for path in stopped.rglob("*") if path.suffix in (".bin", ".pt", ".pth")]
    names = {path.name for path in pickled}
    assert names == {"training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"}
    for path in pickled:
        write_evil(path, form)
    build_star(save_steps=1, save_strategy="steps").train(resume_from_checkpoint=True)
    assert not write_evil.was_loaded()


@pytest.mark.full
def test_a_pickle_in_the_place_of_any_other_file_runs_no_code(
    build_star, tmp_path, stopped, write_evil
) -> None:
    copy = tmp_path / "copy"
    stopped.rename(copy)
    for name, path in kinds_of_files(copy).items():
        shutil.rmtree(stopped, ignore_errors=True)
        shutil.copytree(copy, stopped)
        write_evil(stopped / path.relative_to(copy), "pickle")
        with suppress(DamagedFileError, ValueError):  # of what can't be made again
            build_star(save_steps=1, save_strategy="steps").train(resume_from_checkpoint=True)
        assert not write_evil.was_loaded(), name
