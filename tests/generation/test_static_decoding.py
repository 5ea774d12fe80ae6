"""Steps over fixed buffers against a cache that grows: the same tokens, whatever the batch does.

On a CPU the steps run as they are; `-m gpu` captures them.
"""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.generation.test_transformers_sampler import (
    EOS,
    build_requests,
    collect,
    random_prompts,
)
from trl_selfplay.generation import decode_batch
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.generation.static_decoding import StaticDecoder
from trl_selfplay.generation.transformers_sampler import TransformersSampler

NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
OPTIONS = SamplingOptions(40, eos_token_ids=(EOS, 9, 23))


def static_sampler(model, tokenizer) -> TransformersSampler:
    """Return a sampler that decodes over fixed buffers, on a CPU as well."""
    sampler = TransformersSampler(model, tokenizer)
    sampler._static = StaticDecoder(model.device.type)
    return sampler


def buffers_of(sampler):
    return sampler._static._buffers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    ("lengths", "prefix_length", "batch_size", "changes"),
    [
        ([1, 9, 30, 4], 0, 5, {}),  # ragged; refilled and dropped
        ([1, 9, 30], 105, 64, {"top_k": 20}),  # behind a prefix, past the first size of buffers
        ([5, 5], 0, 4, {"repetition_penalty": 1.3, "top_p": 0.9, "return_logprobs": True}),
        ([20, 3], 0, 3, {"stop_strings": ("e", "ab")}),
    ],
)
def test_samples_equal_those_of_a_cache_that_grows(
    build_model, tokenizer, device, family, lengths, prefix_length, batch_size, changes
) -> None:
    model = build_model(family).eval().to(device)
    requests = build_requests(random_prompts(lengths, prefix_length=prefix_length), num_samples=3)
    options = SamplingOptions(40, eos_token_ids=(EOS, 9, 23), **changes)
    grown = TransformersSampler(model, tokenizer, cuda_graphs=False)
    expected = collect(grown, requests, options, batch_size)
    sampler = static_sampler(model, tokenizer)
    sampled = collect(sampler, requests, options, batch_size)
    for ours, theirs in zip(sampled, expected, strict=True):
        assert ours.completion_ids == theirs.completion_ids
        assert ours.finish == theirs.finish
        if options.return_logprobs:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    assert bool(buffers_of(sampler)._graphs) == (device == "cuda")


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("lengths", "prefix_length", "batch_size"), [([1, 9, 30], 0, 5), ([1, 9], 40, 7)]
)
def test_a_forward_that_begins_before_its_tokens_are_looked_at_changes_no_sample(
    build_model, tokenizer, monkeypatch, family, lengths, prefix_length, batch_size
) -> None:
    """As on a GPU, which computes by itself; the last row fills the model's context."""
    length = max(lengths) + prefix_length + 40
    model = build_model(family, max_position_embeddings=length - 1).eval()
    requests = build_requests(random_prompts(lengths, prefix_length=prefix_length), num_samples=3)
    options = SamplingOptions(
        40, eos_token_ids=(EOS, 9, 23), repetition_penalty=1.2, return_logprobs=True
    )
    sampler = TransformersSampler(model, tokenizer)
    expected = collect(sampler, requests, options, batch_size)
    monkeypatch.setattr(decode_batch, "_can_run_ahead", lambda forward: True)
    for found in (sampler, static_sampler(model, tokenizer)):
        for ours, theirs in zip(
            collect(found, requests, options, batch_size), expected, strict=True
        ):
            assert ours.completion_ids == theirs.completion_ids
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_change_in_place_are_used_by_the_next_call(
    build_model, tokenizer, device
) -> None:
    """And an adapter that is disabled, which changes no weight."""
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(build_model(), config).eval().to(device)
    requests = build_requests(random_prompts([4, 7]), num_samples=4)
    sampler = static_sampler(model, tokenizer)
    grown = TransformersSampler(model, tokenizer, cuda_graphs=False)

    def compared() -> list:
        sampled = collect(sampler, requests, OPTIONS, 8)
        assert sampled == collect(grown, requests, OPTIONS, 8)
        return sampled

    first = compared()
    buffers = buffers_of(sampler)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert compared() != first
    assert buffers_of(sampler) is buffers
    with model.disable_adapter():
        assert compared() != first
    assert buffers_of(sampler) is not buffers


@pytest.mark.parametrize("device", DEVICES)
def test_two_calls_at_a_time_do_not_disturb_each_other(build_model, tokenizer, device) -> None:
    model = build_model().eval().to(device)
    requests = build_requests(random_prompts([4, 7, 12]), num_samples=2)
    sampler = static_sampler(model, tokenizer)
    expected = collect(sampler, requests, OPTIONS, 6)
    pairs = zip(*(sampler.sample(requests, OPTIONS, 6) for _ in range(2)), strict=True)
    for ours, theirs in pairs:
        assert ours == theirs
        assert ours[1] == expected[ours[0]]


@pytest.mark.parametrize("device", DEVICES)
def test_release_frees_the_buffers(build_model, tokenizer, device) -> None:
    model = build_model().eval().to(device)
    sampler = static_sampler(model, tokenizer)
    collect(sampler, build_requests(random_prompts([4, 7])), OPTIONS, 2)
    held = [weakref.ref(t) for t in buffers_of(sampler)._keys]
    sampler.release()
    gc.collect()
    assert held
    assert all(tensor() is None for tensor in held)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_fails_is_done_without_buffers(
    build_model, tokenizer, caplog, device, monkeypatch
) -> None:
    model = build_model().eval().to(device)
    requests = build_requests(random_prompts([4, 7]), num_samples=2)
    grown = TransformersSampler(model, tokenizer, cuda_graphs=False)
    expected = collect(grown, requests, OPTIONS, 4)
    sampler = static_sampler(model, tokenizer)
    forward = type(model.model.layers[0].mlp).forward

    def read(self, states):
        if sampler._static._buffers is not None and buffers_of(sampler)._met:
            if device == "cpu":
                raise RuntimeError("as a capture would")
            states.sum().item()  # which a capture doesn't allow
        return forward(self, states)

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", read)
    assert collect(sampler, requests, OPTIONS, 4) == expected
    assert caplog.text.count("without CUDA graphs") == 1
    if device == "cuda":
        # Both fail after a capture that was not ended.
        torch.cuda.empty_cache()
        torch.rand(1, device=device)


def test_running_out_of_memory_halves_the_batch(build_model, tokenizer, monkeypatch) -> None:
    model = build_model().eval()
    requests = build_requests(random_prompts([4, 7]), num_samples=4)
    grown = TransformersSampler(model, tokenizer, cuda_graphs=False)
    expected = collect(grown, requests, OPTIONS, 8)
    sampler = static_sampler(model, tokenizer)
    zeros = torch.Tensor.new_zeros

    def scarce(self, shape, **kwargs):
        if len(shape) == 4 and shape[0] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return zeros(self, shape, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_zeros", scarce)
    assert collect(sampler, requests, OPTIONS, 8) == expected
    assert buffers_of(sampler)._size[0] == 2


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {}),  # sliding windows
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("llama", {"attn_implementation": "flex_attention"}),
    ],
)
def test_models_whose_steps_differ_are_not_taken(build_model, family, changes) -> None:
    model = build_model(family, **changes)
    assert not StaticDecoder("cpu").takes(model, describe_model(model))
    assert StaticDecoder("cpu").takes(build_model(), describe_model(build_model()))
    assert not StaticDecoder().takes(build_model(), describe_model(build_model()))
