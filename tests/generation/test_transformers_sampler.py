"""The sampler against `generate`, exact softmax distributions and scoring forwards."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import T5Config, T5ForConditionalGeneration

from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.token_filters import filter_logits
from trl_selfplay.generation.transformers_sampler import TransformersSampler

# Of the tokenizer in conftest.py: its special tokens come first, then 256 bytes.
PAD, EOS, END = 0, 1, 2
VOCAB_SIZE = 259

# Where the two best logits are closer than this, rounding may choose.
SMALLEST_GAP = 1e-3


def random_prompts(lengths, seed=0, prefix_length=0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(n) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist())

    prefix = draw(prefix_length)
    return [prefix + draw(n) for n in lengths]


def build_requests(prompts, num_samples=1) -> list[SampleRequest]:
    return [
        SampleRequest(prompt, stream_key(0, 0, "train", str(prompt), k))
        for prompt in prompts
        for k in range(num_samples)
    ]


def collect(sampler, requests, options, batch_size) -> list:
    """Return completions in the order of the requests; each must come exactly once."""
    pairs = list(sampler.sample(requests, options, batch_size))
    assert sorted(index for index, _ in pairs) == list(range(len(requests)))
    return [completion for _, completion in sorted(pairs, key=lambda pair: pair[0])]


def assert_equal_until_a_tie(model, prompt, ours, theirs) -> int:
    """Compare token by token up to the first near-tie; return how many tokens were compared."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *theirs]])).logits[0]
    for t, (a, b) in enumerate(itertools.zip_longest(ours, theirs)):
        best = logits[len(prompt) + t - 1].topk(2).values
        if best[0] - best[1] < SMALLEST_GAP:
            return t
        assert a == b, f"token {t} of {len(theirs)}"
    return len(theirs)


@torch.no_grad()
def generate(model, prompt, length, eos=EOS, repetition_penalty=1.0) -> list[int]:
    """Return what `generate` gives for one lone prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=PAD,
        repetition_penalty=repetition_penalty,
    )
    return out[0, len(prompt) :].tolist()


GREEDY = SamplingOptions(max_completion_length=24, temperature=0.0, eos_token_ids=(EOS,))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    ("lengths", "prefix_length", "num_samples", "batch_size"),
    [
        ([1, 9, 30, 4, 9], 0, 1, 8),  # ragged
        ([1, 9, 30, 4], 40, 2, 64),  # behind a shared prefix, two samples each
        ([5, 7, 6], 25, 3, 4),  # the samples of a prompt fall into two batches
        ([1, 3], 0, 1, 1),
        ([1], 0, 1, 1),
        ([6, 6, 6], 0, 1, 2),  # no padding
    ],
)
def test_greedy_completions_equal_generate(
    build_model, tokenizer, family, lengths, prefix_length, num_samples, batch_size
) -> None:
    model = build_model(family).eval()
    prompts = random_prompts(lengths, prefix_length=prefix_length)
    requests = build_requests(prompts, num_samples)
    sampled = collect(TransformersSampler(model, tokenizer), requests, GREEDY, batch_size)
    num_compared = 0
    for request, completion in zip(requests, sampled, strict=True):
        expected = generate(model, request.prompt_ids, 24)
        num_compared += assert_equal_until_a_tie(
            model, request.prompt_ids, completion.completion_ids, expected
        )
    assert num_compared > 10 * len(requests)


def test_greedy_completions_with_a_repetition_penalty_equal_generate(
    build_model, tokenizer
) -> None:
    model = build_model().eval()
    prompts = random_prompts([3, 20, 8], prefix_length=20)
    options = SamplingOptions(
        max_completion_length=24, temperature=0.0, eos_token_ids=(EOS,), repetition_penalty=1.5
    )
    sampled = collect(
        TransformersSampler(model, tokenizer), build_requests(prompts), options, batch_size=4
    )
    for prompt, completion in zip(prompts, sampled, strict=True):
        expected = generate(model, prompt, 24, repetition_penalty=1.5)
        assert list(completion.completion_ids) == expected
        assert expected != generate(model, prompt, 24)


def test_the_shared_prefix_and_each_prompt_are_computed_once(build_model, tokenizer) -> None:
    model = build_model()
    num_tokens: list[int] = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: num_tokens.append(args[0].numel())
    )
    requests = build_requests(random_prompts([4, 6], prefix_length=50), num_samples=3)
    options = SamplingOptions(max_completion_length=1, temperature=1.0)
    collect(TransformersSampler(model, tokenizer), requests, options, batch_size=6)
    # 50 shared tokens, then the rests of two prompts, padded to six
    assert num_tokens == [50, 12]


@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_that_is_the_prefix_of_another_keeps_its_last_token(
    build_model, tokenizer, seed
) -> None:
    model = build_model().eval()
    (long,) = random_prompts([40], seed=seed)
    prompts = [long, long[:20], long[:21]]
    sampled = collect(
        TransformersSampler(model, tokenizer), build_requests(prompts), GREEDY, batch_size=3
    )
    for prompt, completion in zip(prompts, sampled, strict=True):
        expected = generate(model, prompt, 24)
        assert_equal_until_a_tie(model, prompt, completion.completion_ids, expected)


def test_a_lora_model_samples_with_its_adapter(build_model, tokenizer) -> None:
    base = build_model()
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts = random_prompts([4, 9, 2], prefix_length=30)
    model.train()  # dropout must be off while sampling
    sampled = collect(
        TransformersSampler(model, tokenizer), build_requests(prompts), GREEDY, batch_size=8
    )
    model.eval()
    num_changed = 0
    for prompt, completion in zip(prompts, sampled, strict=True):
        expected = generate(model, prompt, 24)
        assert assert_equal_until_a_tie(model, prompt, completion.completion_ids, expected) > 3
        with model.disable_adapter():
            num_changed += generate(model, prompt, 24) != expected
    assert num_changed == 3


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.3, "min_p": 0.2},
    {"temperature": 0.8, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
]


@pytest.mark.parametrize("filters", FILTERS)
def test_samples_have_the_distribution_of_the_filtered_softmax(
    build_model, tokenizer, filters
) -> None:
    """Chi-square of 6,000 two-token completions against the product of exact probabilities."""
    model = build_model(vocab_size=12, initializer_range=0.15).eval()
    prompt = (5, 3, 11, 3)
    options = SamplingOptions(max_completion_length=2, **filters)
    requests = [
        SampleRequest(prompt, stream_key(7, 0, "train", "p", index)) for index in range(6000)
    ]
    sampled = collect(TransformersSampler(model, tokenizer), requests, options, batch_size=1000)
    counts = np.zeros((12, 12))
    for completion in sampled:
        counts[completion.completion_ids] += 1

    def distribution(prefix) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([prefix])).logits[:, -1].float()
        seen = torch.zeros(1, 12, dtype=torch.bool)
        seen[0, list(prefix)] = True
        return filter_logits(logits.clone(), options, seen)[0].double().softmax(-1)

    first = distribution(prompt)
    expected = torch.stack([first[a] * distribution((*prompt, a)) for a in range(12)]).numpy()
    assert counts[expected == 0].sum() == 0
    # cells with few expected counts are pooled, as the test's approximation asks
    large = expected * 6000 >= 5
    observed = [*counts[large], counts[~large].sum()]
    wanted = [*(expected[large] * 6000), expected[~large].sum() * 6000]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, np.array(wanted) / sum(wanted) * 6000).pvalue > 1e-3
    assert large.sum() > 8


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_samples_do_not_depend_on_batch_size_or_order(build_model, tokenizer, family) -> None:
    model = build_model(family, initializer_range=0.1)
    prompts = random_prompts([2, 9, 5, 1, 14], prefix_length=20)
    requests = build_requests(prompts, num_samples=3)
    options = SamplingOptions(
        max_completion_length=20,
        temperature=0.8,
        top_p=0.9,
        # some of the vocabulary ends a completion, so that rows leave at different steps
        eos_token_ids=tuple(range(1, VOCAB_SIZE, 20)),
    )
    sampler = TransformersSampler(model, tokenizer)
    expected = collect(sampler, requests, options, batch_size=1)
    assert {completion.finish for completion in expected} == {"eos", "length"}
    for batch_size in (2, 4, 15, 64):
        assert collect(sampler, requests, options, batch_size) == expected
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = collect(sampler, [requests[i] for i in order], options, batch_size=4)
    assert shuffled == [expected[i] for i in order]
    assert collect(sampler, requests[4:5], options, batch_size=4) == [expected[4]]


def test_the_samples_of_one_prompt_differ_and_are_reproducible(build_model, tokenizer) -> None:
    model = build_model()
    requests = build_requests(random_prompts([5]), num_samples=16)
    options = SamplingOptions(max_completion_length=8, temperature=1.5)
    sampler = TransformersSampler(model, tokenizer)
    first = collect(sampler, requests, options, batch_size=16)
    assert len({completion.completion_ids for completion in first}) == 16
    torch.manual_seed(999)
    assert collect(sampler, requests, options, batch_size=16) == first


def test_any_of_several_eos_ids_ends_a_completion_and_is_part_of_it(build_model, tokenizer) -> None:
    model = build_model(initializer_range=0.05)
    eos_token_ids = (EOS, *range(100, 130))
    options = SamplingOptions(max_completion_length=60, eos_token_ids=eos_token_ids)
    requests = build_requests(random_prompts([3, 5]), num_samples=20)
    sampled = collect(TransformersSampler(model, tokenizer), requests, options, batch_size=40)
    assert {c.finish for c in sampled} == {"eos"}
    assert len({c.completion_ids[-1] for c in sampled}) > 10
    for completion in sampled:
        assert completion.completion_ids[-1] in eos_token_ids
        assert not set(completion.completion_ids[:-1]) & set(eos_token_ids)


def test_an_eos_at_the_last_allowed_token_is_not_a_cut(build_model, tokenizer) -> None:
    model = build_model().eval()
    (prompt,) = random_prompts([7])
    tokens = generate(model, prompt, 5)
    options = SamplingOptions(max_completion_length=5, temperature=0.0, eos_token_ids=(tokens[4],))
    assert tokens[4] not in tokens[:4]
    sampler = TransformersSampler(model, tokenizer)
    (completion,) = collect(sampler, build_requests([prompt]), options, batch_size=1)
    assert (list(completion.completion_ids), completion.finish) == (tokens, "eos")


def test_a_stop_string_across_tokens_ends_a_completion_at_its_last_token(
    build_model, tokenizer
) -> None:
    model = build_model().eval()
    prompts = random_prompts([4, 8, 6])
    sampler = TransformersSampler(model, tokenizer)
    plain = SamplingOptions(max_completion_length=30, temperature=0.8)
    requests = build_requests(prompts, num_samples=4)
    unstopped = collect(sampler, requests, plain, batch_size=5)
    texts = [tokenizer.decode(c.completion_ids) for c in unstopped]
    stops = tuple(text[10:12] for text in texts if "\ufffd" not in text[10:12])[:3]
    assert len(stops) == 3
    options = SamplingOptions(max_completion_length=30, temperature=0.8, stop_strings=stops)
    stopped = collect(sampler, requests, options, batch_size=5)
    num_stopped = 0
    for before, after in zip(unstopped, stopped, strict=True):
        lengths = [
            n
            for n in range(1, 31)
            if any(s in tokenizer.decode(before.completion_ids[:n]) for s in stops)
        ]
        if lengths:
            assert after.finish == "stop"
            assert after.completion_ids == before.completion_ids[: lengths[0]]
            num_stopped += 1
        else:
            assert after == before
    assert num_stopped >= 3


@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8, "repetition_penalty": 1.3}],
)
def test_the_logprob_equals_a_scoring_forward(build_model, tokenizer, filters) -> None:
    model = build_model(initializer_range=0.1).eval()
    requests = build_requests(random_prompts([3, 12, 7], prefix_length=20), num_samples=3)
    options = SamplingOptions(
        max_completion_length=15,
        eos_token_ids=tuple(range(1, VOCAB_SIZE, 16)),
        return_logprobs=True,
        **filters,
    )
    sampled = collect(TransformersSampler(model, tokenizer), requests, options, batch_size=4)
    assert len({len(c.completion_ids) for c in sampled}) >= 3
    for request, completion in zip(requests, sampled, strict=True):
        ids = [*request.prompt_ids, *completion.completion_ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].float()
        total = 0.0
        for t, token in enumerate(completion.completion_ids):
            place = len(request.prompt_ids) + t
            seen = torch.zeros(1, VOCAB_SIZE, dtype=torch.bool)
            seen[0, ids[:place]] = True
            filtered = filter_logits(logits[place - 1 : place].clone(), options, seen)
            total += float(filtered.double().log_softmax(-1)[0, token])
        assert completion.logprob == pytest.approx(total, abs=1e-3)
    without = SamplingOptions(max_completion_length=3, eos_token_ids=(EOS,))
    assert {
        c.logprob for c in collect(TransformersSampler(model, tokenizer), requests, without, 9)
    } == {None}


@pytest.mark.parametrize("batch_size", [4, 64])
def test_tokens_are_told_as_they_are_decoded(build_model, tokenizer, batch_size) -> None:
    model = build_model(initializer_range=0.05)
    requests = build_requests(random_prompts([4, 7, 5]), num_samples=4)
    options = SamplingOptions(50, eos_token_ids=tuple(range(1, VOCAB_SIZE, 10)))
    told: list[int] = []
    before_first, completions = None, []
    sampler = TransformersSampler(model, tokenizer)
    for _, completion in sampler.sample(requests, options, batch_size, told.append):
        before_first = before_first or list(told)
        completions.append(completion)
    assert sum(told) == sum(len(c.completion_ids) for c in completions)
    # one per unfinished row and step
    assert before_first == [min(batch_size, 12)] * len(completions[0].completion_ids)


def test_padding_rows_of_the_embedding_are_never_sampled(build_model, tokenizer) -> None:
    model = build_model(vocab_size=VOCAB_SIZE + 200, initializer_range=0.02)
    requests = build_requests(random_prompts([4]), num_samples=64)
    options = SamplingOptions(max_completion_length=8)
    sampled = collect(TransformersSampler(model, tokenizer), requests, options, batch_size=64)
    tokens = {token for completion in sampled for token in completion.completion_ids}
    assert len(tokens) > 100
    assert max(tokens) < VOCAB_SIZE


def test_a_completion_ends_where_the_context_is_full(build_model, tokenizer) -> None:
    """GPT-2's learned positions: a step further would index beyond them."""
    model = build_model("gpt2", n_positions=32).eval()
    # so many rows that the first one stays in the batch for a while after it has finished
    prompts = random_prompts([31, 20, *[5] * 18])
    options = SamplingOptions(max_completion_length=20, temperature=0.0)
    requests = build_requests(prompts)
    sampled = collect(TransformersSampler(model, tokenizer), requests, options, batch_size=20)
    for request, completion in zip(requests, sampled, strict=True):
        room = 32 - len(request.prompt_ids)
        assert len(completion.completion_ids) == min(20, room)
        assert completion.finish == "length"
        expected = generate(model, request.prompt_ids, min(20, room), eos=None)
        assert_equal_until_a_tie(model, request.prompt_ids, completion.completion_ids, expected)


def test_finished_rows_leave_the_batch(build_model, tokenizer) -> None:
    model = build_model(initializer_range=0.05)
    num_rows: list[int] = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: num_rows.append(args[0].shape[0])
    )
    options = SamplingOptions(
        max_completion_length=50, eos_token_ids=tuple(range(1, VOCAB_SIZE, 10))
    )
    requests = build_requests(random_prompts([4] * 16))
    sampled = collect(TransformersSampler(model, tokenizer), requests, options, batch_size=16)
    lengths = [len(completion.completion_ids) for completion in sampled]
    assert num_rows[0] == 16
    for step, rows in enumerate(num_rows[1:], start=1):
        live = sum(length > step for length in lengths)
        assert live <= rows <= live + 2
    assert num_rows[-1] <= 2


def test_completions_are_yielded_as_they_finish(build_model, tokenizer) -> None:
    model = build_model(initializer_range=0.05)
    num_steps = 0

    def count(module, args, output) -> None:
        nonlocal num_steps
        num_steps += 1

    model.model.embed_tokens.register_forward_hook(count)
    options = SamplingOptions(
        max_completion_length=50, eos_token_ids=tuple(range(1, VOCAB_SIZE, 10))
    )
    requests = build_requests(random_prompts([4] * 12))
    for _, completion in TransformersSampler(model, tokenizer).sample(requests, options, 12):
        assert num_steps == len(completion.completion_ids)


def test_no_requests_give_no_completions(build_model, tokenizer) -> None:
    assert list(TransformersSampler(build_model(), tokenizer).sample([], GREEDY, 4)) == []


def test_an_empty_prompt_and_one_that_fills_the_context_are_named(build_model, tokenizer) -> None:
    sampler = TransformersSampler(build_model(max_position_embeddings=16), tokenizer)
    with pytest.raises(ValueError, match="request 1 has an empty prompt"):
        sampler.sample([SampleRequest((4,), 0), SampleRequest((), 1)], GREEDY, 2)
    with pytest.raises(ValueError, match=r"request 0 has 16 tokens.*context of 16"):
        sampler.sample([SampleRequest((4,) * 16, 0)], GREEDY, 2)
    with pytest.raises(ValueError, match="batch_size"):
        sampler.sample([SampleRequest((4,), 0)], GREEDY, 0)


def test_an_encoder_decoder_model_is_an_error_that_names_it(tokenizer) -> None:
    config = T5Config(vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    sampler = TransformersSampler(T5ForConditionalGeneration(config), tokenizer)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        sampler.sample(build_requests([(5, 6)]), GREEDY, 1)


def test_a_prompt_learning_adapter_is_an_error(build_model, tokenizer) -> None:
    from peft import PromptTuningConfig

    model = get_peft_model(
        build_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="virtual tokens"):
        TransformersSampler(model, tokenizer).sample(build_requests([(5, 6)]), GREEDY, 1)


def test_nan_logits_are_an_error_and_never_a_token(build_model, tokenizer) -> None:
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("nan")
    with pytest.raises(RuntimeError, match="NaN at token 0 of the completion of request 0"):
        list(TransformersSampler(model, tokenizer).sample(build_requests([(5, 6)]), GREEDY, 1))


def test_the_batch_size_follows_the_length_and_stays_within_its_bounds(
    build_model, tokenizer
) -> None:
    sampler = TransformersSampler(build_model(), tokenizer)
    assert sampler.suggest_batch_size(10, 10) == 64
    huge = sampler.suggest_batch_size(10**7, 10**7)
    assert 1 <= huge < 64
    assert sampler.suggest_batch_size(10**12, 10) == 1


def test_on_a_cpu_keys_and_values_take_no_more_than_small_weights_or_256_mib(
    build_model, tokenizer
) -> None:
    sampler = TransformersSampler(build_model(), tokenizer)
    config = build_model().config
    head_dim = config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
    length = 256 * 2**20 // (a_token * 10)  # ten rows of it
    assert sampler.suggest_batch_size(length - 10, 10) == 10


def test_a_getter_and_an_accelerator_give_the_same_completions(build_model, tokenizer) -> None:
    accelerator = Accelerator(cpu=True)
    model = build_model()
    requests = build_requests(random_prompts([3, 6]), num_samples=2)
    options = SamplingOptions(max_completion_length=6, eos_token_ids=(EOS, END))
    expected = collect(TransformersSampler(model, tokenizer), requests, options, 4)
    wrapped = accelerator.prepare(model)
    sampler = TransformersSampler(lambda: wrapped, tokenizer, accelerator=accelerator)
    assert collect(sampler, requests, options, 4) == expected
