"""Two processes share the sampling, and come to the samples and weights of one in round 0."""

import json
import os
import subprocess
import sys
from pathlib import Path

import graded_process
import pytest
import torch
from graded_process import samples_of_round_0
from processes import call, call_twice
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("graded_process.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("STaR", {}),
        ("IRPO", {"max_completion_length": 32, "max_per_prompt": 2}),
        ("ReST^EM", {"loss_weighting": "reward"}),
        ("vote", {}),
        ("ReST", {"improve_thresholds": [0.1, 0.3], "start_from": "previous"}),
        ("judged ReST", {"improve_thresholds": [0.1, 0.9], "start_from": "previous"}),
    ],
)
def test_two_processes_come_to_what_one_does(tmp_path, saved_tiny_model, method, changes) -> None:
    settings = json.dumps({"max_completion_length": 8, **changes})
    arguments = [method, str(saved_tiny_model), str(tmp_path / "one"), settings]
    assert call(graded_process.main, *arguments) == 0
    arguments[2] = str(tmp_path / "two")
    if method == "STaR":  # the others are told of each other as torchrun does it
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *TORCHRUN, str(SCRIPT), *arguments]
        subprocess.run(command, env=environment, check=True, timeout=1200)
    else:
        assert call_twice(graded_process.main, *arguments) == [0, 0]
    one, two = (samples_of_round_0(tmp_path / folder) for folder in ("one", "two"))
    assert one == two
    assert one
    first, second = (tmp_path / folder / "_rounds" for folder in ("one", "two"))
    lines = [
        [json.loads(line) for line in (root / "rounds.jsonl").read_text().splitlines()]
        for root in (first, second)
    ]
    assert len(lines[0]) == len(lines[1]) == (4 if method.endswith("ReST") else 2)
    for name in ("funnel", "rewards", "examples", "steps", "learning_rate"):
        assert lines[0][0][name] == lines[1][0][name]
    weights, others = (
        load_file(r / "round-000/model/adapter_model.safetensors") for r in (first, second)
    )
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5)
