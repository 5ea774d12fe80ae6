"""EV-7: sampling leaves weights, train mode, dropout, checkpointing and random state alone."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from causal_classes import build_tiny
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from trl_selfplay.generation.quantized_layers import prepare_quantized_layers
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

OPTIONS = SamplingOptions(max_completion_length=6)
RAGGED = [SampleRequest((5,) * (5 + 2 * (i % 2)), i) for i in range(8)]
REQUESTS = [SampleRequest((5, 6, 7 + i), i) for i in range(6)]


def snapshot(model) -> dict:
    """Everything that sampling must leave as it was."""
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "checkpointing": {
            name: m.__dict__.get("gradient_checkpointing") for name, m in model.named_modules()
        },
        "functions": {
            name: m.__dict__.get("_gradient_checkpointing_func")
            for name, m in model.named_modules()
        },
        "use_cache": model.config.use_cache,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
    }


def assert_same(before, after) -> None:
    assert all(torch.equal(p, after["weights"][name]) for name, p in before["weights"].items())
    assert torch.equal(before["torch"], after["torch"])
    for key in before.keys() - {"weights", "torch"}:
        assert before[key] == after[key], key


@pytest.fixture(params=["plain", "accelerator"])
def training_sampler(request, build_model, tokenizer) -> tuple:
    """A LoRA model in the middle of training: dropout, checkpointing, one module in eval mode."""
    model = get_peft_model(build_model(attention_dropout=0.3), LoraConfig(r=2, lora_dropout=0.5))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.get_base_model().model.layers[0].eval()
    accelerator = Accelerator(cpu=True) if request.param == "accelerator" else None
    return model, TransformersSampler(model, tokenizer, accelerator=accelerator)


def test_the_state_is_as_before_after_sampling_to_the_end(training_sampler) -> None:
    """EV-7."""
    model, sampler = training_sampler
    before = snapshot(model)
    assert len(list(sampler.sample(REQUESTS, OPTIONS, batch_size=2))) == 6
    assert_same(before, snapshot(model))


def test_the_state_is_as_before_after_an_early_close(training_sampler) -> None:
    """EV-7."""
    model, sampler = training_sampler
    before = snapshot(model)
    iterator = sampler.sample(REQUESTS, OPTIONS, batch_size=2)
    next(iterator)
    modules = list(model.modules())
    assert not any(module.training for module in modules)
    assert not any(module.__dict__.get("gradient_checkpointing") for module in modules)
    assert torch.is_grad_enabled()  # the caller's own code keeps its gradients
    iterator.close()
    assert_same(before, snapshot(model))


def test_the_state_is_as_before_after_an_exception(training_sampler) -> None:
    """EV-7."""
    model, sampler = training_sampler
    before = snapshot(model)
    calls = 0

    def fail(module, args) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    hook = model.get_base_model().lm_head.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        list(sampler.sample(REQUESTS, OPTIONS, batch_size=2))
    hook.remove()
    assert_same(before, snapshot(model))


def test_a_training_step_has_the_same_gradients_after_sampling(training_sampler) -> None:
    """EV-7, dropout included."""
    model, sampler = training_sampler
    ids = torch.tensor([[5, 6, 7, 8, 9]])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(4)
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    list(sampler.sample(REQUESTS, OPTIONS, batch_size=6))
    after = gradients()
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.fixture
def bf16_accelerator() -> Iterator[Accelerator]:
    """An accelerator with mixed precision; its state is one for the process, so it is reset."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_of_the_accelerator_holds_while_sampling(
    build_model, tokenizer, bf16_accelerator
) -> None:
    """Under bf16 autocast the linear layers compute in bfloat16, and nowhere else."""
    model = build_model()
    dtypes: set[torch.dtype] = set()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, args, output: dtypes.add(output.dtype)
    )
    sampler = TransformersSampler(model, tokenizer, bf16_accelerator)
    iterator = sampler.sample(REQUESTS, OPTIONS, batch_size=3)
    next(iterator)
    assert not torch.is_autocast_enabled("cpu")
    assert len(list(iterator)) == 5
    assert dtypes == {torch.bfloat16}


def test_four_bit_lora_layers_still_get_gradients_after_sampling_on_a_cpu(
    build_model, tokenizer, tmp_path
) -> None:
    """Without the switch, a CPU with AVX512-BF16 repacks the weights and every gradient is None."""
    wide = {"hidden_size": 128, "intermediate_size": 128}
    build_model(**wide).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    # seven projections in each of two layers; the head stays as it is
    assert prepare_quantized_layers(model) == 14
    model.train()
    sampled = list(TransformersSampler(model, tokenizer).sample(REQUESTS, OPTIONS, batch_size=6))
    assert len(sampled) == 6
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    # lora_A's gradient is zero while lora_B is
    of_b = [gradient for name, gradient in gradients.items() if "lora_B" in name]
    assert len(of_b) == 14
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in of_b)


@pytest.mark.parametrize("asks_for_loss", [True, False])
def test_experts_are_sampled_without_their_balancing_loss(tokenizer, asks_for_loss) -> None:
    """It would compare one token's routing with the whole mask; training has it again."""
    model = build_tiny("mixtral")
    model.config.output_router_logits = False
    expected = dict(TransformersSampler(model, tokenizer).sample(REQUESTS, OPTIONS, 6))
    model.config.output_router_logits = asks_for_loss
    iterator = TransformersSampler(model, tokenizer).sample(RAGGED, OPTIONS, 6)
    next(iterator)
    assert model.config.output_router_logits is False
    iterator.close()
    assert model.config.output_router_logits is asks_for_loss
    assert dict(TransformersSampler(model, tokenizer).sample(REQUESTS, OPTIONS, 6)) == expected
    assert dict(TransformersSampler(model, tokenizer).sample(RAGGED, OPTIONS, 6))
    ids = torch.tensor([[5, 6, 7]])
    assert (model(input_ids=ids, labels=ids).aux_loss is not None) == asks_for_loss


def test_a_model_without_four_bit_layers_is_left_alone(build_model) -> None:
    assert prepare_quantized_layers(build_model()) == 0
