"""Text generated with thoughts: its exact distribution, and the keywords of `generate`."""

import pytest
import torch
from naive_thoughts import logits_of, states_of
from scipy.stats import chisquare
from transformers import GenerationConfig

from trl_selfplay import QuietSTaRModel
from trl_selfplay.generation.token_filters import keep_min_p
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE
from trl_selfplay.trainers.quiet_star.storage import ThoughtSettings

BARRED = 7


@torch.no_grad()
def exact_marginal(model, row, temperature, thought_temperature) -> torch.Tensor:
    """Return the next token's probabilities, summed over all thoughts of one token (V,)."""
    embed, extra = model.get_input_embeddings(), getattr(model, ATTRIBUTE)
    start, end = extra.start_and_end()
    opened = torch.cat([embed(row), start[None]])
    logits = logits_of(model, states_of(model, opened)[-1:])[0] / thought_temperature
    logits[BARRED] = -torch.inf
    before, marginal = states_of(model, embed(row))[-1], 0.0
    for thought, share in enumerate(logits.softmax(-1).tolist()):
        after = states_of(model, torch.cat([opened, embed.weight[thought][None], end[None]]))[-1]
        weight = extra.head(torch.cat([before, after]))
        mixed = logits_of(model, (1 - weight) * before + weight * after) / temperature
        mixed[BARRED] = -torch.inf
        marginal = marginal + share * mixed.softmax(-1)
    return marginal


@pytest.mark.parametrize("num_thoughts", [1, 2])
def test_samples_of_one_prompt_follow_the_exact_marginal(num_thoughts, family_model, text) -> None:
    """QS-11: independent over rows, thoughts included, and over prompts; barred tokens never."""
    model = QuietSTaRModel(family_model(), ThoughtSettings(1, 0.8, (BARRED,)))
    prompts, count = text.ids[:, :4], 3000
    rows = model.generate(
        prompts, max_new_tokens=1, do_sample=True, num_return_sequences=count,
        eos_token_id=[], num_thoughts=num_thoughts,
    )  # fmt: skip
    for b, prompt in enumerate(prompts):
        drawn = rows[b * count : (b + 1) * count]
        assert torch.equal(drawn[:, :4], prompt.expand(count, -1))
        observed = torch.bincount(drawn[:, 4], minlength=23)
        expected = exact_marginal(model.causal_lm, prompt, 1.0, 0.8).double() * count
        assert observed[BARRED] == 0
        rare = expected < 5
        found = [*observed[~rare].tolist(), int(observed[rare].sum())]
        due = [*expected[~rare].tolist(), float(expected[rare].sum())]
        if due[-1] < 5:
            found = [*found[:-2], sum(found[-2:])]
            due = [*due[:-2], sum(due[-2:])]
        due = [x * sum(found) / sum(due) for x in due]
        assert chisquare(found, due).pvalue > 1e-3
    repeated = model.generate(
        prompts[:1].expand(count, -1), max_new_tokens=1, do_sample=True, eos_token_id=[],
        num_thoughts=num_thoughts,
    )  # fmt: skip
    assert torch.equal(repeated, rows[:count])


def test_filters_are_those_of_transformers(family_model, text) -> None:
    """On a head that gives thoughts no weight, against probabilities computed here."""
    causal_lm = family_model(awake=False)
    model, ids = QuietSTaRModel(causal_lm, ThoughtSettings(1)), text.ids[:1, :6]
    draw = {"max_new_tokens": 1, "do_sample": True, "num_return_sequences": 2000}
    with torch.no_grad():
        logits = causal_lm(ids).logits[0, -1]
    top = model.generate(ids, top_k=2, **draw)[:, -1]
    assert set(top.tolist()) == set(logits.topk(2).indices.tolist())
    kept = keep_min_p(logits[None].clone(), 0.5).isfinite()[0].nonzero().flatten()
    assert set(model.generate(ids, min_p=0.5, **draw)[:, -1].tolist()) == set(kept.tolist())
    assert 1 < len(kept) < 23
    greedy = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.8}
    plain = causal_lm.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    assert torch.equal(model.generate(ids, **greedy), plain)
    assert not torch.equal(model.generate(ids, max_new_tokens=8), plain)


@pytest.mark.parametrize("padded", [False, True])
def test_without_weight_on_thoughts_greedy_text_is_that_of_transformers(
    padded, family_model, text
) -> None:
    """From the model's generation config alone: several EOS ids, the penalty, the length."""
    causal_lm = family_model(awake=False)
    ids, mask = text.ids, text.mask.clone()
    if padded:
        ids, mask[1, :5] = ids.clone(), 0
        ids[1, :5] = 0
    causal_lm.generation_config = GenerationConfig(
        # transformers counts padding as seen, so a penalty would differ.
        repetition_penalty=1.0 if padded else 1.7,
        eos_token_id=[3, 9, 14], pad_token_id=0, max_new_tokens=16,
    )  # fmt: skip
    theirs = causal_lm.generate(ids, attention_mask=mask)
    ours = QuietSTaRModel(causal_lm, ThoughtSettings(1)).generate(ids, mask)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] > ids.shape[1] + 2


def test_without_weight_on_thoughts_samples_follow_the_scores_of_transformers(
    family_model, text
) -> None:
    """All filters together, from a generation config and keywords, which win."""
    causal_lm = family_model(awake=False)
    ids, count = text.ids[:1, :6], 4000
    causal_lm.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=15, top_p=0.97, min_p=0.02, repetition_penalty=1.4,
        num_return_sequences=3, pad_token_id=0, max_new_tokens=1,
    )  # fmt: skip
    changed = {"temperature": 1.6, "num_return_sequences": count}
    torch.manual_seed(0)
    theirs = causal_lm.generate(
        ids, attention_mask=torch.ones_like(ids), **changed | {"num_return_sequences": 1},
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = theirs.scores[0][0].double().softmax(-1) * count
    model = QuietSTaRModel(causal_lm, ThoughtSettings(1))
    assert len(model.generate(ids)) == 3
    observed = torch.bincount(model.generate(ids, **changed)[:, -1], minlength=23)
    kept = expected > 0
    assert 4 < kept.sum() < 16
    assert observed[~kept].sum() == 0
    common = expected >= 5
    found = [*observed[common].tolist(), int(observed[~common].sum())]
    due = [*expected[common].tolist(), float(expected[~common].sum())]
    pairs = [(f, d) for f, d in zip(found, due, strict=True) if d]
    assert chisquare(*zip(*pairs, strict=True)).pvalue > 1e-3


def test_the_models_generation_config_counts_where_nothing_else_is_said(family_model, text) -> None:
    causal_lm = family_model()
    model, ids = QuietSTaRModel(causal_lm, ThoughtSettings(1)), text.ids[:, :4]
    greedy = model.generate(ids, eos_token_id=[])
    assert greedy.shape == (2, 24)
    causal_lm.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, max_new_tokens=5, top_k=3, eos_token_id=None
    )
    own = model.generate(ids)
    assert own.shape == (2, 9)
    assert torch.equal(
        own, model.generate(ids, do_sample=True, temperature=3.0, top_k=3, max_new_tokens=5)
    )
    given = GenerationConfig(max_length=7, top_k=1)
    short = model.generate(ids, generation_config=given, thought_temperature=0.0)
    greedy = model.generate(ids, do_sample=False, max_new_tokens=3, thought_temperature=0.0)
    assert torch.equal(short, greedy)
    assert model.generate(ids, generation_config=given, max_new_tokens=2).shape == (2, 6)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_beams": 4}, TypeError, "num_beams=4: thoughts are not kept per beam"),
        (
            {"generation_config": GenerationConfig(num_beams=4)},
            ValueError,
            "num_beams=4",
        ),
        ({"output_scores": True, "streamer": 1}, TypeError, "output_scores=True, streamer=1"),
        ({"num_return_sequences": 2}, ValueError, "Set do_sample=True"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences=0"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "set do_sample=False"),
        ({"do_sample": True, "min_p": 2.0}, ValueError, "min_p must be"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ({"max_length": 4}, ValueError, "max_length=4 leaves no room"),
        (
            {"generation_config": GenerationConfig(no_repeat_ngram_size=2)},
            ValueError,
            "no_repeat_ngram_size=2",
        ),
    ],
)
def test_what_generate_does_not_take_is_named(keywords, error, message, family_model, text) -> None:
    model = QuietSTaRModel(family_model(), ThoughtSettings(1))
    with pytest.raises(error, match=message):
        model.generate(text.ids[:, :4], **keywords)


def test_what_is_off_or_without_effect_is_taken(family_model, text, caplog) -> None:
    """Evaluation harnesses pass these."""
    model, ids = QuietSTaRModel(family_model(), ThoughtSettings(1)), text.ids[:, :4]
    plain = model.generate(ids)
    harness = {"do_sample": False, "temperature": 0.0, "num_beams": 1, "use_cache": True}
    assert torch.equal(model.generate(ids, **harness, streamer=None), plain)
    assert "no effect" not in caplog.text
    assert torch.equal(model.generate(ids, temperature=0.7), plain)
    assert "temperature=0.7 has no effect without do_sample=True" in caplog.text
