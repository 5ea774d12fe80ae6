"""What else than a kill can go wrong in a run: what is told, what is kept, and that it goes on as if nothing was.

Real runs of tiny models, each in a process of its own.
"""

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from tiny_rewards import contains_solution
from tiny_runs import build, outcome_of, samples_of
from transformers import TrainerCallback

from trl_selfplay.termination import EXIT_CODE

RESUME = "resume with train(resume_from_checkpoint=True)"


class Breaks(TrainerCallback):
    """Raises at the second optimizer step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise ValueError("the callback breaks")


def break_callback(trainer: Any) -> None:
    trainer.add_callback(Breaks())


def break_loss(trainer: Any) -> None:
    compute, calls = trainer.compute_loss, []

    def loss(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)  # the first is the trial step's
        return compute(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    trainer.compute_loss = loss


def break_logits(trainer: Any) -> None:
    calls = []

    def hook(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        return output * float("nan") if not module.training and len(calls) > 30 else output

    trainer.model.get_base_model().lm_head.register_forward_hook(hook)


def _fill_memory(trainer: Any, in_training: bool, after: int) -> None:
    calls = []

    def hook(module: Any, args: Any) -> None:
        if module.training == in_training:
            calls.append(1)
            if len(calls) > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    trainer.model.get_base_model().model.register_forward_pre_hook(hook)


def fill_memory_in_training(trainer: Any) -> None:
    _fill_memory(trainer, True, 2)


def fill_memory_in_sampling(trainer: Any) -> None:
    _fill_memory(trainer, False, 30)


def break_decoding(trainer: Any) -> None:
    tokenizer, calls = trainer.self_play.collector.tokenizer, []
    decode = tokenizer.decode

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 40:
            raise KeyError("the tokenizer breaks")
        return decode(*args, **kwargs)

    tokenizer.decode = failing


def break_collator(trainer: Any) -> None:
    collate, calls = trainer.data_collator, []

    def failing(rows: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("the collator breaks")
        return collate(rows)

    trainer.data_collator = failing


# What is broken; which trainers meet it; what they are told; whether samples were kept before.
FAULTS: dict[str, tuple[Callable[[Any], None], tuple[str, ...], str]] = {
    "callback": (break_callback, ("STaR", "SPIN", "Quiet-STaR"), "the callback breaks"),
    "loss": (break_loss, ("ReST^EM", "IRPO"), "diverged: 8 trained weights hold NaN"),
    "logits": (break_logits, ("STaR",), "the model's logits are NaN at token"),
    "memory in training": (
        fill_memory_in_training, ("Quiet-STaR", "IRPO"), "Training is out of memory. Lower per_device",
    ),
    "memory in sampling": (fill_memory_in_sampling, ("SPIN",), "CUDA out of memory"),
    "decoding": (break_decoding, ("ReST^EM",), "the tokenizer breaks"),
    "collator": (break_collator, ("SPIN",), "the collator breaks"),
}  # fmt: skip
CASES = [(name, method) for name, (_, methods, _) in FAULTS.items() for method in methods]


def run(method: str, folder: str, source: str, fault: str | None, **changes: Any) -> None:
    """Begin a run that meets a fault, or go on with it."""
    trainer = build(method, folder, source, **changes)
    if fault is not None:
        FAULTS[fault][0](trainer)
    trainer.train(resume_from_checkpoint=fault is None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source) -> Callable[[str], Path]:
    """Return a function that gives the folder of a method's run that nothing happens to, run once."""
    found: dict[str, Path] = {}

    def folder_of(method: str) -> Path:
        if method not in found:
            folder = found[method] = tmp_path_factory.mktemp("whole") / "run"
            assert processes.call(run, method, str(folder), str(source), None) == 0
        return found[method]

    return folder_of


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "method"), CASES)
def test_a_fault_is_told_and_the_run_goes_on_as_if_it_had_not_been(
    fault, method, source, whole, tmp_path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    assert processes.call(run, method, str(folder), str(source), fault, log=log) == 1
    printed = log.read_text()
    assert FAULTS[fault][2] in printed
    assert RESUME in printed
    before = {r for rollouts in samples_of(folder).values() for r in rollouts}
    assert method == "Quiet-STaR" or before
    assert not list(folder.glob("*.safetensors"))  # nothing is taken for the trained model
    assert processes.call(run, method, str(folder), str(source), None) == 0
    expected, found = outcome_of(whole(method)), outcome_of(folder)
    if (
        fault == "memory in sampling"
    ):  # in other batches, in which log-probs differ by their rounding
        for outcome in (expected, found):
            del outcome["lines"]
            for name, rollouts in outcome["samples"].items():
                outcome["samples"][name] = [replace(r, logprob=None) for r in rollouts]
    assert found == expected
    sampled = {(r.prompt_id, r.completion_ids) for s in found["samples"].values() for r in s}
    assert {(r.prompt_id, r.completion_ids) for r in before} <= sampled


def train_without_rights(folder: str, source: str, kind: str) -> None:
    trainer = build("STaR", folder, source)
    if kind == "rights":
        os.setuid(65534)
    trainer.train()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("full", "free some space"),
        ("inodes", "free some space"),
        ("read-only", "the file system is read-only in"),
        ("rights", "this user may not write in"),
        ("file", "a file is in the place of a folder in"),
        ("long", "a path is too long in"),
    ],
)
def test_a_folder_that_cant_be_written_is_told_before_anything_is_sampled(
    kind, told, source, tmp_path
) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    options = {"full": "size=4k", "inodes": "nr_inodes=4", "read-only": "ro"}.get(kind)
    if (
        options
        and subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount]).returncode
    ):
        pytest.skip("this machine doesn't let a test mount a tmpfs")
    folder = mount / ("x" * 300 if kind == "long" else "run")
    if kind == "file":
        folder.write_text("in the way")
    if kind == "rights":
        for parent in tmp_path.parents:  # of pytest's, for root alone
            if parent.name.startswith("pytest-"):
                parent.chmod(0o755)
        tmp_path.chmod(0o755)
    try:
        log = tmp_path / "log"
        assert processes.call(train_without_rights, str(folder), str(source), kind, log=log) == 1
        printed = log.read_text()
        assert told in printed
        assert RESUME in printed
        assert not list(mount.rglob("*.parquet"))
    finally:
        if options:
            subprocess.run(["umount", "-l", mount], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a file system with these options, and mounts it again with others."""
    mount = tmp_path / "disk"
    mount.mkdir()

    def mounted(options: str) -> Path:
        again = "remount," if mount.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", mount]
        if os.name == "nt" or os.geteuid() != 0 or subprocess.run(command).returncode != 0:
            pytest.skip("this machine doesn't let a test mount a tmpfs")
        return mount

    yield mounted
    if mount.is_mount():
        subprocess.run(["umount", "-l", mount], check=True)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("ReST^EM", marks=pytest.mark.full),
        pytest.param("IRPO", marks=pytest.mark.full),
        pytest.param("SPIN", marks=pytest.mark.slow),
        pytest.param("Quiet-STaR", marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_disk_fills_up_says_so_and_goes_on_as_if_it_had_not(
    method, source, whole, disk, tmp_path
) -> None:
    sizes = [path.stat().st_blocks * 512 for path in whole(method).rglob("*")]
    mount, log = disk(f"size={sum(sizes) // 2}"), tmp_path / "log"
    assert processes.call(run, method, str(mount / "run"), str(source), None, log=log) == 1
    assert "free some space" in log.read_text()
    assert RESUME in log.read_text()
    before = samples_of(mount / "run")
    disk("size=1g")
    assert processes.call(run, method, str(mount / "run"), str(source), None) == 0
    found = outcome_of(mount / "run")
    assert found == outcome_of(whole(method))
    assert method == "Quiet-STaR" or before
    assert all(found["samples"][name] == rollouts for name, rollouts in before.items())


_pools: list[Any] = []


def grade_in_a_pool(completions: Any, solution: Any, **kwargs: Any) -> Any:
    """Grade in a process that lives on, as those of users often do."""
    if not _pools:
        _pools.append(multiprocessing.get_context("fork").Pool(1))
    return _pools[0].apply(contains_solution, (completions, solution))


def stop(trainer: Any) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(Stops())


def train_with_children(folder: str, source: str, is_stopped: bool) -> None:
    loaders = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = build("STaR", folder, source, reward_funcs=grade_in_a_pool, **loaders)
    if is_stopped:
        stop(trainer)
    trainer.train()
    assert multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize(("is_stopped", "code"), [(False, 0), (True, EXIT_CODE)])
def test_child_processes_that_live_on_keep_a_run_from_nothing(
    is_stopped, code, source, tmp_path
) -> None:
    arguments = (str(tmp_path / "run"), str(source), is_stopped)
    assert processes.call(train_with_children, *arguments) == code
