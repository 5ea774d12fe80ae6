"""What saves memory or time in training has no other effect on a round, or is refused."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_rewards import digit_share
from tiny_trainers import QUIET, build_trainer
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, TrainerCallback

from trl_selfplay.rounds.weights import trainable_parameters

METHODS = ("STaR", "ReSTEM", "SPIN", "IRPO", "QuietSTaR")
SFT, PAIRS = ("STaR", "ReSTEM"), ("SPIN", "IRPO")
# One batch holds a whole round, and SGD makes no large step of a small gradient.
SETTINGS = {
    "num_rounds": 1, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1,
    "per_device_train_batch_size": 64, "save_strategy": "no", "max_completion_length": 16,
}  # fmt: skip
SAME = {
    "rows of equal length together": {"train_sampling_strategy": "group_by_length"},
    "balanced ranks": {"train_sampling_strategy": "batch_rebalance"},
    "rows in order": {"train_sampling_strategy": "sequential"},
    "smaller batches": {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2},
    "padding to a multiple": {"pad_to_multiple_of": 16},
    "checkpointing": {"gradient_checkpointing": True},
    "every second layer": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}
    },
    "reentrant": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}
    },
    "loader in a process": {"dataloader_num_workers": 1},
    "emptied cache": {"torch_empty_cache_steps": 1},
}  # fmt: skip
SAME_OF_SFT = {
    "packing": {"packing": True, "max_length": 64},
    "packing with splits": {"packing": True, "max_length": 64, "packing_strategy": "bfd_split"},
    "padding-free": {"padding_free": True, "max_length": None},
    "chosen operations": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}
    },
}  # fmt: skip
# A thought's noise depends on its row's place in the step.
ORDERS = ("rows of equal length together", "balanced ranks", "rows in order")
CASES = [
    *((m, n, o) for m in METHODS for n, o in SAME.items() if m != "QuietSTaR" or n not in ORDERS),
    *(("STaR", name, o) for name, o in SAME_OF_SFT.items()),
    *((m, "scoring batch", {"precompute_ref_batch_size": 3}) for m in PAIRS),
]
FAST = {("STaR", "packing"), ("STaR", "padding-free"), ("SPIN", "rows of equal length together")}
CPU = "computes on the CPU"
REFUSED = [
    *((m, {"activation_offloading": True}, CPU) for m in METHODS),
    *((m, {"gradient_checkpointing_kwargs": {"offload": True}}, CPU) for m in METHODS),
    *((m, {"liger_kernel_config": {"rope": True}}, "has no effect") for m in METHODS),
    *((m, {"length_column_name": "size"}, "rows are made in each round") for m in (*SFT, *PAIRS)),
    *((m, {"packing": True, "packing_strategy": "wrapped"}, "cuts completions off") for m in SFT),
    *((m, {"packing_strategy": "bfd_split"}, "no effect without packing") for m in SFT),
    *((m, {"padding_free": True}, "has no effect here") for m in PAIRS),
    *((m, {"gradient_checkpointing_kwargs": {"selective": True}}, "alone") for m in PAIRS),
    ("STaR", {"padding_free": True}, "max_length=None"),
    *(
        ("ReSTEM", {name: True}, "the weight belongs to a row")
        for name in ("packing", "padding_free")
    ),
    ("ReSTEM", {"loss_type": "dft"}, "the weight belongs to a row"),
    ("ReSTEM", {"label_smoothing_factor": 0.1}, "the weight belongs to a row"),
    *(("QuietSTaR", {name: True}, "where a thought") for name in ("packing", "padding_free")),
    ("QuietSTaR", {"loss_type": "dft"}, "set loss_type='nll'"),
    ("QuietSTaR", {"use_liger_kernel": True}, "replaces the model's forward"),
]


class Watcher(TrainerCallback):
    """Counts checkpointed layers; may stop the run before a step."""

    def __init__(self, stops_at: int | None = None) -> None:
        self.stops_at, self.checkpointed = stops_at, 0

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.checkpointed = sum(
            bool(m.__dict__.get("gradient_checkpointing")) for m in model.modules()
        )
        if state.global_step == self.stops_at:
            raise KeyboardInterrupt


@pytest.fixture
def build(tmp_path, tiny_model, word_tokenizer, build_star, build_rest_em, build_spin, build_irpo):
    """Return a function that builds any trainer on the same model."""
    graded = {"reward_funcs": digit_share, "reward_threshold": 0.2}
    builders = {
        "STaR": (build_star, {"rationalize": False, **graded}),
        "ReSTEM": (build_rest_em, {"loss_weighting": "reward", **graded}),
        "SPIN": (build_spin, {}),
        "IRPO": (build_irpo, graded),
    }

    def build_method(method, folder="run", **changes):
        model = tiny_model(word_tokenizer, initializer_range=0.1)
        if method in builders:
            builder, own = builders[method]
            return builder(folder, **{"model": model, **SETTINGS, **own, **changes})
        settings = {**QUIET, "thought_length": 2, "num_ahead_tokens": 1, **SETTINGS, **changes}
        rows = [[13, 4, 13, 5, 14, 15, i + 3][: 3 + i % 5] for i in range(8)]
        return build_trainer(
            "Quiet-STaR", model, tmp_path / folder, settings, processing_class=word_tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            callbacks=changes.get("callbacks"),
        )  # fmt: skip

    return build_method


def weights_after(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {n: p.detach().clone() for n, p in trainable_parameters(trainer.model).items()}


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [pytest.param(*c, marks=() if c[:2] in FAST else pytest.mark.slow) for c in CASES],
)
def test_an_option_that_saves_leaves_the_weights_as_they_are(build, method, name, options) -> None:
    if method == "QuietSTaR" and "gradient_accumulation_steps" in options:
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    plain, watcher = build(method, "plain"), Watcher()
    expected = weights_after(plain)
    found = weights_after(build(method, "saving", callbacks=[watcher], **options))
    assert bool(watcher.checkpointed) == options.get("gradient_checkpointing", False)
    for parameter, weight in expected.items():
        torch.testing.assert_close(found[parameter], weight, rtol=1e-4, atol=1e-5, msg=parameter)


@pytest.mark.parametrize(("method", "options", "reason"), REFUSED)
def test_an_option_with_no_or_the_wrong_effect_is_refused(build, method, options, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        build(method, **options)


@pytest.mark.parametrize(
    "method", ["STaR", "SPIN", pytest.param("QuietSTaR", marks=pytest.mark.slow)]
)
def test_rows_grouped_by_length_are_resumed_in_their_order(build, method) -> None:
    """In a later epoch, where the parent alone would draw another order."""
    settings = {
        "train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2,
        "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    whole = build(method, "whole", **settings)
    expected = weights_after(whole)
    steps = whole.state.global_step
    parts = build(method, "parts", callbacks=[Watcher(stops_at=steps // 2 + 1)], **settings)
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    resumed = build(method, "parts", **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in trainable_parameters(resumed.model).items():
        assert torch.equal(parameter, expected[name]), name


def test_rows_that_would_see_one_another_are_not_put_end_to_end(build_star, word_tokenizer) -> None:
    size = len(word_tokenizer)
    torch.manual_seed(0)
    recurrent = MambaForCausalLM(
        MambaConfig(vocab_size=size, hidden_size=16, num_hidden_layers=1, initializer_range=0.5)
    )
    with pytest.raises(ValueError, match=r"puts rows end to end, and in MambaForCausalLM they see"):
        build_star(model=recurrent, padding_free=True, max_length=None)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2))
    assert build_star(model=gpt2, padding_free=True, max_length=None).padding_free


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("adapted", [False, True])
def test_the_reference_costs_no_forward_in_training(build, method, adapted) -> None:
    """But for the check in the first step of a round: one forward of both sides."""
    changes = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if adapted else {}
    trainer = build(method, max_steps=3, num_rounds=2, **changes)
    assert trainer.ref_model is None
    assert list(getattr(trainer.model, "peft_config", {"default": None})) == ["default"]
    base = trainer.model.get_base_model() if adapted else trainer.model
    rows, steps = [], []
    base.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    step = trainer.training_step

    def counted(model, inputs, *args, **kwargs):
        rows.clear()
        loss = step(model, inputs, *args, **kwargs)
        steps.append((list(rows), len(inputs["input_ids"])))
        return loss

    trainer.training_step = counted
    trainer.train()
    dry_run, *steps = steps
    assert len(dry_run[0]) == 1
    assert len(steps) == 6
    for index, (forwards, size) in enumerate(steps):
        assert forwards == [size] * (2 if index % 3 == 0 else 1)
