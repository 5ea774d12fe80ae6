"""Each filter against transformers' own class, and all together in generate's order."""

import itertools

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.generation.token_filters import (
    apply_repetition_penalty,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
)


def random_logits(rows=6, vocab_size=1000, scale=3.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)) * scale


def random_ids(rows=6, vocab_size=1000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab_size, (rows, 40), generator=generator)
    seen = torch.zeros(rows, vocab_size, dtype=torch.bool).scatter_(1, ids, True)
    return ids, seen


@pytest.mark.parametrize("top_k", [1, 5, 999, 1000, 5000])
def test_top_k_equals_transformers(top_k) -> None:
    expected = TopKLogitsWarper(top_k)(None, random_logits())
    assert torch.equal(keep_top_k(random_logits(), top_k), expected)


# The flat case needs more tokens than the first guess, so that the guess must grow.
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.95, 0.999])
def test_top_p_equals_transformers(top_p, scale) -> None:
    expected = TopPLogitsWarper(top_p)(None, random_logits(scale=scale))
    kept = keep_top_p(random_logits(scale=scale), top_p)
    # A token at the boundary may fall to either side: transformers sums from the least likely.
    differing = torch.isinf(kept) != torch.isinf(expected)
    assert int(differing.sum()) <= (1 if scale == 0.01 else 0)
    assert torch.equal(kept[~differing], expected[~differing])


def test_top_p_keeps_one_token_where_a_single_one_has_all_the_mass() -> None:
    kept = keep_top_p(torch.tensor([[50.0, 0.0, 1.0]]), 0.1)
    assert torch.isinf(kept).tolist() == [[False, True, True]]


def test_top_p_keeps_tokens_until_the_mass_is_reached() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.45, 0.25, 0.2]]))
    assert torch.isinf(keep_top_p(logits.clone(), 0.6)).tolist() == [[True, False, False, True]]
    assert torch.isinf(keep_top_p(logits.clone(), 0.8)).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3, 1.0])
def test_min_p_equals_transformers(min_p) -> None:
    expected = MinPLogitsWarper(min_p)(None, random_logits())
    assert torch.equal(keep_min_p(random_logits(), min_p), expected)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_the_repetition_penalty_equals_transformers(penalty) -> None:
    ids, seen = random_ids()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, random_logits())
    assert torch.equal(apply_repetition_penalty(random_logits(), seen, penalty), expected)


CASES = list(itertools.product([1.0, 1.4], [1.0, 0.6], [0, 30], [1.0, 0.9], [None, 0.05]))


@pytest.mark.parametrize(("penalty", "temperature", "top_k", "top_p", "min_p"), CASES)
def test_the_filters_together_equal_transformers_in_its_order(
    penalty, temperature, top_k, top_p, min_p
) -> None:
    ids, seen = random_ids()
    processors = LogitsProcessorList()
    if penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        processors.append(MinPLogitsWarper(min_p))
    options = SamplingOptions(
        max_completion_length=1,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    filtered = filter_logits(random_logits(), options, seen)
    assert torch.equal(filtered, processors(ids, random_logits()))


def test_greedy_decoding_uses_the_penalty_and_no_filter() -> None:
    _, seen = random_ids()
    options = SamplingOptions(
        max_completion_length=1, temperature=0.0, top_k=1, top_p=0.1, repetition_penalty=1.5
    )
    filtered = filter_logits(random_logits(), options, seen)
    assert torch.equal(filtered, apply_repetition_penalty(random_logits(), seen, 1.5))
