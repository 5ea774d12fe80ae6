"""What the runs of this folder read: a tiny model, a reward model, a dozen sums."""

import shutil

import pytest
from fault_runs import write_inputs
from survival import run_whole


@pytest.fixture
def fault_base(tmp_path, tiny_model, word_tokenizer, sums):
    """A folder with the inputs of `fault_runs.RUNS`."""
    (tmp_path / "inputs").mkdir()
    write_inputs(
        tmp_path / "inputs", tiny_model(word_tokenizer), word_tokenizer, sums(16).to_list()
    )
    return tmp_path


@pytest.fixture
def star_base(fault_base):
    """The same, with the STaR run that V-STaR reads."""
    whole = run_whole(fault_base, "STaR")
    shutil.copytree(whole, fault_base / "inputs" / "star")
    return fault_base
