"""What a run leaves survives a power cut: every file and folder is synced, under its final name."""

import json
import os
from pathlib import Path

import pytest
from fault_runs import run
from processes import call


def run_and_list(folder: str, name: str, inputs: str, listing: str) -> None:
    """Run, and list the files and folders of the rounds that were never synced."""
    synced: set[tuple[int, int]] = set()
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.add((status.st_dev, status.st_ino))
        fsync(descriptor)

    os.fsync = watched
    run(folder, name, inputs, None)
    rounds = Path(folder) / "_rounds"
    found = [Path(folder), rounds, *rounds.rglob("*")]
    states = {path: path.stat() for path in found}
    left = [str(p) for p, s in states.items() if (s.st_dev, s.st_ino) not in synced]
    Path(listing).write_text(json.dumps([len(found), left]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["STaR", "SPIN"])
def test_every_file_and_folder_of_the_rounds_is_synced(name, fault_base) -> None:
    listing = fault_base / "listing.json"
    arguments = (str(fault_base / "run"), name, str(fault_base / "inputs"), str(listing))
    assert call(run_and_list, *arguments) == 0
    count, left = json.loads(listing.read_text())
    assert count > 20
    assert left == []
    temporary = [p.name for p in (fault_base / "run" / "_rounds").rglob(".*")]
    assert temporary == []
