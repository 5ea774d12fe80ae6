"""Runs that earlier code began, and was killed amid, go on to what they would have come to."""

import json
import tarfile

import pytest
import torch
from digests.old_runs import ARCHIVES, NAMES, build_trainer, digest_exact_rows, save_model
from digests.reading import trainable
from safetensors.torch import load_file


@pytest.fixture
def unpack(tmp_path, monkeypatch):
    """Put what a run left, and its model, into the working directory; return its rounds' folder."""

    def unpack(name):
        with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        monkeypatch.chdir(tmp_path)
        save_model()
        return tmp_path / "run" / "_rounds"

    return unpack


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_earlier_code_resumes_to_the_end_it_would_have_had(name, unpack, tmp_path) -> None:
    rounds = unpack(name)
    expected = json.loads((tmp_path / "rows.json").read_text())
    assert set(digest_exact_rows(rounds)) < set(expected)  # it was killed
    trainer = build_trainer(name)
    trainer.train(resume_from_checkpoint=True)
    found = digest_exact_rows(rounds)
    assert {folder: found.get(folder) for folder in expected} == expected
    # To the byte on the machine that made them; another processor may round otherwise.
    weights = load_file(tmp_path / "weights.safetensors")
    torch.testing.assert_close(trainable(trainer.model), weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("star", {"temperature": 0.9}),
        ("rest", {"improve_thresholds": [0.4, 0.8]}),
        ("rest", {"round_learning_rates": [2e-2, 5e-3]}),
        ("spin", {"round_betas": [0.2, 0.5]}),
    ],
)
def test_a_run_of_earlier_code_is_known_by_its_settings(name, changes, unpack) -> None:
    unpack(name)
    with pytest.raises(ValueError, match=rf"{next(iter(changes))}: .* → .*"):
        build_trainer(name, **changes).train(resume_from_checkpoint=True)
