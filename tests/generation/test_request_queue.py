"""Requests that come while others decode, against the same ones given all at once."""

from collections import deque
from itertools import chain, repeat

import pytest

from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.request_queue import RequestQueue
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

# One token in seven ends a completion, so that they end at different times.
OPTIONS = SamplingOptions(max_completion_length=24, eos_token_ids=tuple(range(3, 40)))
PROMPTS = [tuple(range(40 + i, 43 + i + 7 * (i % 3))) for i in range(5)]
NUM_TURNS = 3


def request_of(prompt, turn: int) -> SampleRequest:
    return SampleRequest(tuple(prompt), stream_key(0, 0, "train", str(PROMPTS[0]), turn))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_request_can_follow_from_an_earlier_completion(
    build_model, tokenizer, family, batch_size
) -> None:
    """What a prompt gets doesn't depend on when it is given."""
    sampler = TransformersSampler(build_model(family).eval(), tokenizer)
    coming = deque((request_of(prompt, 0), 0) for prompt in PROMPTS)
    given: list[tuple[SampleRequest, int]] = []
    sampled = {}
    overtook = False

    def requests():
        while len(sampled) < NUM_TURNS * len(PROMPTS):
            if not coming:
                yield None  # until one of those in progress has ended
                continue
            assert len(given) - len(sampled) < batch_size  # no sooner than there is a place
            given.append(coming.popleft())
            yield given[-1][0]

    for index, completion in sampler.sample(requests(), OPTIONS, batch_size):
        overtook |= index > min(set(range(len(given))) - set(sampled))
        sampled[index] = completion
        request, turn = given[index]
        if turn + 1 < NUM_TURNS:
            heard = (*request.prompt_ids, *completion.completion_ids, 50, 51)
            coming.append((request_of(heard, turn + 1), turn + 1))

    assert sorted(sampled) == list(range(NUM_TURNS * len(PROMPTS)))
    assert overtook == (batch_size > 1)
    at_once = sampler.sample([request for request, _ in given], OPTIONS, batch_size)
    assert dict(at_once) == sampled


def test_requests_of_an_iterator_are_asked_for_when_sampling_begins(build_model, tokenizer) -> None:
    sampler = TransformersSampler(build_model().eval(), tokenizer)
    asked = []

    def requests():
        for prompt in PROMPTS:
            asked.append(prompt)
            yield request_of(prompt, 0)

    completions = sampler.sample(requests(), OPTIONS, batch_size=2)
    assert asked == []
    next(completions)
    assert len(asked) == 2
    completions.close()
    assert len(asked) == 2
    assert list(sampler.sample(iter(()), OPTIONS, batch_size=2)) == []


def test_an_iterator_that_waits_for_nothing_is_an_error(build_model, tokenizer) -> None:
    sampler = TransformersSampler(build_model().eval(), tokenizer)
    asks = chain([request_of(PROMPTS[0], 0)], repeat(None))
    completions = sampler.sample(asks, OPTIONS, 2)
    next(completions)
    with pytest.raises(RuntimeError, match="gave None while no completion was in progress"):
        next(completions)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_request_that_comes_between_two_steps_begins_at_the_next(
    build_model, tokenizer, family
) -> None:
    """A tool's result comes when it is there, and not when another completion ends."""
    sampler = TransformersSampler(build_model(family).eval(), tokenizer)
    long, late = SampleRequest(PROMPTS[0], 1), SampleRequest(PROMPTS[1], 2, 3)
    steps: list[int] = []

    def requests():
        yield long
        while len(steps) < 5:
            yield None
        yield late

    found = list(sampler.sample(requests(), SamplingOptions(24), 4, steps.append))
    assert [index for index, _ in found] == [1, 0]
    assert steps == [1] * 5 + [2] * 3 + [1] * 16
    assert dict(found) == dict(sampler.sample([long, late], SamplingOptions(24), 4))


def test_one_late_request_waits_until_a_join_pays_off(build_model, tokenizer) -> None:
    """It would copy the keys of many rows for one."""
    sampler = TransformersSampler(build_model().eval(), tokenizer)
    first = [SampleRequest(PROMPTS[0], i, 12 if i < 6 else 24) for i in range(12)]
    steps: list[int] = []

    def requests():
        yield from first
        while len(steps) < 5:
            yield None
        yield SampleRequest(PROMPTS[1], 99, 3)
        while len(steps) < 20:
            yield None

    found = list(sampler.sample(requests(), SamplingOptions(24), 16, steps.append))
    assert steps == [12] * 12 + [7] * 3 + [6] * 9
    assert [index for index, _ in found][6] == 12


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_what_the_first_prompts_begin_with_is_computed_once(
    build_model, tokenizer, batch_size
) -> None:
    """As the descriptions of tools; later prompts may begin otherwise, or end there."""
    model = build_model().eval()
    sampler = TransformersSampler(model, tokenizer)
    common = tuple(range(40, 70))
    first = [SampleRequest((*common, 80 + i, 90), i, 6) for i in range(4)]
    later = [
        SampleRequest((*common, 80, 90, 91, 92), 10, 9),
        SampleRequest((50, 51), 11, 9),
        SampleRequest(common, 12, 9),
        SampleRequest((*common, 99), 13, 9),
    ]
    done: list[int] = []

    def requests():
        yield from first
        while len(done) < 2:
            yield None
        yield from later

    computed: list[int] = []

    def count(module, ids) -> None:
        computed.append(ids[0].numel() if ids[0].shape[1] > 1 else 0)

    model.get_input_embeddings().register_forward_pre_hook(count)
    found = {}
    for index, completion in sampler.sample(requests(), OPTIONS, batch_size):
        done.append(index)
        found[index] = completion
    num_computed = sum(computed)
    assert found == dict(sampler.sample([*first, *later], OPTIONS, 1))
    whole = sum(len(request.prompt_ids) for request in [*first, *later])
    assert (num_computed < whole - 3 * len(common)) == (batch_size > 1)


def test_a_bad_prompt_of_an_iterator_is_named_when_it_comes(build_model, tokenizer) -> None:
    sampler = TransformersSampler(build_model().eval(), tokenizer)
    completions = sampler.sample(iter([request_of(PROMPTS[0], 0), request_of((), 0)]), OPTIONS, 1)
    next(completions)
    with pytest.raises(ValueError, match="request 1 has an empty prompt"):
        next(completions)


def test_each_waiting_request_is_looked_at_once() -> None:
    """Of thousands that wait, a few begin at a time."""
    queue = RequestQueue([SampleRequest((5,) * (1 + i % 7), i) for i in range(98)], None)
    looked_at, taken = [], []

    def matches(request):
        looked_at.append(request)
        return True

    while queue.has_more(4, is_decoding=True):
        taken += queue.take(4, matches)
    assert len(looked_at) == 98
    assert taken == sorted(range(98), key=lambda i: (-(i % 7), i))


def test_requests_that_do_not_match_wait_in_their_order() -> None:
    queue = RequestQueue([SampleRequest((5,) * n, n) for n in (2, 5, 3, 4, 1)], None)
    assert queue.take(2, lambda request: len(request.prompt_ids) in (4, 2)) == [3, 0]
    assert queue.take(9, lambda request: True) == [1, 2, 4]
    assert not queue
