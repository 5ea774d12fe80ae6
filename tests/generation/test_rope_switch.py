"""Models whose rotary frequencies change with the sequence's length, which a batch shares."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

SWITCH, LIMIT, EOS = 24, 96, 1
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": EOS,
    "bos_token_id": 2,
}


@pytest.fixture(params=["longrope", "dynamic"])
def model(request) -> Any:
    torch.manual_seed(0)
    if request.param == "longrope":
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
        config = Phi3Config(
            **SIZES,
            max_position_embeddings=LIMIT,
            original_max_position_embeddings=SWITCH,
            rope_parameters={
                **rope,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": SWITCH,
            },
        )
        return Phi3ForCausalLM(config).float().eval()
    rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
    config = LlamaConfig(**SIZES, max_position_embeddings=SWITCH, rope_parameters=rope)
    return LlamaForCausalLM(config).float().eval()


def draw_requests(lengths, num_samples=2) -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, 259, (n,), generator=generator).tolist()) for n in lengths]
    return [
        SampleRequest(prompt, stream_key(0, 0, "train", str(prompt), k))
        for prompt in prompts
        for k in range(num_samples)
    ]


def test_rows_on_both_sides_and_across_are_those_of_generate(model, tokenizer) -> None:
    requests = draw_requests([4, 40, 20, 7, SWITCH, SWITCH - 1, 20, 5])
    options = SamplingOptions(12, temperature=0.0, eos_token_ids=(EOS,))
    sampler = TransformersSampler(model, tokenizer)
    found = dict(sampler.sample(requests, options, 6))
    num_compared = 0
    for i, request in enumerate(requests):
        ids = torch.tensor([request.prompt_ids])
        with torch.no_grad():
            model(ids[:, :1])  # dynamic frequencies stay stretched until a short sequence comes
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                do_sample=False, eos_token_id=EOS, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        theirs = out.sequences[0, ids.shape[1] :].tolist()
        for t, (a, b, logits) in enumerate(
            zip(found[i].completion_ids, theirs, out.logits, strict=False)
        ):
            best = logits[0].topk(2).values
            if best[0] - best[1] < 1e-3:  # rounding may choose
                break
            assert a == b, f"row {i} with {ids.shape[1]} tokens, token {t}"
            num_compared += 1
    assert num_compared > 8 * len(requests)


def test_a_short_row_is_the_same_beside_a_long_one(model, tokenizer) -> None:
    """Through freed places, and beside finished rows that stay for some steps."""
    options = SamplingOptions(
        10, temperature=1.0, eos_token_ids=tuple(range(1, 259, 12)), return_logprobs=True
    )
    short = draw_requests([4, 9, 14, 14, 6, 2, 11, 3], num_samples=4)
    long = draw_requests([30, 18, 22], num_samples=3)
    sampler = TransformersSampler(model, tokenizer)
    alone = [dict(sampler.sample([request], options, 1))[0] for request in short + long]
    for requests in (short + long, iter(short + long)):  # known at once, or one after the other
        together = dict(sampler.sample(requests, options, 8))
        for i, expected in enumerate(alone):
            assert together[i].completion_ids == expected.completion_ids
            assert together[i].logprob == pytest.approx(expected.logprob, abs=2e-3)


def test_only_rows_that_may_pass_the_switch_go_by_length(model, tokenizer) -> None:
    rows: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: rows.append(args[0].shape[0])
    )
    options = SamplingOptions(1, temperature=1.0)
    requests = draw_requests([3, 5, 7, SWITCH - 1, SWITCH, SWITCH], num_samples=1)
    list(TransformersSampler(model, tokenizer).sample(requests, options, 16))
    forgotten = [] if describe_model(model).rope_restarts else [1]
    assert rows == [*forgotten, 2, 4]


def test_dynamic_scaling_has_no_limit_and_longrope_its_own(model) -> None:
    traits = describe_model(model)
    expected = LIMIT if isinstance(model, Phi3ForCausalLM) else None
    assert (traits.context_length, traits.rope_switch) == (expected, SWITCH)
