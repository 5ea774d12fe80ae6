"""Thoughts of all columns in one forward, against one thought at a time."""

import pytest
import torch
from naive_thoughts import dense_mask, logits_of, naive_scores, states_of
from tiny_families import FAMILIES

from trl_selfplay.generation.random_streams import gumbel_noise, token_words
from trl_selfplay.trainers.quiet_star.backbone import embed, last_states
from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE
from trl_selfplay.trainers.quiet_star.replaced_attention import thoughts_attend
from trl_selfplay.trainers.quiet_star.sampling import sample_thoughts
from trl_selfplay.trainers.quiet_star.unrolled import ThoughtBatch, think_and_talk

NUM_THOUGHTS, LENGTH, AHEAD = 2, 3, 3


def every_column(text, ahead=AHEAD, thoughts=NUM_THOUGHTS):
    """Anchors (B, G) of all columns with enough text after them, each `thoughts` times."""
    columns = torch.arange(text.ids.shape[1] - ahead).repeat_interleave(thoughts)
    return columns.expand(len(text.ids), -1).contiguous()


def random_batch(text, length=LENGTH, ahead=AHEAD, **changes) -> ThoughtBatch:
    anchors = every_column(text, ahead)
    tokens = torch.randint(2, 23, (*anchors.shape, length), generator=text.generator)
    real = torch.ones_like(anchors, dtype=torch.bool)
    return ThoughtBatch(anchors, tokens, real, ahead, **changes)


def keys_of(anchors) -> list[int]:
    return list(range(1000, 1000 + anchors.numel()))


def outputs_of(model, text, batch):
    return think_and_talk(model, text.ids, text.mask, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_scores_equal_those_of_ordinary_sequences(family, family_model, text) -> None:
    """QS-2 for every family: log p_talk, mixing weights, log π at 1e-4 in float32."""
    model = family_model(family)
    batch = random_batch(text, temperature=1.3, barred=(4,))
    batch.tokens[batch.tokens == 4] = 5
    with torch.no_grad():
        outputs = outputs_of(model, text, batch)
        for b, row in enumerate(text.ids):
            for g, column in enumerate(batch.anchors[b].tolist()):
                naive = naive_scores(model, row, column, batch.tokens[b, g], AHEAD, 1.3, (4,))
                close = {"atol": 1e-4, "rtol": 1e-4}
                torch.testing.assert_close(outputs["talk_log_probs"][b, g], naive.talk, **close)
                torch.testing.assert_close(outputs["weights"][b, g], naive.weights, **close)
                total = outputs["thought_log_probs"][b, g]
                torch.testing.assert_close(total, naive.thought.sum(), **close)
    assert outputs["weights"].abs().min() > 0  # the head is awake, so thoughts have a say


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_sampled_thoughts_equal_those_of_a_naive_loop(
    family, temperature, family_model, text
) -> None:
    """QS-2 and QS-11: the same noise on an ordinary sequence's logits draws the same tokens."""
    model, anchors = family_model(family), every_column(text)
    start = getattr(model, ATTRIBUTE).start_and_end()[0].detach()
    drawn = sample_thoughts(
        model, start, text.ids, text.mask, anchors, LENGTH, keys_of(anchors),
        temperature=temperature, barred=[7],
    )  # fmt: skip
    words, key = token_words(23, "cpu"), iter(keys_of(anchors))
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        for b, row in enumerate(text.ids):
            for g, column in enumerate(anchors[b].tolist()):
                sequence, name = torch.cat([embedding(row[: column + 1]), start[None]]), next(key)
                entropies = []
                for step in range(LENGTH):
                    logits = logits_of(model, states_of(model, sequence)[-1:])
                    logits[:, 7] = float("-inf")
                    logits = logits / (temperature or 1.0)
                    p = logits.softmax(-1)
                    entropies.append(-(p * p.clamp(min=1e-30).log()).sum())
                    if temperature:
                        logits = logits + gumbel_noise(words, [name], step)
                    token = logits.argmax(-1)
                    assert token.item() == drawn.tokens[b, g, step].item()
                    sequence = torch.cat([sequence, embedding(token)])
                mean = torch.stack(entropies).mean()
                torch.testing.assert_close(drawn.entropies[b, g], mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family", ["llama", "mistral-window", "gemma2", "gpt2", "gpt_oss", "bloom"]
)
def test_gradients_equal_those_through_ordinary_sequences(family, family_model, text) -> None:
    """QS-5: of all weights, the thought module's included, through a loss of all terms."""
    model, text.ids, text.mask = family_model(family), text.ids[:1], text.mask[:1]
    batch = random_batch(text)
    weights = torch.rand(batch.anchors.shape, generator=text.generator)
    outputs = outputs_of(model, text, batch)
    loss = (outputs["talk_log_probs"] * weights[..., None]).sum()
    loss = loss + (outputs["thought_log_probs"] * weights).sum()
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = torch.zeros(())
    for g, column in enumerate(batch.anchors[0].tolist()):
        naive = naive_scores(model, text.ids[0], column, batch.tokens[0, g], AHEAD)
        loss = loss + weights[0, g] * (naive.talk.sum() + naive.thought.sum())
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            size = parameter.grad.abs().max().clamp(min=1.0)
            torch.testing.assert_close(ours[name] / size, parameter.grad / size, atol=2e-5, rtol=0)
    assert set(ours) == {n for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "window"), [("llama", None), ("mistral-window", 5)])
def test_states_equal_those_under_the_dense_mask(family, window, family_model, text) -> None:
    """QS-4 through a whole model, whose own attention gets the mask over all pairs."""
    model = family_model(family)
    ids = torch.randint(2, 23, (1, 12 + 4 * 3), generator=text.generator)
    anchors = [0, 4, 4, 11]
    layout = ThoughtLayout(torch.ones((1, 12), dtype=torch.bool), torch.tensor([anchors]), 12, 3)
    with torch.no_grad():
        with thoughts_attend(model):
            ours = last_states(model, embed(model, ids), layout)
        mask, positions = dense_mask(12, anchors, 3, window)
        dense = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    assert len(layout.windows) == model.config.num_hidden_layers


def test_a_thought_sees_nothing_after_its_column_and_no_other_thought(family_model, text) -> None:
    """QS-3: bit-identical scores when later text or other thoughts change, and no gradient."""
    model, batch = family_model(), random_batch(text, ahead=1)
    column = 6
    mine = batch.anchors[0] <= column
    with torch.no_grad():
        before = outputs_of(model, text, batch)
        changed_text = text.ids.clone()
        changed_text[:, column + 2 :] = 2
        text.ids = changed_text
        changed = batch.tokens.clone()
        changed[:, 1::2] = 3  # the second thought of every column
        after = outputs_of(model, text, ThoughtBatch(batch.anchors, changed, batch.is_real, 1))
    for name in ("talk_log_probs", "weights", "thought_log_probs"):
        first = slice(0, int(mine.sum()), 2)
        assert torch.equal(before[name][:, first], after[name][:, first])
    embeddings = embed(model, torch.cat([text.ids, batch.tokens.flatten(1)], 1)).detach()
    embeddings.requires_grad_()
    num_text = text.ids.shape[1]
    layout = ThoughtLayout(text.mask.bool(), batch.anchors, num_text, LENGTH)
    with thoughts_attend(model):
        states = last_states(model, embeddings, layout)
    block = int((batch.anchors[0] == column).nonzero()[0])
    target = states[:, num_text + block * LENGTH : num_text + (block + 1) * LENGTH].sum()
    (grad,) = torch.autograd.grad(target, embeddings)
    seen = grad.abs().sum((0, 2)) > 0
    expected = torch.zeros_like(seen)
    expected[: column + 1] = True
    expected[num_text + block * LENGTH : num_text + (block + 1) * LENGTH] = True
    assert torch.equal(seen, expected)


def test_a_fresh_head_gives_the_likelihoods_without_thoughts(family_model, text) -> None:
    """QS-1: w = 0 everywhere, and every talk log-prob is that of the same token in the text."""
    model, batch = family_model(awake=False), random_batch(text)
    with torch.no_grad():
        outputs = outputs_of(model, text, batch)
        plain = model(text.ids).logits.log_softmax(-1)[:, :-1]
    plain = plain.gather(-1, text.ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(outputs["base_log_probs"], plain, atol=1e-5, rtol=0)
    assert torch.equal(outputs["weights"], torch.zeros_like(outputs["weights"]))
    for g, column in enumerate(batch.anchors[0].tolist()):
        expected = plain[:, column : column + AHEAD]
        torch.testing.assert_close(outputs["talk_log_probs"][:, g], expected, atol=1e-5, rtol=0)


def test_a_shift_of_all_positions_changes_nothing(family_model, text) -> None:
    """QS-6, for rotary positions: the same text behind 7 columns of padding."""
    model, batch = family_model(), random_batch(text)
    outputs = outputs_of(model, text, batch)

    class Shifted(ThoughtLayout):
        def position_ids(self):
            return ThoughtLayout.position_ids(self) + 7

    layouts = [c(text.mask.bool(), batch.anchors, 12, LENGTH) for c in (ThoughtLayout, Shifted)]
    embeddings = embed(model, torch.cat([text.ids, batch.tokens.flatten(1)], 1))
    with thoughts_attend(model), torch.no_grad():
        here, there = (last_states(model, embeddings, layout) for layout in layouts)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    padded = torch.nn.functional.pad
    text.ids, text.mask = padded(text.ids, (7, 0)), padded(text.mask, (7, 0))
    moved = ThoughtBatch(batch.anchors + 7, batch.tokens, batch.is_real, AHEAD)
    shifted = outputs_of(model, text, moved)
    torch.testing.assert_close(shifted["talk_log_probs"], outputs["talk_log_probs"])


def test_a_thought_of_no_tokens_works_and_has_no_policy(family_model, text) -> None:
    """QS-6: start and end alone."""
    model, batch = family_model(), random_batch(text, length=0)
    outputs = outputs_of(model, text, batch)
    assert torch.equal(outputs["thought_log_probs"], torch.zeros(batch.anchors.shape))
    naive = naive_scores(model, text.ids[0], 4, batch.tokens[0, 0], AHEAD)
    torch.testing.assert_close(outputs["talk_log_probs"][0, 8], naive.talk)


def test_the_tokens_that_are_computed_are_as_few_as_promised(family_model, text) -> None:
    """QS-22: S + G·n tokens a row to sample, S + G·(n + n_true + 1) with gradients."""
    model, batch = family_model(), random_batch(text)
    counted = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    num_text, blocks = text.ids.shape[1], batch.anchors.shape[1]
    start = getattr(model, ATTRIBUTE).start_and_end()[0]
    keys = keys_of(batch.anchors)
    sample_thoughts(model, start, text.ids, text.mask, batch.anchors, LENGTH, keys)
    assert counted == [num_text, *[blocks] * LENGTH]
    counted.clear()
    outputs_of(model, text, batch)
    assert counted == [num_text + blocks * (LENGTH + AHEAD + 1)]
    hook.remove()
