"""Which checkpoint training goes on from, and what one that isn't whole is known by."""

import json
import logging
import os
import pickle
import shutil
import zipfile
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from datasets import Dataset
from processes import call
from transformers import Trainer, TrainingArguments

from trl_selfplay.rounds.checkpoints import SumsCheckpoints, last_whole_checkpoint


def processes(count=1, scaler=None):
    """What is asked of an accelerator; the main process of several decides alone here."""
    return SimpleNamespace(num_processes=count, is_main_process=True, scaler=scaler)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Several processes without a process group: nothing to tell the others."""
    monkeypatch.setattr(
        "trl_selfplay.rounds.checkpoints.from_main", lambda accelerator, value: value
    )


@pytest.fixture
def written(tmp_path, tiny_model, word_tokenizer):
    """A folder in which transformers' own trainer has written checkpoint-1 and checkpoint-2."""
    return write(tmp_path / "run", tiny_model(word_tokenizer, num_hidden_layers=1), [])


def write(folder, model, callbacks):
    """Let transformers' own trainer write checkpoint-1 and checkpoint-2 into a folder."""
    rows = Dataset.from_dict({"input_ids": [[4, 5, 6]] * 2, "labels": [[4, 5, 6]] * 2})
    settings = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1}
    args = TrainingArguments(str(folder), **settings, use_cpu=True, report_to=[], disable_tqdm=True)
    Trainer(model, args, train_dataset=rows, callbacks=callbacks).train()
    return folder


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


def test_a_weight_that_has_changed_since_is_noticed(
    tmp_path, tiny_model, word_tokenizer, caplog
) -> None:
    """Its file is whole to every reader."""
    run = write(
        tmp_path / "run", tiny_model(word_tokenizer, num_hidden_layers=1), [SumsCheckpoints()]
    )
    assert last_whole_checkpoint(run, processes()) == str(run / "checkpoint-2")
    path = run / "checkpoint-2" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert last_whole_checkpoint(run, processes()) == str(run / "checkpoint-1")
    assert "checkpoint-2 is incomplete (model.safetensors has changed since" in caplog.text


@pytest.mark.parametrize("damage", [delete, cut, empty, fill_with_zeros])
def test_only_a_checkpoint_with_every_file_readable_is_whole(written, caplog, damage) -> None:
    newest, before = written / "checkpoint-2", written / "checkpoint-1"
    assert last_whole_checkpoint(written, processes()) == str(newest)
    assert not caplog.text
    copy = written.with_name("copy")
    for name in FILES if damage is delete else (*FILES, "config.json"):  # read if it is there
        shutil.copytree(newest, copy / "checkpoint-2", dirs_exist_ok=True)
        shutil.copytree(before, copy / "checkpoint-1", dirs_exist_ok=True)
        damage(copy / "checkpoint-2" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert last_whole_checkpoint(copy, processes()) == str(copy / "checkpoint-1"), name
        expected = "weights are" if (name, damage) == (FILES[0], delete) else name
        assert expected in caplog.text
        assert caplog.text.count("is skipped") == 1
        # Training that begins again writes into it: what is left of it must not count as whole.
        assert not (copy / "checkpoint-2" / "trainer_state.json").exists()
        shutil.rmtree(copy)


def test_a_missing_shard_of_the_weights_is_noticed(
    written, tmp_path, tiny_model, word_tokenizer
) -> None:
    newest = written / "checkpoint-2"
    (newest / "model.safetensors").unlink()
    tiny_model(word_tokenizer).save_pretrained(newest, max_shard_size="20KB")
    shards = sorted(newest.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert last_whole_checkpoint(written, processes()) == str(newest)
    shards[0].unlink()
    assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-1")


def test_a_gradient_scaler_needs_its_state(written) -> None:
    assert last_whole_checkpoint(written, processes(scaler=object())) is None
    for checkpoint in written.glob("checkpoint-*"):
        (checkpoint / "trainer_state.passed_over.json").rename(checkpoint / "trainer_state.json")
        torch.save({}, checkpoint / "scaler.pt")
    newest = str(written / "checkpoint-2")
    assert last_whole_checkpoint(written, processes(scaler=object())) == newest


def test_the_random_state_of_every_process_is_needed(written) -> None:
    for checkpoint in written.glob("checkpoint-*"):
        state = checkpoint / "rng_state.pth"
        for rank in range(3):
            shutil.copy(state, checkpoint / f"rng_state_{rank}.pth")
        state.unlink()
    assert last_whole_checkpoint(written, processes(3)) == str(written / "checkpoint-2")
    (written / "checkpoint-2" / "rng_state_2.pth").unlink()  # its process was killed before
    assert last_whole_checkpoint(written, processes(3)) == str(written / "checkpoint-1")


@pytest.mark.parametrize(("written_by", "count"), [(1, 2), (2, 1), (3, 2)])
def test_a_checkpoint_of_another_number_of_processes_is_named_and_kept(
    written, written_by, count
) -> None:
    for checkpoint in written.glob("checkpoint-*"):
        if written_by > 1:
            for rank in range(written_by):
                shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
            (checkpoint / "rng_state.pth").unlink()
    message = rf"checkpoint-2 was written by {written_by} process.* there are {count} now"
    with pytest.raises(ValueError, match=message):
        last_whole_checkpoint(written, processes(count))
    assert last_whole_checkpoint(written, processes(written_by)) == str(written / "checkpoint-2")


def test_adapters_are_weights_whatever_their_name(written) -> None:
    newest = written / "checkpoint-2"
    weights = (newest / "model.safetensors").rename(newest / "adapter_model.safetensors")
    assert last_whole_checkpoint(written, processes()) == str(newest)
    (newest / "mine").mkdir()
    named = weights.rename(newest / "mine" / "adapter_model.safetensors")
    assert last_whole_checkpoint(written, processes()) == str(newest)
    cut(named)
    assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-1")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a single process saves
def test_the_layouts_of_fsdp_are_whole(written) -> None:
    """Full state: two files. Sharded: two folders, each with its metadata."""
    newest, before = written / "checkpoint-2", written / "checkpoint-1"
    for name in ("model.safetensors", "optimizer.pt"):
        (newest / name).unlink()
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        torch.save({"a": torch.ones(2)}, newest / name)
    assert last_whole_checkpoint(written, processes()) == str(newest)
    for name, folder in (
        ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"),
        ("optimizer.bin", "optimizer_0"),
    ):
        (newest / name).unlink()
        distributed_checkpoint.save(
            {"a": torch.ones(2)}, checkpoint_id=newest / folder, no_dist=True
        )
    assert last_whole_checkpoint(written, processes()) == str(newest)
    empty(next((newest / "optimizer_0").glob("*.distcp")))
    assert last_whole_checkpoint(written, processes()) == str(before)


OPTIM_STATES = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture
def zero_folder(written):
    """The folder that `latest` names in checkpoint-2, where ZeRO writes weights and states."""
    newest = written / "checkpoint-2"
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (newest / name).unlink()
    tag = newest / "global_step2"
    tag.mkdir()
    (newest / "latest").write_text(tag.name)
    for name in ("mp_rank_00_model_states.pt", OPTIM_STATES):
        torch.save({"a": torch.ones(2)}, tag / name)
    return tag


def test_the_layout_of_deepspeed_is_whole(written, zero_folder) -> None:
    assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-2")
    cut(zero_folder / OPTIM_STATES)
    assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-1")


def put_pickle(file, content):
    """Replace the pickle in a file of `torch.save`."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, content if name.endswith("/data.pkl") else part)


def name_in_pickle(module, name, protocol=2):
    return f"\x80{chr(protocol)}c{module}\n{name}\n.".encode("latin-1")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        ("collections", "OrderedDict"),
        ("torch", "Size"),
    ],
)
def test_the_classes_of_deepspeed_files_are_whole(written, zero_folder, module, name) -> None:
    """That these are all is checked with DeepSpeed itself below."""
    put_pickle(zero_folder / OPTIM_STATES, name_in_pickle(module, name))
    assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-2")


@pytest.mark.parametrize(
    ("module", "name", "protocol"),
    [
        ("torch.serialization", "os.system", 4),
        ("numpy.testing._private.utils", "runstring", 2),
        ("torch.utils.collect_env", "run", 2),
        ("deepspeed.runtime.fp16.loss_scaler", "torch.load", 4),
        ("deepspeed.launcher.runner", "main", 2),
        ("builtins", "eval", 2),
    ],
)
@pytest.mark.parametrize("file", [OPTIM_STATES, "mp_rank_1\n_model_states.pt"])
def test_functions_of_known_packages_are_refused_too(
    written, zero_folder, caplog, module, name, protocol, file
) -> None:
    torch.save({}, zero_folder / file)
    put_pickle(zero_folder / file, name_in_pickle(module, name, protocol))
    assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-1")
    assert f"loading it would call {module}.{name}" in caplog.text


def test_classes_of_deepspeed_are_refused_in_other_files(written) -> None:
    """The parent, which loads them, refuses these."""
    content = name_in_pickle("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
    put_pickle(written / "checkpoint-2" / "optimizer.pt", content)
    assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-1")


@pytest.mark.parametrize("name", ["..", "../elsewhere", "link", ""])
def test_a_folder_outside_the_checkpoint_is_not_taken_for_deepspeed_s(
    written, zero_folder, name
) -> None:
    """Its files have not been checked, and DeepSpeed would load them."""
    newest, elsewhere = zero_folder.parent, written / "elsewhere"
    elsewhere.mkdir()
    (newest / "link").symlink_to(elsewhere)
    for folder in (written, elsewhere, newest):
        torch.save({}, folder / "mp_rank_00_model_states.pt")
    (newest / "latest").write_text(name)
    assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-1")


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_pickle_that_pytorch_does_not_read_is_passed_over(
    written, caplog, name, protocol
) -> None:
    """Newer protocols have operations that `torch.save` never writes."""
    put_pickle(written / "checkpoint-2" / name, pickle.dumps({"a": 1}, protocol))
    assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-1")
    assert f"{name} can't be read: Unsupported operand" in caplog.text


def save_with_deepspeed(folder: str, stage: str) -> None:
    """Train a step and write DeepSpeed's checkpoint, in one process."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import deepspeed
    from transformers import get_linear_schedule_with_warmup

    torch.distributed.init_process_group("gloo")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[0].weight.requires_grad = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(stage)},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=get_linear_schedule_with_warmup(optimizer, 1, 10),
        config=config,
    )
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    engine.save_checkpoint(folder, tag="global_step2")


@pytest.mark.full
@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: the extra `deepspeed`"
)
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_what_deepspeed_writes_is_whole(written, zero_folder, caplog, stage) -> None:
    shutil.rmtree(zero_folder)
    assert call(save_with_deepspeed, str(zero_folder.parent), stage) == 0
    assert any(zero_folder.glob("*_optim_states.pt"))
    assert last_whole_checkpoint(written, processes()) == str(zero_folder.parent), caplog.text


def test_a_state_of_another_shape_is_not_read_as_whole(written) -> None:
    newest = written / "checkpoint-2"
    (newest / "trainer_state.json").write_text(json.dumps(["no state"]))
    assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-1")
    assert last_whole_checkpoint(written.with_name("nowhere"), processes()) is None


class CallsSystem:
    """Runs a command where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "scaler.pt"]
)
@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_checkpoint_that_would_call_a_function_is_passed_over(
    written, caplog, name, form
) -> None:
    mark, file = written / "mark", written / "checkpoint-2" / name
    if form == "zip":
        torch.save([torch.zeros(1), CallsSystem(mark)], file)
    else:
        file.write_bytes(pickle.dumps(CallsSystem(mark)))
    with caplog.at_level(logging.WARNING):
        found = last_whole_checkpoint(written, processes())
    assert found == str(written / "checkpoint-1")
    assert name in caplog.text
    assert "posix.system" in caplog.text or form == "pickle"
    assert not mark.exists()


def test_a_gradient_scaler_of_another_precision_is_noticed(written, caplog) -> None:
    torch.save({}, written / "checkpoint-2" / "scaler.pt")
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(written, processes()) == str(written / "checkpoint-1")
    assert "scaler.pt is that of a training with fp16=True" in caplog.text
