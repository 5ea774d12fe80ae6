"""One step on a placeholder row: the parent's errors come up before sampling, and nothing changes."""

import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig

from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rounds import loop
from trl_selfplay.rounds.dry_run import try_step


def failing_loss(outputs, labels, num_items_in_batch=None):
    raise ZeroDivisionError("the user's loss")


def collate_nothing(rows):
    return {"labels": torch.tensor([[0]])}


BOTH = [
    ({"optim_args": "abc"}, "optim_args='abc'"),
    ({"lr_scheduler_kwargs": {"slope": 1}}, "slope"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "lr_end"),
    ({"train_sampling_strategy": "nightly"}, "train_sampling_strategy='nightly'"),
    ({"data_collator": collate_nothing}, "input_ids|completion_mask"),
    (
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True, "speed": 1},
        },
        "speed",
    ),
]
SFT = [
    ({"compute_loss_func": failing_loss}, "the user's loss"),
    ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"speed": 1})}, "speed"),
]
DPO = [
    ({"f_divergence_type": "distance"}, "distance"),
]


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        *(("star", *case) for case in BOTH + SFT),
        *(("rest_em", *case) for case in SFT),
        *(("spin", *case) for case in BOTH + DPO),
    ],
)
def test_the_parent_s_errors_come_up_before_anything_is_sampled(
    request, tmp_path, method, changes, message
) -> None:
    build = request.getfixturevalue(f"build_{method}")
    with pytest.raises(Exception, match=message) as caught:
        build(**changes).train()
    if caught.traceback[-1].frame.f_globals["__name__"] != "trl_selfplay.trainers.field_checks":
        said = [str(caught.value), *getattr(caught.value, "__notes__", ())]
        assert any("before anything was sampled" in text for text in said)
    assert not (tmp_path / "run" / "_rounds").exists()


def state_of(trainer):
    return {
        "trainer": {k: v for k, v in vars(trainer).items() if k != "_metrics"},
        "metrics": copy.deepcopy(trainer._metrics),
        "modes": [module.training for module in trainer.model.modules()],
        "random": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
    }  # fmt: skip


LORA = {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.5, "init_lora_weights": False}


@pytest.mark.parametrize("method", ["star", "rest_em", "spin"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"peft_config": LoraConfig(**LORA), "gradient_checkpointing": True},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 3, "seed": 7},
    ],
)
def test_a_trial_step_leaves_everything_as_it_was(request, method, changes) -> None:
    trainer = request.getfixturevalue(f"build_{method}")(**changes)
    trainer.model.eval()
    before = state_of(trainer)
    try_step(trainer, trainer.placeholder)
    after = state_of(trainer)
    assert before["trainer"].keys() == after["trainer"].keys()
    assert all(v is after["trainer"][k] for k, v in before["trainer"].items())
    for part in ("metrics", "modes", "random"):
        assert before[part] == after[part]
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before["weights"][name])
    assert trainer.callback_handler.optimizer is None
    assert trainer.accelerator.gradient_state.active_dataloader is None


@pytest.mark.parametrize(
    "method",
    ["star", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rest_em", "spin"))],
)
def test_a_run_is_bit_equal_with_and_without_a_trial_step(request, monkeypatch, method) -> None:
    build = request.getfixturevalue(f"build_{method}")
    found = []
    for folder in ("with", "without"):
        trainer = build(folder, num_rounds=2, peft_config=LoraConfig(**LORA))
        trainer.train()
        samples = [
            load_rollouts(path)
            for round_index in (0, 1)
            for path in sorted(trainer.run.folder(round_index).glob("samples/*.parquet"))
        ]
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found.append((samples, losses, trainer.model.state_dict()))
        monkeypatch.setattr(loop, "try_step", lambda trainer, row: None)
    (samples, losses, weights), (others, other_losses, other_weights) = found
    assert samples
    assert samples == others
    assert losses == other_losses
    assert all(torch.equal(weights[name], other_weights[name]) for name in other_weights)


def test_weights_and_packing_are_tried_out_too(build_rest_em) -> None:
    for changes in ({"loss_weighting": "reward"}, {"packing": True, "max_length": 64}):
        trainer = build_rest_em(**changes)
        try_step(trainer, trainer.placeholder)
