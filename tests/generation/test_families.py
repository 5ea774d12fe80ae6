"""Every family of layers: which rows go together, against lone runs and `generate`."""

import random
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from causal_classes import build_tiny, family_names
from family_checks import check_sampling
from packaging.version import Version
from transformers import PreTrainedModel

from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

EOS, VOCAB_SIZE = 1, 259
WINDOW = 16
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    # wide weights, so that the next token depends on the prompt and greedy text varies
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
GROUPED = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Class names without "Config" and "ForCausalLM", the config's values, and the padding expected.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, "inside"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", COMMON, "inside"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**COMMON, "intermediate_size": 64}, "inside"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED, "inside"),
    "mixture": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS}, "inside"),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}, "left"),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**GROUPED, "num_hidden_layers": 7, "sliding_window": WINDOW},
        "left",
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {k: COMMON[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
        | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}
        | {"initializer_range": 0.3, "eos_token_id": EOS, "bos_token_id": None},
        "none",
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**GROUPED, **EXPERTS, "num_hidden_layers": 4, "shared_expert_intermediate_size": 16}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        "none",
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {**{k: v for k, v in GROUPED.items() if k != "head_dim"}, "num_hidden_layers": 3}
        | {"layer_types": ["conv", "full_attention", "conv"]},
        "none",
    ),
}  # fmt: skip


# Of all causal classes a tenth is in the fast tests.
NAMES = family_names()
DRAWN = random.Random(0).sample(NAMES, len(NAMES) // 10)


@pytest.fixture
def build() -> Callable[[str], PreTrainedModel]:
    """Build a tiny random model of a family, in float32 and eval mode."""

    def build(family: str) -> PreTrainedModel:
        config_name, model_name, values, _ = FAMILIES[family]
        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**values)
        return getattr(transformers, model_name)(config).float().eval()

    return build


def draw_prompts(lengths, prefix_length=0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)

    def draw(n) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist())

    prefix = draw(prefix_length)
    return [prefix + draw(n) for n in lengths]


def requests_for(prompts, num_samples) -> list[SampleRequest]:
    return [
        SampleRequest(prompt, stream_key(0, 0, "train", str(prompt), k))
        for prompt in prompts
        for k in range(num_samples)
    ]


def completions(model, tokenizer, requests, options, batch_size) -> list[tuple[int, ...]]:
    sampler = TransformersSampler(model, tokenizer)
    pairs = dict(sampler.sample(requests, options, batch_size))
    return [pairs[i].completion_ids for i in range(len(requests))]


@pytest.mark.parametrize("family", FAMILIES)
def test_where_padding_may_stand_is_read_off_the_layers(build, family) -> None:
    traits = describe_model(build(family))
    assert traits.padding == FAMILIES[family][3]
    assert traits.window == (WINDOW if traits.padding == "left" else None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("lengths", "prefix_length"),
    [([1, 9, 5, 9], 0), ([2, 7, 4], 24)],  # past the windows from the start, or soon
    ids=["ragged", "shared-prefix"],
)
def test_greedy_text_equals_a_lone_run_of_generate(
    build, tokenizer, family, lengths, prefix_length
) -> None:
    model = build(family)
    requests = requests_for(draw_prompts(lengths, prefix_length), num_samples=2)
    options = SamplingOptions(max_completion_length=20, temperature=0.0, eos_token_ids=(EOS,))
    found = completions(model, tokenizer, requests, options, batch_size=6)
    num_compared = 0
    for request, ours in zip(requests, found, strict=True):
        ids = torch.tensor([request.prompt_ids])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                do_sample=False, eos_token_id=EOS, pad_token_id=0,
            )  # fmt: skip
            theirs = out[0, ids.shape[1] :].tolist()
            logits = model(out).logits[0, ids.shape[1] - 1 : -1].float()
        for t, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            best = logits[t].topk(2).values
            if best[0] - best[1] < 1e-3:  # rounding may choose
                break
            assert a == b, f"token {t}"
            num_compared += 1
    assert num_compared > 5 * len(requests)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_and_logprobs_equal_those_of_each_row_alone(build, tokenizer, family) -> None:
    """Last-token logits of every path: `logprob` sums them over the whole completion."""
    model = build(family)
    requests = requests_for(draw_prompts([2, 7, 7, 4], prefix_length=20), num_samples=3)
    options = SamplingOptions(12, temperature=1.0, eos_token_ids=(EOS,), return_logprobs=True)
    sampler = TransformersSampler(model, tokenizer)
    alone = dict(sampler.sample(requests, options, 1))
    together = dict(sampler.sample(requests, options, 12))
    for i, request in enumerate(requests):
        assert together[i].completion_ids == alone[i].completion_ids
        ids = torch.tensor([[*request.prompt_ids, *alone[i].completion_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].float().log_softmax(-1)
        start = len(request.prompt_ids)
        expected = logprobs[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum().item()
        assert together[i].logprob == pytest.approx(expected, abs=2e-3)


def num_tokens_computed(model, tokenizer, prompts, num_samples, length=1) -> list[int]:
    counts: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: counts.append(args[0].numel())
    )
    options = SamplingOptions(max_completion_length=length, temperature=1.0)
    completions(model, tokenizer, requests_for(prompts, num_samples), options, batch_size=64)
    return counts


def test_windows_that_hold_everything_share_a_prefix_as_full_attention_does(
    build, tokenizer
) -> None:
    model = build("mistral")
    model.config.sliding_window = 64
    prompts = draw_prompts([4, 6], prefix_length=20)
    assert num_tokens_computed(model, tokenizer, prompts, num_samples=3) == [20, 12]


def test_past_its_window_a_model_computes_each_prompt_once_and_no_prefix(build, tokenizer) -> None:
    prompts = draw_prompts([4, 6], prefix_length=20)
    assert num_tokens_computed(build("mistral"), tokenizer, prompts, num_samples=3) == [2 * 26]


def test_recurrent_rows_go_together_only_if_equally_long(build, tokenizer) -> None:
    prompts = draw_prompts([4, 6, 6])
    assert num_tokens_computed(build("lfm2"), tokenizer, prompts, num_samples=3) == [12, 4]


def test_a_model_with_a_state_of_its_own_is_an_error_that_names_it(tokenizer) -> None:
    config = transformers.RwkvConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2
    )
    with pytest.raises(ValueError, match="RwkvForCausalLM keeps its state in a form of its own"):
        describe_model(transformers.RwkvForCausalLM(config))


def test_a_multimodal_model_is_an_error_that_names_it() -> None:
    text = {**GROUPED, "vocab_size": 300}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    )
    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration takes images"):
        describe_model(transformers.Gemma3ForConditionalGeneration(config))


@pytest.mark.parametrize("family", ["Llava", "Mistral3", "Gemma3"])
def test_the_advice_for_multimodal_checkpoints_gives_equal_logits(
    family, tokenizer, tmp_path
) -> None:
    """The code of the error message, run as it is; Mistral 3 ties its embeddings at the top."""
    text = {
        **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    }
    vision = {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
    }
    parts = {"text_config": text, "vision_config": vision}
    if family == "Llava":
        parts = {
            "text_config": transformers.LlamaConfig(**text),
            "vision_config": transformers.CLIPVisionConfig(**vision),
        }
    config = getattr(transformers, f"{family}Config")(**parts)
    full = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    names: dict[str, Any] = {"name": str(tmp_path / "full"), "folder": str(tmp_path / "text")}
    full.save_pretrained(names["name"])
    tokenizer.save_pretrained(names["name"])
    with pytest.raises(ValueError, match="takes images") as refused:
        describe_model(full)
    code = [line for line in str(refused.value).splitlines() if line.startswith("    ")]
    classes = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoTokenizer")
    names |= {c: getattr(transformers, c) for c in classes}
    exec(textwrap.dedent("\n".join(code)), names)
    alone = transformers.AutoModelForCausalLM.from_pretrained(names["folder"]).eval()
    assert describe_model(alone)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(full(input_ids=ids).logits, alone(input_ids=ids).logits)
    assert len(transformers.AutoTokenizer.from_pretrained(names["folder"])) == len(tokenizer)


@pytest.mark.parametrize("most", [5, 1])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_changes(
    build, tokenizer, caplog, most
) -> None:
    """A forward on more rows than fit asks for memory that no machine has."""
    model = build("llama")
    requests = requests_for(draw_prompts([3, 5, 4], prefix_length=18), num_samples=4)
    options = SamplingOptions(max_completion_length=8, temperature=1.0, eos_token_ids=(EOS,))
    expected = completions(model, tokenizer, requests, options, batch_size=12)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            torch.empty(1 << 60) if kwargs["input_ids"].shape[0] > most else None
        ) and None,
        with_kwargs=True,
    )  # fmt: skip
    found = completions(model, tokenizer, requests, options, batch_size=12)
    assert found == expected
    warned = "out of memory with 12 sequences at once; continuing with 6. The error: "
    assert any(
        text.startswith(warned) and "allocate" in text.removeprefix(warned)
        for text in caplog.messages
    )


def test_a_single_row_that_does_not_fit_is_an_error(build, tokenizer) -> None:
    model = build("llama")
    model.register_forward_pre_hook(lambda *_: torch.empty(1 << 60))
    options = SamplingOptions(max_completion_length=8)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        completions(model, tokenizer, requests_for(draw_prompts([3]), 1), options, batch_size=4)


@pytest.mark.parametrize("family", [f for f, v in FAMILIES.items() if v[3] != "none"])
@pytest.mark.parametrize("prefix_length", [0, 20])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_rows_that_fill_freed_places_are_those_of_lone_runs(
    build, tokenizer, family, prefix_length, penalty
) -> None:
    """Ragged prompts and completions through few places: refilled again and again."""
    model = build(family)
    prompts = draw_prompts([12, 3, 9, 9, 1, 6, 2, 14, 5, 7], prefix_length)
    requests = requests_for(prompts, num_samples=2)
    options = SamplingOptions(
        30, temperature=1.0, eos_token_ids=tuple(range(1, VOCAB_SIZE, 12)), return_logprobs=True,
        repetition_penalty=penalty,
    )  # fmt: skip
    sampler = TransformersSampler(model, tokenizer)
    alone = dict(sampler.sample(requests, options, 1))
    together = dict(sampler.sample(requests, options, 5))
    assert len({len(c.completion_ids) for c in alone.values()}) > 6
    for i in range(len(requests)):
        assert together[i].completion_ids == alone[i].completion_ids
        assert together[i].finish == alone[i].finish
        assert together[i].logprob == pytest.approx(alone[i].logprob, abs=2e-3)


def test_freed_places_are_filled_so_that_fewer_steps_are_needed(build, tokenizer) -> None:
    model = build("llama")
    rows_by_step: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: (
            rows_by_step.append(args[0].shape[0]) if args[0].shape[1] == 1 else None
        )
    )
    requests = requests_for(draw_prompts([5] * 16), num_samples=4)
    options = SamplingOptions(40, temperature=1.0, eos_token_ids=tuple(range(1, VOCAB_SIZE, 12)))
    lengths = [len(c) for c in completions(model, tokenizer, requests, options, batch_size=8)]
    waves = [max(lengths[i : i + 8]) - 1 for i in range(0, 64, 8)]
    assert len(rows_by_step) < 0.8 * sum(waves)
    assert max(rows_by_step) <= 8


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_the_cache_grows_no_longer_than_one_row_needs(build, tokenizer, family) -> None:
    """Columns that only finished rows could see are dropped."""
    model = build(family)
    lengths: list[int] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["past_key_values"].get_seq_length()),
        with_kwargs=True,
    )
    requests = requests_for(draw_prompts([5] * 64), num_samples=1)
    options = SamplingOptions(20, temperature=1.0, eos_token_ids=tuple(range(1, VOCAB_SIZE, 12)))
    completions(model, tokenizer, requests, options, batch_size=8)
    # Refills are a few steps apart, and what went out of sight since the last one is still there.
    assert max(lengths) < 2 * 25


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_an_eos_that_is_also_the_pad_ends_completions_and_masks_padding(
    build, tokenizer, family
) -> None:
    """Padding is masked by place and not by token, so EOS inside a prompt is seen as well."""
    model = build(family)
    prompts = [(*p[:2], EOS, *p[2:]) for p in draw_prompts([3, 12, 7])]
    requests = requests_for(prompts, num_samples=3)
    options = SamplingOptions(16, temperature=1.0, eos_token_ids=(EOS, 9, 40, 77, 120))
    padded_with_eos = TransformersSampler(model, tokenizer, pad_token_id=EOS)
    plain = dict(TransformersSampler(model, tokenizer).sample(requests, options, 9))
    found = dict(padded_with_eos.sample(requests, options, 9))
    assert found == plain
    assert any(c.finish == "eos" for c in found.values())


def test_learned_positions_end_a_completion_before_they_run_out(build, tokenizer) -> None:
    """Prompt and completion never hold more tokens than GPT-2 has positions, row by row."""
    prompts = draw_prompts([250, 240, 3])
    options = SamplingOptions(max_completion_length=20, temperature=1.0)
    found = completions(build("gpt2"), tokenizer, requests_for(prompts, 2), options, batch_size=6)
    assert [len(c) for c in found] == [6, 6, 16, 16, 20, 20]


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_classes_sample_as_generate_or_are_refused(tokenizer, name) -> None:
    if name == "cohere_compass_text" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers before 5.23 can't build this class so small")
    check_sampling(build_tiny(name), tokenizer)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(DRAWN)))
def test_every_class_samples_as_generate_or_is_refused(tokenizer, name) -> None:
    check_sampling(build_tiny(name), tokenizer)
