import itertools

import pytest
import torch

from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE
from trl_selfplay.trainers.quiet_star.objective import advantages, base_ahead, objective_sums
from trl_selfplay.trainers.quiet_star.unrolled import ThoughtBatch, think_and_talk


def think(model, text, num_thoughts=2, length=3, ahead=2, tokens=None):
    """Thoughts at all columns of the text; returns the batch and the scores."""
    columns = torch.arange(text.ids.shape[1] - ahead).expand(len(text.ids), -1)
    anchors = columns.repeat_interleave(num_thoughts, 1)
    if tokens is None:
        tokens = torch.randint(2, 23, (*anchors.shape, length), generator=text.generator)
    batch = ThoughtBatch(anchors, tokens, torch.ones_like(anchors, dtype=torch.bool), ahead)
    return columns, think_and_talk(model, text.ids, text.mask, batch)


def policy_loss(columns, outputs, baseline="mean", num_thoughts=2):
    talk = outputs["talk_log_probs"].unflatten(1, (-1, num_thoughts))
    thought = outputs["thought_log_probs"].unflatten(1, (-1, num_thoughts))
    base = base_ahead(outputs["base_log_probs"], columns, talk.shape[3])
    advantage = advantages(talk.sum(-1), base.sum(-1, keepdim=True), baseline)
    labelled = torch.ones_like(outputs["base_log_probs"], dtype=torch.bool)
    sums = objective_sums(outputs["base_log_probs"], labelled, talk, thought, advantage)
    return sums.policy, advantage


def test_advantages_of_a_worked_example() -> None:
    """QS-9: rewards of 1, 2 and 6 with a mean of 3 and a likelihood of 1.5 without thought."""
    rewards, base = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.5])
    assert advantages(rewards, base, "mean").tolist() == [0.0, 0.0, 3.0]
    assert advantages(rewards, base, "base").tolist() == [0.0, 0.5, 4.5]
    assert advantages(rewards, base, "leave_one_out").tolist() == [-3.0, -1.5, 4.5]
    with pytest.raises(ValueError, match="unknown baseline 'median'"):
        advantages(rewards, base, "median")


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_thoughts_that_are_equally_good_get_no_gradient(baseline, family_model, text) -> None:
    """QS-8: a constant reward, one thought under the mean, and thoughts that have no say."""
    rewards = torch.full((4, 3), -2.5)
    assert torch.equal(advantages(rewards, rewards[:, :1], baseline), torch.zeros(4, 3))
    assert advantages(torch.tensor([[3.0]]), torch.zeros(1, 1), "mean").item() == 0.0
    columns, outputs = think(family_model(awake=False), text)
    _, advantage = policy_loss(columns, outputs, baseline)
    assert advantage.abs().max() < 1e-5


def test_the_objective_of_a_worked_example() -> None:
    """Two rows, two columns of which one isn't real, two thoughts, two tokens ahead."""
    talk = torch.tensor([[[[-1.0, -2.0], [-3.0, -4.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    thought = torch.tensor([[[-5.0, -7.0], [0.0, 0.0]]])
    advantage = torch.tensor([[[0.5, 0.0], [0.0, 0.0]]])
    base = torch.tensor([[-1.0, -2.0, -4.0]])
    sums = objective_sums(base, torch.tensor([[True, False, True]]), talk, thought, advantage)
    assert (sums.base, sums.talk, sums.policy) == (5.0, 2.5, 1.25)


def test_base_likelihoods_are_those_of_the_tokens_ahead() -> None:
    log_probs = -torch.arange(8.0).view(2, 4)  # column j holds that of token j + 1
    ahead = base_ahead(log_probs, torch.tensor([[0, 2], [1, 2]]), 2)
    assert (-ahead).tolist() == [[[0, 1], [2, 3]], [[5, 6], [6, 7]]]


@pytest.mark.parametrize("length", [1, 3])
def test_reinforce_reaches_the_states_that_emitted_a_thoughts_tokens_and_no_others(
    length, family_model, text
) -> None:
    """QS-7: start and all sampled tokens but the last; nothing in the mixing head."""
    model, kept = family_model(), []

    def keep(module, args, output) -> None:
        output.last_hidden_state.retain_grad()
        kept.append(output.last_hidden_state)

    hook = model.base_model.register_forward_hook(keep)
    columns, outputs = think(model, text, length=length)
    hook.remove()
    loss, advantage = policy_loss(columns, outputs)
    loss.backward()
    (states,) = kept
    blocks = states.grad[:, text.ids.shape[1] :].unflatten(1, (-1, length + 2 + 1))
    reached = blocks.abs().sum(-1) > 0  # (B, G, slots)
    reinforced = advantage.flatten(1) > 0
    assert torch.equal(reached[:, :, :length], reinforced[:, :, None].expand(-1, -1, length))
    assert not reached[:, :, length:].any()
    assert states.grad[:, : text.ids.shape[1]].abs().max() == 0
    grads = [p.grad for p in getattr(model, ATTRIBUTE).head.parameters()]
    assert all(g is None or g.abs().max() == 0 for g in grads)
    assert reinforced.any()
    assert not reinforced.all()


def test_a_step_on_the_policy_loss_makes_good_thoughts_likelier(family_model, text) -> None:
    """QS-9."""
    model = family_model()
    tokens = torch.randint(2, 23, (2, 20, 3), generator=text.generator)
    columns, outputs = think(model, text, tokens=tokens)
    loss, advantage = policy_loss(columns, outputs)
    before = (advantage.flatten(1) * outputs["thought_log_probs"]).sum().item()
    loss.backward()
    norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / norm
    _, outputs = think(model, text, tokens=tokens)
    after = (advantage.flatten(1) * outputs["thought_log_probs"]).sum().item()
    assert after > before


@pytest.mark.parametrize("num_thoughts", [2, 3])
def test_leave_one_out_is_unbiased(num_thoughts, family_model, text) -> None:
    """QS-10: over all tuples of thoughts, weighted by their probability, in closed form.

    One column, thoughts of one token, a vocabulary of 6. The exact gradient of E[ℓ] with ℓ held
    fixed is that of Σ p(thought)·ℓ(thought).
    """
    vocabulary, column, ahead = 6, 3, 2
    model = family_model(vocab_size=vocabulary)
    ids = torch.randint(2, vocabulary, (1, 8), generator=text.generator)
    anchors = torch.full((1, vocabulary), column)
    every = torch.arange(vocabulary).view(1, vocabulary, 1)
    batch = ThoughtBatch(anchors, every, torch.ones_like(anchors, dtype=torch.bool), ahead)
    outputs = think_and_talk(model, ids, torch.ones_like(ids), batch)
    # From here in float64, by the logits of the column: the model's own are float32.
    logits = outputs["thought_log_probs"][0].detach().double().requires_grad_()  # (V,)
    log_pi = logits.log_softmax(-1)
    reward = outputs["talk_log_probs"][0].sum(-1).detach().double()
    assert logits.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    tuples = torch.tensor(list(itertools.product(range(vocabulary), repeat=num_thoughts)))
    advantage = advantages(reward[tuples], torch.zeros(1), "leave_one_out")  # (tuples, K)
    probability = log_pi.detach()[tuples].sum(-1).exp()
    sums = objective_sums(
        torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, 1, 1),
        (log_pi[tuples] * probability[:, None])[None], advantage[None],
    )  # fmt: skip
    (ours,) = torch.autograd.grad(sums.policy, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(-(log_pi.exp() * reward).sum(), logits, retain_graph=True)
    torch.testing.assert_close(ours, exact, atol=1e-6, rtol=0)
    assert exact.abs().max() > 1e-2
    clipped = advantages(reward[tuples], torch.zeros(1), "mean")
    weighted = log_pi[tuples] * probability[:, None]
    biased = -(clipped * weighted).mean(1).sum()
    (biased,) = torch.autograd.grad(biased, logits)
    assert (biased - exact).abs().max() > 1e-3  # what the paper's clipping costs


def test_a_fresh_head_learns_in_its_last_layer_first(family_model, text) -> None:
    """QS-12: at step 0 no gradient in the vectors nor below; QS-13: afterwards in all."""
    for awake in (False, True):
        model = family_model(awake=awake)
        _, outputs = think(model, text)
        outputs["talk_log_probs"].sum().backward()
        module = getattr(model, ATTRIBUTE)
        last = module.head[-1].weight
        assert last.grad.abs().max() > 0
        for parameter in module.parameters():
            if parameter is not last:
                assert (parameter.grad.abs().max() > 0) == awake
