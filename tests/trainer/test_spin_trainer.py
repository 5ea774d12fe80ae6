"""SPIN's invariants, on real runs of a tiny model."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig
from trl import DPOTrainer

from trl_selfplay import SPINTrainer

LN_2 = math.log(2.0)
CASES = ("full", "lora", "user", "nf4", "full-path")


def lora(**changes):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"],
           "lora_dropout": 0.1, **changes}
    )  # fmt: skip


def trained_adapter(model):
    """A user's PeftModel whose adapter is no longer at its initial zero."""
    peft_model = get_peft_model(model, lora())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return peft_model


@pytest.fixture
def build_case(build_spin, tiny_model, word_tokenizer, tmp_path):
    """Return a function that builds a SPINTrainer in one of the cases of fine-tuning."""

    def build(case, **changes):
        base = tiny_model(word_tokenizer, hidden_size=64, intermediate_size=128)
        if case == "full":
            return build_spin(model=base, **changes)
        if case == "lora":
            return build_spin(model=base, peft_config=lora(), **changes)
        if case == "user":
            return build_spin(model=trained_adapter(base), **changes)
        base.save_pretrained(tmp_path / "saved")
        if case == "full-path":
            return build_spin(model=str(tmp_path / "saved"), **changes)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return build_spin(
            model=str(tmp_path / "saved"),
            quantization_config=quantization,
            peft_config=lora(),
            **changes,
        )

    return build


def first_steps(recorder):
    return [recorder.steps[t][0] for t in sorted(recorder.steps)]


def test_the_trainer_is_a_direct_subclass_of_its_parent() -> None:
    assert SPINTrainer.__bases__ == (DPOTrainer,)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_begins_at_ln_2_in_every_round(build_case, pair_recorder, case) -> None:
    """SP-1: rounds 0, 1 and 2, under gradient accumulation, in each case of fine-tuning."""
    trainer = build_case(case, callbacks=[pair_recorder], gradient_accumulation_steps=2,
                         per_device_train_batch_size=3)  # fmt: skip
    trainer.train()
    assert trainer.ref_model is None
    assert sorted(pair_recorder.steps) == [0, 1, 2]
    for logs in first_steps(pair_recorder):
        assert logs["loss"] == pytest.approx(LN_2, abs=1e-5)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert logs[name] == pytest.approx(0.0, abs=1e-5)
    # The rounds do move the policy, or the assertion would hold of any opponent.
    for steps in pair_recorder.steps.values():
        assert abs(steps[-1]["loss"] - LN_2) > 1e-3
