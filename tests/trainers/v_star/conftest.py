"""A finished STaR run of a tiny model, and a verifier trained on its samples."""

import pytest
from tiny_trainers import SMALL, build_trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Where the module's one STaR run lies, and its trainer once it has run."""
    return {"folder": tmp_path_factory.mktemp("star")}


@pytest.fixture
def star_run(build_star, finished):
    """The trainer of two rounds of STaR, which tests only read."""
    if "trainer" not in finished:
        trainer = build_star(
            finished["folder"], num_generations=6, max_completion_length=16, rationalize=False
        )
        trainer.train()
        finished["trainer"] = trainer
    return finished["trainer"]


@pytest.fixture
def build_verifier(tmp_path, sums):
    """Return a function that builds a VSTaRTrainer; keywords that are fields go to the config."""

    def build(star, folder="verifier", *, model=None, **changes):
        given = {
            "train_dataset": sums(12), "processing_class": star.processing_class,
            "samples": star.args.output_dir, "learning_rate": 1e-3, **changes,
        }  # fmt: skip
        model = star.args.output_dir if model is None else model
        return build_trainer("V-STaR", model, tmp_path / folder, SMALL, **given)

    return build
