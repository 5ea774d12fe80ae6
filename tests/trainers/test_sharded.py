"""Weights that training divides over two processes: the samples and the weights of one process."""

import inspect
import json
import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharded_process
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from graded_process import samples_of_round_0
from processes import call, call_twice
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, StateDictType

from trl_selfplay.rounds.gathered import check_sharding

IRPO = {"max_completion_length": 32, "max_per_prompt": 2}
FULL = {"adapters": False, "num_rounds": 1}
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: the extra `deepspeed`"
)


def weights_of(folder: Path, place: str) -> dict[str, torch.Tensor]:
    files = (folder / place).glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def check_against_one_process(folder: Path, model: Path, engine: str, method: str, changes) -> None:
    settings = json.dumps({"max_completion_length": 8, **changes})
    runs = [folder / name for name in ("one", "two")]
    assert call(sharded_process.main, "", method, str(model), str(runs[0]), settings) == 0
    arguments = (engine, method, str(model), str(runs[1]), settings)
    assert call_twice(sharded_process.main, *arguments) == [0, 0]
    one, two = map(samples_of_round_0, runs)
    assert one == two
    assert one
    place = "_rounds/round-000/model"
    expected, found = (weights_of(run, place) for run in runs)
    assert expected.keys() == found.keys()
    assert expected
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
    saved = weights_of(runs[1], ".")
    if changes.get("num_rounds") != 1:
        place = "_rounds/round-001/model"
        assert not all(torch.equal(saved[name], found[name]) for name in found)
    last = weights_of(runs[1], place)
    assert all(torch.equal(saved[name], last[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "changes"), [("STaR", FULL), ("IRPO", IRPO)])
def test_fsdp2_comes_to_what_one_process_does(tmp_path, saved_tiny_model, method, changes) -> None:
    check_against_one_process(tmp_path, saved_tiny_model, "fsdp2", method, changes)


@pytest.mark.full
@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize(("method", "changes"), [("STaR", FULL), ("STaR", {}), ("IRPO", IRPO)])
def test_zero_comes_to_what_one_process_does(
    tmp_path, saved_tiny_model, engine, method, changes
) -> None:
    check_against_one_process(tmp_path, saved_tiny_model, engine, method, changes)


@pytest.mark.slow
def test_what_is_written_into_whole_parameters_is_in_the_shards() -> None:
    assert call_twice(sharded_process.change_shards) == [0, 0]


@pytest.mark.slow
def test_fsdp_on_cpus_is_refused(tmp_path, saved_tiny_model) -> None:
    arguments = (str(saved_tiny_model), str(tmp_path / "run"))
    assert call_twice(sharded_process.expect_refusal_on_cpus, *arguments) == [0, 0]


def trainer_with(**changes) -> SimpleNamespace:
    """Return what `check_sharding` reads of a trainer without sharding."""
    state = SimpleNamespace(fsdp_plugin=changes.pop("plugin", None))
    if "zero" in changes:
        config = {"zero_optimization": changes.pop("zero")}
        state.deepspeed_plugin = SimpleNamespace(
            zero_stage=config["zero_optimization"]["stage"], deepspeed_config=config
        )
    return SimpleNamespace(
        args=SimpleNamespace(fsdp=changes.pop("fsdp", False), deepspeed=None),
        accelerator=SimpleNamespace(state=state, device=torch.device("cpu"), num_processes=2),
        is_fsdp_enabled=state.fsdp_plugin is not None,
        is_deepspeed_enabled=hasattr(state, "deepspeed_plugin"),
        model=SimpleNamespace(config=SimpleNamespace(**changes)),
    )


def plugin(**changes) -> SimpleNamespace:
    """Return FSDP's settings; accelerate's own class writes those of a test into the environment."""
    settings = {
        "fsdp_version": 2,
        "cpu_ram_efficient_loading": False,
        "state_dict_type": StateDictType.FULL_STATE_DICT,
        "reshard_after_forward": True,
    }
    assert settings.keys() <= FullyShardedDataParallelPlugin.__dataclass_fields__.keys()
    return SimpleNamespace(**{**settings, **changes})


ZERO_3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("changes", "refused", "message"),
    [
        ({}, None, None),
        ({"plugin": plugin()}, None, None),
        ({"zero": {"stage": 2}}, None, None),
        ({"zero": {"stage": 2}, "quantization_config": {}}, "it thinks", None),
        ({"zero": ZERO_3}, None, None),
        ({"fsdp": True}, None, "FSDP was asked for.*ddp.yaml"),
        ({"plugin": plugin(fsdp_version=1)}, None, "fsdp_version: 2"),
        ({"plugin": plugin(cpu_ram_efficient_loading=True)}, None, "Set it to false"),
        (
            {"plugin": plugin(state_dict_type=StateDictType.SHARDED_STATE_DICT)},
            None,
            "FULL_STATE_DICT",
        ),
        ({"plugin": plugin(), "quantization_config": {}}, None, "quantized.*ZeRO-2"),
        ({"plugin": plugin()}, "it thinks", "it thinks. Use DDP"),
        ({"zero": ZERO_3}, "it thinks", "it thinks. Use DDP"),
        ({"zero": {"stage": 3}}, None, "zero3_save_16bit_model"),
    ],
)
def test_ways_of_sharding_that_rounds_cannot_work_with_are_refused(
    monkeypatch, changes, refused, message
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if message is None:
        check_sharding(trainer_with(**changes), refused)
    else:
        with pytest.raises(ValueError, match=message):
            check_sharding(trainer_with(**changes), refused)


def test_sharding_that_a_launcher_asks_for_and_accelerate_leaves_out_is_refused(
    monkeypatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed was asked for"):
        check_sharding(trainer_with())


def test_what_we_use_of_fsdp2_and_accelerate() -> None:
    recurse = inspect.signature(FSDPModule.set_reshard_after_forward).parameters
    assert list(recurse) == ["self", "reshard_after_forward", "recurse"]
    assert hasattr(FSDPModule, "unshard")
    assert hasattr(FSDPModule, "reshard")
    # Where accelerate keeps DeepSpeed's engine, and asks it for gradients.
    assert "deepspeed_engine_wrapped.backward(" in inspect.getsource(Accelerator.backward)
    assert "deepspeed_engine_wrapped.engine.destroy()" in inspect.getsource(Accelerator.free_memory)


@pytest.mark.full
@needs_deepspeed
def test_what_we_use_of_deepspeed() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    gathered = inspect.signature(deepspeed.zero.GatheredParameters).parameters
    assert "modifier_rank" in gathered
