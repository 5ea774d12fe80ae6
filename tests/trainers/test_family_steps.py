"""Every causal class of transformers takes a step with every trainer, or is refused."""

import pytest
import torch
from causal_classes import build_tiny, family_names
from family_checks import TRAINERS, build_trainer, check_training


@pytest.mark.full
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("name", family_names())
def test_every_class_trains_or_is_refused(tmp_path, byte_tokenizer, name, trainer) -> None:
    check_training(name, trainer, tmp_path / "run", byte_tokenizer)


@pytest.mark.parametrize("trainer", ["STaR", "SPIN"])
def test_experts_are_balanced_in_training_and_sampled_without(
    tmp_path, byte_tokenizer, recorder, trainer
) -> None:
    """The loss of one token's routing against a whole mask stopped the first step of sampling."""
    model = build_tiny("mixtral")
    model.config.output_router_logits = True
    built = build_trainer(trainer, model, tmp_path / "run", byte_tokenizer)
    built.add_callback(recorder)
    built.train()
    assert any(logs.get("aux_loss", 0.0) > 0.0 for logs in recorder.logs)


@pytest.mark.parametrize(("trainer", "name"), [("STaR", "doge"), ("SPIN", "phimoe")])
def test_a_balancing_loss_that_cannot_be_had_is_refused_and_can_be_left_out(
    tmp_path, byte_tokenizer, trainer, name
) -> None:
    """TRL's own trainers fail in the first step: without experts, or with their number elsewhere."""
    with pytest.raises(ValueError, match=r"Set router_aux_loss_coef=0\.0") as caught:
        build_trainer(trainer, build_tiny(name), tmp_path / "run", byte_tokenizer)
    assert type(build_tiny(name)).__name__ in str(caught.value)
    built = build_trainer(
        trainer, build_tiny(name), tmp_path / "run", byte_tokenizer, router_aux_loss_coef=0.0
    )
    assert torch.isfinite(torch.tensor(built.train().training_loss))


@pytest.mark.parametrize("trainer", ["STaR", "SPIN"])
def test_a_class_that_the_parent_cannot_train_is_refused(tmp_path, byte_tokenizer, trainer) -> None:
    """Llama 4's backbone is named otherwise than its class says."""
    with pytest.raises(ValueError, match="TRL can't train Llama4ForCausalLM: its forward fails"):
        build_trainer(trainer, build_tiny("llama4_text"), tmp_path / "run", byte_tokenizer)


def test_a_class_that_is_sampled_wrongly_is_refused_by_the_constructor(
    tmp_path, byte_tokenizer
) -> None:
    model = build_tiny("recurrent_gemma")
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM can't be sampled from"):
        build_trainer("STaR", model, tmp_path / "run", byte_tokenizer)
