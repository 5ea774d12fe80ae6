"""What the runs of this folder read: a tiny model, and a reward model."""

import shutil

import pytest
from fault_runs import write_inputs
from survival import run_whole
from tiny_models import save_tiny_model


@pytest.fixture
def fault_base(tmp_path):
    """A folder with the inputs of `fault_runs.RUNS`."""
    write_inputs(tmp_path / "inputs")
    return tmp_path


@pytest.fixture
def star_base(fault_base):
    """The same, with the STaR run that V-STaR reads."""
    whole = run_whole(fault_base, "STaR")
    shutil.copytree(whole, fault_base / "inputs" / "star")
    return fault_base


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a tiny model, for `tiny_runs.build`."""
    folder = tmp_path_factory.mktemp("source")
    save_tiny_model(folder)
    return folder
