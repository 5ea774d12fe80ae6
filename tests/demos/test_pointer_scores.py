"""Scores of the pointer demo against the model's own logits and against other code of the package."""

import math

import pytest
import torch

from trl_selfplay import QuietSTaRModel
from trl_selfplay.demos.pointer_scores import encode_lines, score_lines, think_about
from trl_selfplay.demos.pointers import build_lines, build_tokenizer
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, attach_thought_module
from trl_selfplay.trainers.quiet_star.observation import measure_gains
from trl_selfplay.trainers.quiet_star.storage import ThoughtSettings

SETTINGS = ThoughtSettings(thought_length=3, thought_temperature=0.9, barred=(5,))


@pytest.fixture
def thinker(tiny_model):
    """A tiny model of the demo's vocabulary whose mixing head has left zero."""
    model = tiny_model(build_tokenizer(), initializer_range=0.2).eval()
    attach_thought_module(model, None, scale=100.0, seed=0)
    with torch.no_grad():
        getattr(model, ATTRIBUTE).head[-1].weight.normal_(generator=torch.manual_seed(1))
    return model


@pytest.fixture
def encoded():
    return encode_lines(build_tokenizer(), build_lines(6, seed=4))


def test_what_a_line_predicts_is_its_completion(encoded) -> None:
    """Columns by hand: 6 pairs, 5 signs between them, "?" and the hops are 19 tokens."""
    assert encoded.ids.shape == (6, 19 + 12)
    assert encoded.columns[0].tolist() == list(range(18, 30))
    assert encoded.is_real.all()
    assert encoded.is_answer[3].nonzero().flatten().tolist() == [2, 6, 10]
    answers = encoded.ids.gather(1, encoded.columns + 1)[encoded.is_answer]
    assert set(encoded.candidates.tolist()) == set(answers.tolist())


def test_lines_of_different_lengths_are_padded(encoded) -> None:
    lines = build_lines(2, seed=4)
    lines[1] = {**lines[1], "completion": " a = b ."}
    short = encode_lines(build_tokenizer(), lines)
    assert short.is_real.sum(1).tolist() == [12, 4]
    assert short.mask.sum(1).tolist() == [31, 23]
    assert short.columns[1].tolist() == [18, 19, 20, 21] + [21] * 8
    assert (short.is_answer & short.is_real).sum(1).tolist() == [3, 1]


@torch.no_grad()
def test_without_thoughts_the_scores_are_the_models(thinker, encoded) -> None:
    scores = score_lines(thinker, encoded, None, rows=4)
    log_probs = thinker(encoded.ids).logits.log_softmax(-1)
    for b in range(6):
        for u, column in enumerate(encoded.columns[b].tolist()):
            target = encoded.ids[b, column + 1].item()
            expected = -log_probs[b, column, target].item()
            assert scores.nll[b, u].item() == pytest.approx(expected, abs=1e-5)
            best = max(encoded.candidates.tolist(), key=lambda i: log_probs[b, column, i].item())
            assert scores.is_right[b, u].item() == (best == target)


def test_a_thoughts_scores_are_those_of_the_gains_along_the_text(thinker, encoded) -> None:
    """The first line, whose thoughts have the same noise there."""
    thoughts = think_about(thinker, encoded, SETTINGS, 1, rows=4)
    scores = score_lines(thinker, encoded, thoughts, rows=4)
    gains = measure_gains(QuietSTaRModel(thinker, SETTINGS), encoded.ids[0].tolist(), 1)
    for u, column in enumerate(encoded.columns[0].tolist()):
        expected = -(gains.base[column + 1] + gains.gains[column + 1])
        assert scores.nll[0, u].item() == pytest.approx(expected, abs=1e-4)
    assert thoughts.shape == (6, 12, 3)
    assert not (thoughts == 5).any()


def test_probabilities_of_several_thoughts_are_averaged(thinker, encoded) -> None:
    thoughts = think_about(thinker, encoded, SETTINGS, 2)
    both = score_lines(thinker, encoded, thoughts).nll
    alone = [score_lines(thinker, encoded, thoughts[:, s::2]).nll for s in range(2)]
    expected = -(torch.logsumexp(-torch.stack(alone), 0) - math.log(2))
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
