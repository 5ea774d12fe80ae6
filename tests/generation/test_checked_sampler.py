"""When an engine is checked, on what, and that nothing passes before."""

import json
from contextlib import nullcontext
from dataclasses import dataclass

import pytest

from trl_selfplay.generation.checked_sampler import CheckedSampler, EngineChangedError
from trl_selfplay.generation.completion_scores import score_completions
from trl_selfplay.generation.engine import EngineWeights
from trl_selfplay.generation.engine_agreement import EngineMismatchError
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

REQUESTS = [SampleRequest((3 + i % 5, 9), i) for i in range(40)]
OPTIONS = SamplingOptions(50, eos_token_ids=(1,))


class Engine:
    """An engine in this process that keeps what it is asked."""

    def __init__(self, model, tokenizer) -> None:
        self._sampler = TransformersSampler(model, tokenizer)
        self.asked, self.released = [], 0
        self.engine_record = {"engine": "here", "version": "1"}

    def suggest_batch_size(self, longest_prompt, max_completion_length) -> int:
        return 8

    def sample(self, requests, options, batch_size, on_tokens=None):
        self.asked.append((requests, options, batch_size))
        return self._sampler.sample(requests, options, batch_size, on_tokens)

    def release(self) -> None:
        self.released += 1


@dataclass
class Weights:
    """Weights whose version the test sets."""

    version: str = "first"
    previous_context: object = None
    forgotten: int = 0

    def __call__(self):
        return EngineWeights("model", None, 0, self.version)

    def forget(self) -> None:
        self.forgotten += 1

    def previous(self):
        return self.previous_context


@pytest.fixture
def parts(tiny_model, word_tokenizer, tmp_path):
    model = tiny_model(word_tokenizer)
    engine, weights = Engine(model, word_tokenizer), Weights()

    def score(completions, options):
        return score_completions(
            model, None, describe_model(model), completions, options, range(len(word_tokenizer))
        )

    def build(score=score, **kwargs):
        path = tmp_path / "engine.json"
        return CheckedSampler(engine, weights, score, 1e-3, path, **kwargs)

    return build, engine, weights


def test_each_version_and_each_start_is_checked_once_on_short_completions(parts) -> None:
    build, engine, weights = parts
    sampler = build()
    for _ in range(2):
        assert len(list(sampler.sample(REQUESTS, OPTIONS, 8))) == len(REQUESTS)
    probe, *samples = engine.asked
    assert (len(probe[0]), probe[1].max_completion_length, probe[2]) == (16, 32, 8)
    assert len({request.prompt_ids for request in probe[0]}) == 5
    assert [asked[:2] for asked in samples] == [(REQUESTS, OPTIONS)] * 2
    weights.version = "second"
    list(sampler.sample(REQUESTS[:3], OPTIONS, 8))
    assert len(engine.asked) == 5
    sampler.release()
    assert (engine.released, weights.forgotten) == (1, 1)
    list(sampler.sample(REQUESTS[:3], OPTIONS, 8))
    assert len(engine.asked) == 7


def test_an_iterator_is_checked_on_what_it_gives_at_first(parts) -> None:
    build, engine, _ = parts
    done, lengths = [], []

    def follow():
        yield from REQUESTS[:3]
        yield None
        while not done:
            yield None
        yield REQUESTS[3]

    told = []
    for index, completion in build().sample(follow(), OPTIONS, 8, told.append):
        done.append(index)
        lengths.append(len(completion.completion_ids))
    assert sorted(done) == [0, 1, 2, 3]
    assert sum(told) == sum(lengths)  # without what is sampled to compare the weights
    assert list(engine.asked[0][0]) == REQUESTS[:3]


def test_nothing_passes_and_the_engine_ends_if_it_has_other_weights(parts) -> None:
    build, engine, _ = parts
    sampler = build(score=lambda completions, options: [0.0] * len(completions))
    sampling = sampler.sample(REQUESTS, OPTIONS, 8)
    with pytest.raises(EngineMismatchError, match="another policy"):
        next(sampling)
    assert engine.released == 1


def test_the_weights_before_are_in_place_while_they_are_scored(parts) -> None:
    build, _, weights = parts
    scores = []

    def score(completions, options):
        scores.append(len(completions))
        return [-1.0] * len(completions)

    weights.previous_context = nullcontext()
    sampler = build(score=score)
    sampler._limit = 100.0
    list(sampler.sample(REQUESTS, OPTIONS, 8))
    assert scores == [16, 16]
    assert sampler.engine_record["agreement"]["nearer_to"] == "not told"  # both are the same


def test_another_engine_is_refused_before_it_samples(parts, tmp_path) -> None:
    build, engine, _ = parts
    list(build().sample(REQUESTS[:2], OPTIONS, 8))
    assert json.loads((tmp_path / "engine.json").read_text()) == engine.engine_record
    engine.engine_record = {"engine": "here", "version": "2"}
    with pytest.raises(EngineChangedError, match="allow_engine_change=True"):
        next(build().sample(REQUESTS[:2], OPTIONS, 8))
    list(build(allow_change=True).sample(REQUESTS[:2], OPTIONS, 8))
    list(build().sample(REQUESTS[:2], OPTIONS, 8))  # the run's engine from now on


def test_no_requests_start_no_engine(parts) -> None:
    build, engine, _ = parts
    assert list(build().sample([], OPTIONS, 8)) == []
    assert [asked[0] for asked in engine.asked] in ([], [[]])
