"""Runs whose rounds are kept on a store as well, in this process."""

import json
import logging
import shutil
from uuid import uuid4

import pytest
from s3_server import KEYS, serving_s3
from transformers import TrainerCallback

from trl_selfplay import STaRConfig
from trl_selfplay.rounds.lease import Lease, LeaseError
from trl_selfplay.rounds.store import RoundsStore, StoreError, describe, scan

FEW = {"max_steps": 2, "save_steps": 1, "num_generations": 2}


class AtStep(TrainerCallback):
    """Keeps the steps of all trainings, and acts at one of them."""

    def __init__(self, step=None, action=None) -> None:
        self.steps, self.step, self.action = [], step, action

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps.append(state.global_step)
        if state.global_step == self.step:
            self.action()


def interrupt() -> None:
    raise KeyboardInterrupt


def assert_store_has_the_rounds(store, trainer) -> None:
    local = scan(trainer.run.root)
    entries = store.entries()
    assert entries.keys() == local.keys()
    for name, path in local.items():
        assert dict(entries[name].files) == dict(describe(path).files), name
        for inner in entries[name].files:
            file = path / inner if inner else path
            assert store.read(f"{name}/{inner}".rstrip("/")) == file.read_bytes()


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}/run"


def test_the_store_has_what_the_disk_has_and_a_second_run_is_refused(build_star, url) -> None:
    trainer = build_star(rounds_dir=url, **FEW)
    store = RoundsStore(url)
    with Lease(store), pytest.raises(LeaseError, match="another run holds"):
        trainer.train()
    assert store.entries() == {}
    trainer.train()
    assert trainer.store.pauses_s == store.pauses_s  # the next train() tries as often at its start
    assert_store_has_the_rounds(store, trainer)
    assert len(store.read("rounds.jsonl").splitlines()) == 2
    with pytest.raises(FileExistsError, match=r"rounds_dir=.* already holds rounds"):
        build_star("other", rounds_dir=url, **FEW).train()
    assert store.read("_lease.json") is None


def test_training_goes_on_from_a_checkpoint_that_only_the_store_has(build_star, tmp_path) -> None:
    place = f"file://{tmp_path}/store"
    stopped = build_star("first", rounds_dir=place, callbacks=[AtStep(2, interrupt)], **FEW)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert "round-000/checkpoint-1" in RoundsStore(place).entries()
    shutil.rmtree(tmp_path / "first")
    seen = AtStep()
    resumed = build_star("second", rounds_dir=place, callbacks=[seen], **FEW)
    assert resumed.self_play.formatter.start == stopped.self_play.formatter.start
    resumed.train(resume_from_checkpoint=True)
    assert seen.steps == [2, 1, 2]
    assert_store_has_the_rounds(RoundsStore(place), resumed)


@pytest.mark.parametrize("rounds_dir", ["runs/star", "s3://bucket", "s3://me:secret@bucket/run"])
def test_a_rounds_dir_that_is_none_is_refused_with_the_config(build_star, rounds_dir) -> None:
    with pytest.raises(ValueError, match="rounds_dir") as caught:
        build_star(rounds_dir=rounds_dir)
    assert "secret" not in str(caught.value)


def test_an_output_dir_on_a_store_is_refused_with_the_field_to_set() -> None:
    with pytest.raises(ValueError, match="Set output_dir to a folder, and rounds_dir to the URL"):
        STaRConfig("s3://bucket/run", use_cpu=True)


def test_a_store_that_cant_be_reached_is_told_when_the_trainer_is_built(build_star, s3) -> None:
    with pytest.raises(StoreError, match="bucket does not exist"):
        build_star(rounds_dir="s3://no-such-bucket/run")


@pytest.mark.slow
def test_a_run_goes_on_while_its_store_is_down_and_no_credentials_are_written(
    build_star, tmp_path, monkeypatch, caplog, capsys
) -> None:
    caplog.set_level(logging.DEBUG, logger="trl_selfplay")
    with serving_s3() as server:
        for name, value in {**server.environment, "AWS_MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(name, value)
        bucket = server.make_bucket()
        trainer = build_star(
            rounds_dir=f"s3://{bucket}/run", callbacks=[AtStep(1, server.stop)], **FEW
        )
        trainer.add_callback(BackAtTheEnd(server))
        trainer.train()
        assert caplog.text.count("The run goes on with the files in") == 1
        assert "answers again and has all files" in caplog.text
        assert_store_has_the_rounds(RoundsStore(f"s3://{bucket}/run"), trainer)
        stored = list(server.objects(bucket).values())
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    printed = "".join(capsys.readouterr()) + caplog.text
    for secret in KEYS.values():
        assert not any(secret.encode() in content for content in (*stored, *written))
        assert secret not in printed
    config = json.loads((trainer.run.root / "config.json").read_text())
    assert config["rounds_dir"] == f"s3://{bucket}/run"


class BackAtTheEnd(TrainerCallback):
    """Starts a server again after the last round."""

    def __init__(self, server) -> None:
        self.server = server

    def on_round_begin(self, args, state, control, round_index, **kwargs) -> None:
        if round_index == 1:
            self.server.stop = lambda: None  # it is down already

    def on_round_end(self, args, state, control, round_index, **kwargs) -> None:
        if round_index == 1:
            self.server.start()
