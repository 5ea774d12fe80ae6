"""A round trains as TRL's own class does on the same rows: losses, weights, callbacks' events.

Each case is a feature of SFTTrainer's or DPOTrainer's documentation. The rows of the parent come without
the log-probs of the reference, which it computes by itself.
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, OFTConfig
from transformers import TrainerCallback

from trl_selfplay.rollouts.rows import Pair
from trl_selfplay.rounds.training import train_on
from trl_selfplay.rounds.weights import trainable_parameters
from trl_selfplay.trainers.rounds import RoundsMixin


class Events(TrainerCallback):
    """Notes the events of TRL's training in their order."""

    def __init__(self) -> None:
        self.names = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda *args, **kwargs: self.names.append(name)
        return object.__getattribute__(self, name)


def half(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits.mean()
    return logits * logits


def cut(rows):
    """Collate the first rows alone, in the form of TRL's own collator."""
    ids = [row["input_ids"][:8] for row in rows]
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    return {
        "input_ids": padded,
        "attention_mask": (padded != 0).long(),
        "labels": padded.masked_fill(padded == 0, -100),
    }


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
WORDS = range(3, 21)
SFT_ROWS = [
    {"input_ids": row, "labels": [-100, -100, *row[2:]]}
    for row in ([WORDS[(i * j) % 18] for j in range(1, 6 + i % 5)] + [1] for i in range(1, 13))
]
PAIRS = [
    Pair(str(i), (16, WORDS[i], 15), (20, WORDS[i + 1], 1), (20, WORDS[i + 2], WORDS[i], 1))
    for i in range(12)
]
FULL = pytest.mark.slow
SFT = {
    "defaults": {},
    "LoRA": {"peft_config": LoraConfig(**LORA)},
    "loss_type=dft": {"loss_type": "dft"},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "data_collator": {"data_collator": cut},
    "optimizer_cls_and_kwargs": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.3})},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
}
SFT_MORE = {
    "padding_free": {"padding_free": True, "max_length": None},
    "pad_to_multiple_of": {"pad_to_multiple_of": 16},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "scheduler": {"lr_scheduler_type": "cosine", "warmup_steps": 1, "max_grad_norm": 0.1},
    "optim": {"optim": "adafactor", "weight_decay": 0.1},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "dataloader_drop_last": True},
    "OFT": {"peft_config": OFTConfig(target_modules=["q_proj"], oft_block_size=4)},
    "rsLoRA and DoRA": {"peft_config": LoraConfig(use_rslora=True, use_dora=True, **LORA)},
    "compute_loss_func": {"compute_loss_func": half},
}
DPO = {  # adapters that change nothing at first: TRL's reference is the model without them
    "defaults": {},
    "LoRA": {"peft_config": LoraConfig(**{**LORA, "init_lora_weights": True})},
    "loss_type=ipo": {"loss_type": ["ipo"], "beta": 0.3},
    "loss_type=sigmoid, sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
}
DPO_MORE = {
    "label_smoothing": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "f_divergence_type": {"f_divergence_type": "js_divergence"},
    "use_weighting": {"use_weighting": True},
    "ld_alpha": {"ld_alpha": 0.5},
    "loss_type=apo_zero": {"loss_type": ["apo_zero"]},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "pad_to_multiple_of": {"pad_to_multiple_of": 16},
}
CASES = [
    *(pytest.param("STaR", c, id=f"SFT {n}") for n, c in SFT.items()),
    *(pytest.param("STaR", c, id=f"SFT {n}", marks=FULL) for n, c in SFT_MORE.items()),
    *(pytest.param("SPIN", c, id=f"DPO {n}") for n, c in DPO.items()),
    *(pytest.param("SPIN", c, id=f"DPO {n}", marks=FULL) for n, c in DPO_MORE.items()),
    *(
        pytest.param(method, {}, id=f"{method} defaults", marks=FULL)
        for method in ("ReST^EM", "V-STaR")
    ),
]


@pytest.mark.filterwarnings("ignore:`(compute_loss_func|label_smoothing_factor)` is deprecated")
@pytest.mark.parametrize(("method", "changes"), CASES)
def test_a_round_trains_as_the_parent_does(
    build, parts, tiny_model, tmp_path, method, changes
) -> None:
    events, parent_events = Events(), Events()
    ours = build(method, callbacks=[events], **changes)
    folder = tmp_path / "round"
    if method in ("SPIN", "V-STaR"):
        rows = ours.store_pairs(PAIRS, tmp_path / "dataset")
        given = as_text(parts.tokenizer)
        has_reference = "peft_config" not in changes  # else the model without its adapters
        reference = {"ref_model": tiny_model(parts.tokenizer)} if has_reference else {}
        parent = build("DPO", "parent", train_dataset=given, callbacks=[parent_events],
                       **reference, **changes)  # fmt: skip
    else:
        rows = given = Dataset.from_list(SFT_ROWS)
        parent = build("SFT", "parent", train_dataset=given, callbacks=[parent_events], **changes)
    events.names.clear(), parent_events.names.clear()
    train_on(ours, super(RoundsMixin, ours).train, rows, folder, ours.args.seed)
    torch.manual_seed(ours.args.seed)  # as `train_on` does for noise
    parent.train()
    losses, expected = (
        [x["loss"] for x in t.state.log_history if "loss" in x] for t in (ours, parent)
    )
    assert len(losses) >= 2
    assert losses == pytest.approx(expected, rel=1e-5)
    weights, others = (trainable_parameters(trainer.model) for trainer in (ours, parent))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-5)
    assert events.names == parent_events.names
    assert events.names[0] == "on_train_begin"


def as_text(tokenizer):
    """Return the pairs as DPOTrainer takes them: text, to which it adds EOS."""
    sides = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    return Dataset.from_list(
        [
            {
                name: tokenizer.decode(getattr(pair, ids), skip_special_tokens=True)
                + " " * (name == "prompt")
                for name, ids in sides.items()
            }
            for pair in PAIRS
        ]
    )


def weights_of(trainer):
    named = trainer.model.named_parameters()
    return {n: (p.shape, p.dtype, p.requires_grad) for n, p in named if ".ref." not in n}


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("STaR", "folder"),
        ("SPIN", "folder with dtype"),
        ("STaR", "folder with adapters"),
        pytest.param("SPIN", "folder", marks=FULL),
        pytest.param("STaR", "folder with dtype", marks=FULL),
        pytest.param("SPIN", "folder with adapters", marks=FULL),
    ],
)
def test_a_model_is_loaded_as_the_parent_loads_it(
    build, parts, saved_tiny_model, method, form
) -> None:
    changes = {
        "folder": {"model_init_kwargs": {"attn_implementation": "eager"}, "processing_class": None},
        "folder with dtype": {"model_init_kwargs": {"dtype": "bfloat16"}},
        "folder with adapters": {"peft_config": LoraConfig(**LORA), "processing_class": None},
    }[form]
    ours = build(method, model=str(saved_tiny_model), **changes)
    rows = as_text(parts.tokenizer) if method == "SPIN" else Dataset.from_list(SFT_ROWS)
    parent = build(
        "DPO" if method == "SPIN" else "SFT", "parent", model=str(saved_tiny_model),
        train_dataset=rows, **changes,
    )  # fmt: skip
    assert weights_of(ours) == weights_of(parent)
    for trainer in (ours, parent):
        assert trainer.processing_class.eos_token == "<eos>"
    assert ours.model.config._attn_implementation == parent.model.config._attn_implementation
