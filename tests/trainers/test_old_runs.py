"""Runs that earlier code began, and was killed amid, go on to what they would have come to."""

import json
import tarfile

import pytest
import torch
from digests.old_runs import ARCHIVES, NAMES, build_trainer, digest_exact_rows, save_model
from digests.reading import trainable
from safetensors.torch import load_file


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_earlier_code_resumes_to_the_end_it_would_have_had(
    name, tmp_path, monkeypatch
) -> None:
    with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    expected = json.loads((tmp_path / "rows.json").read_text())
    rounds = tmp_path / "run" / "_rounds"
    assert set(digest_exact_rows(rounds)) < set(expected)  # it was killed
    save_model()
    trainer = build_trainer(name)
    trainer.train(resume_from_checkpoint=True)
    found = digest_exact_rows(rounds)
    assert {folder: found.get(folder) for folder in expected} == expected
    # To the byte on the machine that made them; another processor may round otherwise.
    weights = load_file(tmp_path / "weights.safetensors")
    torch.testing.assert_close(trainable(trainer.model), weights, atol=1e-6, rtol=0)
