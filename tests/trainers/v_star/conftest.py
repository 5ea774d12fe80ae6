"""A finished STaR run of a tiny model, and a verifier trained on its samples."""

import pytest

from trl_selfplay import VSTaRConfig, VSTaRTrainer


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
        fields = VSTaRConfig.__dataclass_fields__
        settings = {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "use_cpu": True,
        }
        settings |= {k: v for k, v in changes.items() if k in fields}
        arguments = {
            "train_dataset": sums(12),
            "processing_class": star.processing_class,
            "samples": star.args.output_dir,
            **{k: v for k, v in changes.items() if k not in fields},
        }
        return VSTaRTrainer(
            star.args.output_dir if model is None else model,
            args=VSTaRConfig(str(tmp_path / folder), **settings),
            **arguments,
        )

    return build
