import pytest
import torch
from causal_classes import build_tiny
from scipy.stats import chisquare

from trl_selfplay.trainers.quiet_star.backbone import describe_predictions, token_log_probs
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, ThoughtModule, barred_token_ids
from trl_selfplay.trainers.quiet_star.sampling import (
    can_think,
    choose_columns,
    num_thinking,
    sample_thoughts,
    thought_keys,
)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_thoughts_follow_the_softmax_of_their_logits(temperature, family_model, text) -> None:
    """QS-11: 20 000 draws after one column, with two barred tokens."""
    model, count, barred = family_model(), 20_000, [3, 9]
    start = getattr(model, ATTRIBUTE).start_and_end()[0].detach()
    ids = text.ids[:1, :5]
    drawn = sample_thoughts(
        model, start, ids, torch.ones_like(ids), torch.full((1, count), 4), 1, range(count),
        temperature=temperature, barred=barred,
    )  # fmt: skip
    with torch.no_grad():
        embeddings = torch.cat([model.get_input_embeddings()(ids), start[None, None]], 1)
        logits = model(inputs_embeds=embeddings).logits[0, -1] / temperature
    logits[barred] = float("-inf")
    expected = logits.double().softmax(-1) * count
    observed = torch.bincount(drawn.tokens.flatten(), minlength=23)
    assert observed[barred].tolist() == [0, 0]
    rare = expected < 5
    f_observed = [*observed[~rare].tolist(), int(observed[rare].sum())]
    f_expected = [*expected[~rare].tolist(), float(expected[rare].sum())]
    if f_expected[-1] < 5:
        f_observed, f_expected = f_observed[:-1], f_expected[:-1]
        f_expected = [x * sum(f_observed) / sum(f_expected) for x in f_expected]
    assert chisquare(f_observed, f_expected).pvalue > 1e-3


@pytest.mark.parametrize("count", [1, 3])
def test_a_model_that_scales_its_input_in_place_thinks_and_leaves_the_vectors_alone(count) -> None:
    """CTRL's greedy thought of one token, against the whole sequence."""
    model = build_tiny("ctrl")
    start = torch.randn(32, generator=torch.Generator().manual_seed(1))
    before, ids = start.clone(), torch.tensor([[5, 9, 11, 4]])
    drawn = sample_thoughts(
        model, start, ids, torch.ones_like(ids), torch.full((1, count), 3), 1, range(count),
        temperature=0.0,
    )  # fmt: skip
    assert torch.equal(start, before)
    with torch.no_grad():
        embeddings = torch.cat([model.get_input_embeddings()(ids), start[None, None]], 1)
        expected = model(inputs_embeds=embeddings).logits[0, -1].argmax()
    assert drawn.tokens.flatten().tolist() == [expected] * count


def test_columns_with_enough_labelled_text_after_them_think() -> None:
    """Section by section: plain text, a prompt without labels, padding on both sides."""
    labels = torch.tensor(
        [
            [5, 5, 5, 5, 5, 5],
            [-100, -100, -100, 5, 5, 5],
            [5, 5, 5, 5, -100, -100],
            [-100, -100, 5, 5, 5, 5],
        ]
    )
    mask = torch.tensor([[1] * 6, [1] * 6, [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    allowed = can_think(labels, mask, 2)
    assert allowed.int().tolist() == [
        [1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
    ]
    assert num_thinking(allowed, 1.0).tolist() == [4, 2, 2, 2]
    assert num_thinking(allowed, 0.5).tolist() == [2, 1, 1, 1]
    assert num_thinking(allowed, 0.3).tolist() == [2, 1, 1, 1]


def test_a_fraction_of_the_columns_is_drawn_anew_each_step_and_uniformly() -> None:
    mask = torch.ones((1, 11), dtype=torch.long)
    allowed = can_think(mask, mask, 1)
    counts = torch.zeros(11)
    for step in range(600):
        thinking = choose_columns(allowed, mask, 0.3, 0, step, "train", [0])
        columns = thinking.columns[0].tolist()
        assert columns == sorted(set(columns))
        assert len(columns) == 3
        counts[columns] += 1
    assert counts[10] == 0
    assert chisquare(counts[:10].tolist()).pvalue > 1e-3


def test_noise_and_columns_depend_on_row_and_position_and_on_nothing_else() -> None:
    """QS-16 and QS-18: the same row in another batch and behind padding."""
    ids = torch.ones((3, 8), dtype=torch.long)
    mask = ids.clone()
    allowed = can_think(ids, mask, 1)
    together = choose_columns(allowed, mask, 0.5, 7, 4, "train", [5, 6, 7])
    keys = thought_keys(together, 2, 7, 4, "train", [5, 6, 7])
    assert len(set(keys)) == len(keys) == 3 * 4 * 2
    padded = torch.nn.functional.pad(mask[1:2], (3, 0))
    alone = choose_columns(can_think(padded, padded, 1), padded, 0.5, 7, 4, "train", [6])
    assert torch.equal(alone.columns[0] - 3, together.columns[1])
    assert torch.equal(alone.positions[0], together.positions[1])
    assert thought_keys(alone, 2, 7, 4, "train", [6]) == keys[8:16]
    for other in ((8, 4, "train"), (7, 5, "train"), (7, 4, "eval")):
        assert set(thought_keys(together, 2, *other, [5, 6, 7])).isdisjoint(keys)


def test_a_row_without_room_for_a_thought_is_filled_up_and_not_real() -> None:
    labels = torch.tensor([[5, 5, 5, 5], [-100, 5, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    thinking = choose_columns(can_think(labels, mask, 2), mask, 1.0, 0, 0, "train", [0, 1])
    assert thinking.is_real.tolist() == [[True, True], [False, False]]
    nothing = choose_columns(can_think(labels, mask, 4), mask, 1.0, 0, 0, "train", [0, 1])
    assert nothing.is_real.tolist() == [[False], [False]]


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_log_probs_do_not_depend_on_how_many_logits_exist_at_once(rows, family_model) -> None:
    """QS-19: values, entropies, hits and gradients."""
    model = family_model("gemma2")  # with a soft cap on the logits
    states = torch.randn(10, 32, requires_grad=True)
    targets = torch.arange(10)
    ours = token_log_probs(model, states, targets, temperature=0.7, barred=[12], rows=rows)
    logits = torch.tanh(model.get_output_embeddings()(states) / 2.0) * 2.0 / 0.7
    logits = logits.index_fill(1, torch.tensor([12]), float("-inf"))
    dense = logits.log_softmax(-1)
    torch.testing.assert_close(ours, dense[torch.arange(10), targets])
    entropies, hits = describe_predictions(model, states, targets)
    plain = (torch.tanh(model.get_output_embeddings()(states) / 2.0) * 2.0).log_softmax(-1)
    assert torch.equal(hits, plain.argmax(-1) == targets)
    torch.testing.assert_close(entropies, -(plain.exp() * plain).sum(-1))
    weight = model.get_output_embeddings().weight
    mine = torch.autograd.grad(ours.sum(), [states, weight], retain_graph=True)
    other = torch.autograd.grad(dense[torch.arange(10), targets].sum(), [states, weight])
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_vectors_begin_as_the_embedding_of_three_dashes(tiny_model, byte_tokenizer) -> None:
    from trl_selfplay.trainers.quiet_star.mixing import attach_thought_module

    model = tiny_model(byte_tokenizer)
    attach_thought_module(model, byte_tokenizer, scale=100.0, seed=0)
    dash = model.get_input_embeddings().weight[byte_tokenizer("-")["input_ids"][0]]
    both = model.quiet_star.start_and_end()
    torch.testing.assert_close(both, torch.stack([dash, dash]))
    torch.testing.assert_close(model.quiet_star.vectors * 100.0, both)
    module, draw = model.quiet_star, torch.rand(1)
    attach_thought_module(model, byte_tokenizer, scale=5.0, seed=1)  # never initialised again
    assert model.quiet_star is module
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    attach_thought_module(tiny_model(byte_tokenizer), byte_tokenizer, scale=5.0, seed=1)
    assert torch.equal(torch.rand(1), first)
    del draw


def test_a_tokenizers_own_thought_tokens_are_barred(word_tokenizer) -> None:
    assert barred_token_ids(word_tokenizer) == []
    word_tokenizer.add_tokens(["<|startthought|>", "<|endthought|>"])
    assert barred_token_ids(word_tokenizer) == [21, 22]
    assert barred_token_ids(None) == []


def test_the_head_has_the_papers_shape_and_no_bound() -> None:
    d = 16
    module = ThoughtModule(torch.zeros(d), 100.0)
    assert sum(p.numel() for p in module.head.parameters()) == 3 * d * d + 3 * d
    states = torch.randn(2, 3, d, dtype=torch.bfloat16)
    assert module(states, states).dtype == torch.float32
    assert module(states, states).abs().max() == 0
    torch.nn.init.ones_(module.head[-1].weight)
    assert module(states * 100, states).abs().max() > 1
