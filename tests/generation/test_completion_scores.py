"""Scores of given completions are the log-probs that the sampler itself reports."""

import math

import pytest
import torch

from trl_selfplay.generation.completion_scores import score_completions
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"temperature": 0.5, "top_p": 0.7},
    "min_p": {"min_p": 0.5},
    "penalty": {"repetition_penalty": 1.7, "temperature": 0.7, "top_k": 6},
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.3, "top_k": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_scores_are_the_log_probs_of_the_sampler(name, tiny_model, word_tokenizer) -> None:
    model = tiny_model(word_tokenizer, initializer_range=0.3)
    options = SamplingOptions(12, eos_token_ids=(1,), return_logprobs=True, **OPTIONS[name])
    prompts = [(5, 6, 7), (9,), (3, 3, 4, 11, 12)]
    requests = [SampleRequest(p, key) for key, p in enumerate(prompts * 3)]
    sampled = dict(TransformersSampler(model, word_tokenizer).sample(requests, options, 9))
    completions = [(r.prompt_ids, sampled[i].completion_ids) for i, r in enumerate(requests)]
    scores = score_completions(
        model, None, describe_model(model), completions, options, range(len(word_tokenizer))
    )
    expected = [sampled[i].logprob for i in range(len(requests))]
    assert scores == pytest.approx(expected, abs=1e-4)


def test_min_p_leaves_out_tokens_before_top_p_counts_mass(tiny_model, word_tokenizer) -> None:
    """vLLM's order, computed by hand: what min_p drops no longer fills top_p's mass."""
    model = tiny_model(word_tokenizer, initializer_range=0.3)
    with torch.no_grad():
        probs = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    ordered = sorted(probs.tolist(), reverse=True)
    min_p = (ordered[3] + ordered[4]) / 2 / ordered[0]  # the first four are left
    left = sum(ordered[:4])
    top_p = (sum(ordered[:3]) / left + sum(ordered[:2]) / left) / 2  # of these, three
    token = int(probs.argmax())
    options = SamplingOptions(1, min_p=min_p, top_p=top_p)
    [score] = score_completions(
        model, None, describe_model(model), [((5, 6), (token,))], options, range(21)
    )
    assert score == pytest.approx(math.log(ordered[0] / sum(ordered[:3])), abs=1e-5)


def test_a_token_outside_the_support_counts_as_its_last(tiny_model, word_tokenizer) -> None:
    model = tiny_model(word_tokenizer, initializer_range=0.3)
    with torch.no_grad():
        probs = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    second = int(probs.argsort()[-2])
    options = SamplingOptions(1, top_k=1)
    [score] = score_completions(
        model, None, describe_model(model), [((5, 6), (second,))], options, range(21)
    )
    pair = float(probs.max() + probs[second])
    assert score == pytest.approx(math.log(float(probs[second]) / pair), abs=1e-5)


def test_ids_that_no_token_has_are_left_out(tiny_model, word_tokenizer) -> None:
    """Embeddings are often padded to a round number of rows."""
    model = tiny_model(word_tokenizer, vocab_size=32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1, :21]
    [score] = score_completions(
        model, None, describe_model(model), [((5, 6), (7,))], SamplingOptions(1), range(21)
    )
    assert score == pytest.approx(float(logits.log_softmax(-1)[7]), abs=1e-5)
