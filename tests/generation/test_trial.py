"""What a trial of a few tokens finds before a run begins, and that it leaves the model alone."""

import pytest
import torch
from accelerate import Accelerator
from causal_classes import build_tiny
from peft import LoraConfig, get_peft_model
from test_sampling_state import assert_same, snapshot

from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.trial import try_model


def test_a_model_that_works_keeps_the_traits_of_its_layers(build_model) -> None:
    for family in ("llama", "mistral", "gpt2"):
        model = build_model(family)
        assert try_model(model) == describe_model(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_in_the_modules_is_found_in_any_precision(dtype) -> None:
    """RecurrentGemma: what one batch leaves behind, the next one goes on with.

    Before transformers 5.23 it is refused because it fills no cache.
    """
    model = build_tiny("recurrent_gemma").to(dtype)
    reason = "keeps a state in its modules|left 0 tokens in its cache"
    with pytest.raises(ValueError, match=f"RecurrentGemmaForCausalLM .*({reason})"):
        try_model(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(build_model, dtype) -> None:
    for family in ("llama", "mistral"):
        model = build_model(family).to(dtype)
        assert try_model(model) == describe_model(model)


def test_mixed_precision_is_tried_as_it_is_sampled(build_model) -> None:
    model = build_model()
    accelerator = Accelerator(cpu=True)
    dtypes: set[torch.dtype] = set()
    model.lm_head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    assert try_model(model, accelerator) == describe_model(model)
    assert dtypes == {torch.bfloat16}


def test_a_cache_of_its_own_is_an_error_before_the_first_round() -> None:
    with pytest.raises(ValueError, match=r"MiniMaxForCausalLM can't be sampled from.*MiniMax uses"):
        try_model(build_tiny("minimax"))


def test_an_encoder_is_refused() -> None:
    """Its class is that of a decoder: only `is_decoder` tells them apart."""
    model = build_tiny("bert", is_decoder=False)
    with pytest.raises(ValueError, match="BertLMHeadModel can't be sampled from"):
        try_model(model)


def test_positions_that_a_model_numbers_itself_are_left_to_it() -> None:
    """RoBERTa's begin behind its pad token, so the last ones are out of reach."""
    model = build_tiny("roberta")
    traits = try_model(model)
    assert (traits.padding, traits.takes_position_ids) == ("none", False)
    assert traits.context_length == model.config.max_position_embeddings - 1
    model(torch.full((1, traits.context_length), 5))


def test_an_activated_lora_is_refused(build_model) -> None:
    adapter = LoraConfig(r=2, task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8])
    model = get_peft_model(build_model(), adapter)
    with pytest.raises(ValueError, match="activated LoRA"):
        try_model(model)


def test_the_trial_leaves_the_model_as_it_was(build_model) -> None:
    model = get_peft_model(build_model(attention_dropout=0.3), LoraConfig(r=2, lora_dropout=0.5))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.get_base_model().model.layers[0].eval()
    before = snapshot(model)
    try_model(model, Accelerator(cpu=True))
    assert_same(before, snapshot(model))


def test_a_forward_that_fails_is_an_error_that_names_the_model(build_model) -> None:
    model = build_model()
    model.model.norm.register_forward_pre_hook(lambda *_: {}["state"])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM can't be sampled.*KeyError: 'state'"):
        try_model(model)


def test_running_out_of_memory_is_not_called_a_fault_of_the_model(build_model) -> None:
    model = build_model()

    def fail(*_) -> None:
        raise torch.OutOfMemoryError("out of memory")

    model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        try_model(model)
