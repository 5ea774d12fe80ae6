"""Runs whose rounds are kept on an S3 server: killed, their disk lost, gone on with elsewhere."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from processes import call, call_twice
from safetensors.torch import load_file
from stored_run import Kill, run

from trl_selfplay.rounds.store import RoundsStore, scan


@pytest.fixture
def arguments(tmp_path, saved_tiny_model, sums):
    """Return a function that gives the arguments of `stored_run.run`."""
    rows = tmp_path / "rows.json"
    table = sums(16).to_list()
    rows.write_text(json.dumps({"train": table[:12], "heldout": table[12:]}))

    def build(method: str, folder: str, rounds_dir: str | None, kill: Kill | None) -> tuple:
        return (method, str(tmp_path / folder), str(saved_tiny_model), str(rows), rounds_dir, kill)

    return build


@pytest.fixture
def stored(arguments, s3):
    """Return a function that runs, or goes on with, a run in a process of its own: its exit code."""
    return lambda method, folder, rounds_dir=None, kill=None: call(
        run, *arguments(method, folder, rounds_dir, kill)
    )


@pytest.fixture
def stored_by_two(arguments, s3):
    """Return a function that does the same with STaR in two processes: their exit codes."""
    return lambda folder, rounds_dir=None, kill=None: call_twice(
        run, *arguments("STaR", folder, rounds_dir, kill)
    )


def read_run(folder: Path) -> tuple[Any, ...]:
    """Return what must be equal: lines without seconds, rollouts, and rows trained on."""
    rounds = folder / "_rounds"
    lines = [json.loads(line) for line in (rounds / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    tables = {
        str(path.relative_to(folder)): pq.read_table(path).to_pylist()
        for path in sorted(rounds.rglob("*.parquet"))
    }
    rows = [load_from_disk(str(path)).to_list() for path in sorted(rounds.glob("*/dataset"))]
    return lines, tables, rows


def assert_equal_runs(one: Path, other: Path) -> None:
    assert read_run(one) == read_run(other)
    weights, expected = (load_file(each / "adapter_model.safetensors") for each in (one, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kills"),
    [
        # In a checkpoint of round 0, which is put file by file; between its steps; in round 1.
        ("STaR", [("sampling", 17), ("putting", 25), ("training", 1), ("putting", 20)]),
        ("SPIN", [("putting", 8), ("training", 1), ("putting", 30)]),
    ],
)
def test_a_run_killed_again_and_again_goes_on_from_the_store_alone(
    stored, s3, tmp_path, method, kills
) -> None:
    assert stored(method, "whole") == 0
    bucket = s3.make_bucket()
    url = f"s3://{bucket}/a/run"
    for number, (phase, after) in enumerate(kills):
        folder = f"machine-{number}"
        assert stored(method, folder, url, Kill(phase, after)) == -signal.SIGKILL
        assert (tmp_path / folder).exists()
        shutil.rmtree(tmp_path / folder)
    assert stored(method, "last", url) == 0
    assert_equal_runs(tmp_path / "last", tmp_path / "whole")
    shutil.rmtree(tmp_path / "last")
    assert stored(method, "read", url) == 0  # all rounds are finished
    assert_equal_runs(tmp_path / "read", tmp_path / "whole")
    names = sorted(s3.objects(bucket))
    assert not [name for name in names if "checkpoint" in name or "_lease" in name]


@pytest.mark.slow
def test_each_of_two_processes_puts_its_shards_and_both_go_on_from_the_store_alone(
    stored_by_two, s3, tmp_path
) -> None:
    assert stored_by_two("whole") == [0, 0]
    store = RoundsStore(f"s3://{s3.make_bucket()}/run")
    assert -signal.SIGKILL in stored_by_two("lost", store.url, Kill("training", 1))
    lost = scan(tmp_path / "lost" / "_rounds").keys()
    assert len([name for name in lost if "round-000/samples/0" in name]) > 1
    assert store.entries().keys() >= {name for name in lost if "checkpoint" not in name}
    assert "round-000/checkpoint-1" in store.entries()
    shutil.rmtree(tmp_path / "lost")
    assert stored_by_two("last", store.url) == [0, 0]
    assert_equal_runs(tmp_path / "last", tmp_path / "whole")
    assert store.entries().keys() == scan(tmp_path / "last" / "_rounds").keys()
