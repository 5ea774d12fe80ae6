"""One process of a run is slow or ends: what the others do, and how the run goes on."""

import json
import signal
from pathlib import Path

import lost_process
import pytest
import torch
from graded_process import samples_of_round_0
from processes import call_group
from safetensors.torch import load_file

CHANGES = {
    "num_rounds": 1, "max_completion_length": 8, "ddp_timeout": lost_process.COLLECTIVE_S, "save_steps": 1,
}  # fmt: skip
KILLED = -signal.SIGKILL


def read_run(folder: Path):
    root = folder / "_rounds"
    (line,) = map(json.loads, (root / "rounds.jsonl").read_text().splitlines())
    for name in ("seconds", "heldout_seconds"):
        line.pop(name, None)
    return line, load_file(root / "round-000/model/adapter_model.safetensors")


@pytest.fixture
def run(tmp_path, saved_tiny_model):
    def start(name: str, count: int, fault: str = "none", rank: str = "1") -> tuple[list[int], str]:
        logs = tmp_path / "logs" / f"{name}-{fault}-{count}"
        logs.mkdir(parents=True)
        arguments = (fault, rank, str(saved_tiny_model), str(tmp_path / name), json.dumps(CHANGES))
        codes = call_group(count, lost_process.main, *arguments, logs=logs)
        return codes, (logs / "0").read_text()

    return start


@pytest.mark.slow
def test_a_run_goes_on_after_a_process_was_slow_or_ended(run, tmp_path) -> None:
    """Waiting takes longer than `ddp_timeout`; each run ends as the one in which no process ended."""
    codes, _ = run("whole", 2, "slow")
    assert codes == [0, 0]
    expected, weights = read_run(tmp_path / "whole")
    for fault, code in (
        ("killed while sampling", KILLED),
        ("killed while training", KILLED),
        ("out of memory", 1),
    ):
        codes, printed = run(fault, 2, fault)
        assert codes == [1, code]
        said = "process 1 has ended without a word"
        if fault == "out of memory":
            said = "process 1 stopped (OutOfMemoryError: tried to allocate 3 GiB)"
        assert f"PeerError: {said}" in printed
        if fault == "out of memory":
            continue
        assert run(fault, 2)[0] == [0, 0]
        line, others = read_run(tmp_path / fault)
        assert line == expected
        for name, tensor in weights.items():
            torch.testing.assert_close(others[name], tensor, rtol=1e-6, atol=1e-6)
    # The third goes on with one process, which is killed, and then with two again.
    fault = "out of memory"
    assert run(fault, 1, "killed while sampling", "0")[0] == [KILLED]
    codes, printed = run(fault, 2)
    assert codes == [0, 0]
    assert samples_of_round_0(tmp_path / fault) == samples_of_round_0(tmp_path / "whole")
    assert read_run(tmp_path / fault)[0]["funnel"] == expected["funnel"]
