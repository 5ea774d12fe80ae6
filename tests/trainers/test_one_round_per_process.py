"""A process for each round, started in a loop with a growing `num_rounds`."""

import json

import graded_process
import pytest
from processes import call
from safetensors.torch import load_file


def read_run(folder):
    lines = [json.loads(x) for x in (folder / "_rounds/rounds.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    models = sorted(folder.glob("_rounds/round-*/model/adapter_model.safetensors"))
    return lines, [load_file(path) for path in [*models, folder / "adapter_model.safetensors"]]


@pytest.mark.slow
def test_three_starts_of_one_round_equal_one_start_of_three(tmp_path, saved_tiny_model) -> None:
    """Bit for bit, with weights that go on from round to round."""

    def run(folder: str, num_rounds: int) -> int:
        changes = {"num_rounds": num_rounds, "start_from": "previous", "max_completion_length": 8}
        arguments = (str(saved_tiny_model), str(tmp_path / folder), json.dumps(changes))
        return call(graded_process.main, "STaR", *arguments)

    assert run("one start", 3) == 0
    for num_rounds in (1, 2, 3):
        assert run("three starts", num_rounds) == 0
    lines, models = read_run(tmp_path / "one start")
    found, others = read_run(tmp_path / "three starts")
    assert found == lines
    assert len(lines) == 3
    assert len(models) == len(others) == 4
    for one, other in zip(models, others, strict=True):
        assert all(tensor.equal(other[name]) for name, tensor in one.items())
