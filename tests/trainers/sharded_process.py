"""Runs whose training divides the weights over processes, on CPUs: FSDP2 and DeepSpeed over gloo.

In: an engine, "fsdp2", "zero2", "zero3" or "" for none, and the arguments of `graded_process.main`.
accelerate knows FSDP on accelerators only, so it is told here that two CPU processes are such.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from graded_process import main as run_graded
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trl_selfplay.rounds.gathered import whole_parameters


def main(engine: str, method: str, model: str, folder: str, changes: str) -> None:
    """Run two rounds with an engine."""
    settings = json.loads(changes)
    if engine:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        settings |= {"use_cpu": False, "ddp_backend": "gloo"}
    if engine == "fsdp2":
        take_processes_for_gpus()
        settings |= {"fsdp": True, "fsdp_config": {"version": 2}}
    elif engine:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        zero = {
            "stage": int(engine.removeprefix("zero")),
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,  # divide the smallest weights too
        }
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        }
        # Each process writes the file that it reads.
        path = Path(f"{folder}-{os.environ['RANK']}.json")
        path.write_text(json.dumps(config))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    run_graded(method, model, folder, json.dumps(settings))


def expect_refusal_on_cpus(model: str, folder: str) -> None:
    """Ask for FSDP on two processes with CPUs, which accelerate would give DDP."""
    with pytest.raises(ValueError, match="FSDP was asked for"):
        run_graded("STaR", model, folder, json.dumps({"fsdp": True}))


def take_processes_for_gpus() -> None:
    """Let accelerate treat processes on CPUs as those on GPUs, which alone may use FSDP."""
    prepare = PartialState._prepare_backend

    def told(self: PartialState, *args: object, **kwargs: object) -> tuple[str, DistributedType]:
        return prepare(self, *args, **kwargs)[0], DistributedType.MULTI_GPU

    PartialState._prepare_backend = told


def change_shards() -> None:
    """Write into whole parameters in two processes, and find it in the shards."""
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    model[1].weight.requires_grad = False
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fully_shard(model[0])
    fully_shard(model)
    with whole_parameters(model, trainable=False):
        found = dict(model.named_parameters())
        assert not any(isinstance(p, DTensor) for p in found.values())
        assert all(torch.equal(found[name], before[name]) for name in before)
    with whole_parameters(model), torch.no_grad():
        assert isinstance(model[1].weight, DTensor)  # doesn't train
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(1.0)
    shards = dict(model.named_parameters())
    assert all(isinstance(p, DTensor) for p in shards.values())
    for name, weight in before.items():
        expected = weight if name == "1.weight" else weight + 1.0
        assert torch.equal(shards[name].full_tensor(), expected)
    model(torch.ones(1, 5)).sum().backward()  # training goes on with them
    assert shards["0.weight"].grad is not None
    torch.distributed.destroy_process_group()
