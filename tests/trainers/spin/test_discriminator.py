"""The theory on a table of outcomes, where everything is exact, and the held-out measures."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from trl_selfplay.evaluation.monitor import find_convergence
from trl_selfplay.trainers.spin.discriminator import (
    LN_2,
    load_scores,
    logistic_loss,
    measure_heldout,
)

P_DATA = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
P_T = np.array([0.1, 0.2, 0.3, 0.15, 0.25])


def expected_loss(logits, p_data, p_t, beta):
    """Equation 4.7, summed over all pairs of outcomes."""
    ratio = torch.log_softmax(logits, 0) - torch.from_numpy(np.log(p_t))
    margins = beta * (ratio[:, None] - ratio[None, :])
    weights = torch.from_numpy(np.outer(p_data, p_t))
    return (weights * torch.nn.functional.softplus(-margins)).sum()


def minimise(p_data, p_t, beta):
    logits = torch.from_numpy(np.log(p_t)).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(logits, p_data, p_t, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach()


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_the_exact_minimum_of_a_round_is_theorem_5_4(beta) -> None:
    """SP-13: p_t (p_data / p_t)^(1/beta), normalised."""
    expected = P_T * (P_DATA / P_T) ** (1 / beta)
    found = torch.softmax(minimise(P_DATA, P_T, beta), 0).numpy()
    assert found == pytest.approx(expected / expected.sum(), abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_data_that_equal_the_policy_leave_no_gradient(beta) -> None:
    """SP-13: the fixed point, loss ln 2."""
    logits = torch.from_numpy(np.log(P_DATA)).requires_grad_()
    loss = expected_loss(logits, P_DATA, P_DATA, beta)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(LN_2, abs=1e-12)
    assert float(logits.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_ln_2_minus_the_loss_bounds_the_distance(beta) -> None:
    """SP-14: for any policy, with equality at the minimum, whatever beta is."""
    forth, back = np.outer(P_DATA, P_T), np.outer(P_T, P_DATA)
    middle = (forth + back) / 2
    divergence = ((forth * np.log(forth / middle)).sum() + (back * np.log(back / middle)).sum()) / 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = 3 * torch.randn(5, generator=generator, dtype=torch.float64)
        assert float(expected_loss(logits, P_DATA, P_T, beta)) >= LN_2 - divergence - 1e-12
    best = float(expected_loss(minimise(P_DATA, P_T, beta), P_DATA, P_T, beta))
    assert best == pytest.approx(LN_2 - divergence, abs=1e-6)


@pytest.mark.parametrize("margin", [-800.0, -3.0, 0.0, 1e-9, 2.0, 800.0])
def test_the_logistic_loss_does_not_overflow(margin) -> None:
    assert logistic_loss(margin) == pytest.approx(np.logaddexp(0.0, -margin))


def heldout(margins, beta=0.1):
    """Rows whose log-ratios make these margins, with two chosen tokens each."""
    count = len(margins)
    rows = Dataset.from_dict(
        {
            "prompt_id": [str(i) for i in range(count)],
            "chosen_ids": [[3, 1]] * count,
            "has_opponent": [True] * count,
            "ref_chosen_logps": [-4.0] * count,
            "ref_rejected_logps": [-6.0] * count,
        }
    )
    return measure_heldout(rows, [(-4.0 + m / beta, -6.0) for m in margins], beta, "eval")


def test_held_out_measures_by_hand() -> None:
    metrics, per_prompt = heldout([0.2, -0.1, 0.0, 0.3])
    assert metrics["eval_win_rate"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert metrics["eval_margin"] == pytest.approx(0.1)
    losses = [math.log1p(math.exp(-m)) for m in (0.2, -0.1, 0.0, 0.3)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 4)
    assert metrics["eval_distance"] == pytest.approx(LN_2 - sum(losses) / 4)
    assert per_prompt["0"] == pytest.approx((-4.0 + 2.0) / 2)
    assert metrics["eval_logps"] == pytest.approx(sum(per_prompt.values()) / 4)


def test_convergence_needs_even_odds_and_a_loss_at_ln_2() -> None:
    rng = np.random.default_rng(0)
    even = rng.normal(0.0, 0.05, 60)
    assert find_convergence(heldout(even)[0]).startswith("converged: 60 held-out pairs")
    assert find_convergence(heldout(np.abs(even))[0]) is None  # all told apart, by little
    assert find_convergence(heldout(rng.normal(1.0, 1.0, 60))[0]) is None
    assert find_convergence(heldout(even[:10])[0]) is None  # too few to say
    assert find_convergence({"eval_logps": -1.0}) is None


def test_scores_of_earlier_runs_are_read(tmp_path) -> None:
    path = tmp_path / "scores.json"
    path.write_text('{"metrics": {"eval_logps": -1.0}, "greedy": {"p": -1.0}, "seconds": 2.0}')
    scores = load_scores(path)
    assert (scores.by_prompt, scores.metrics) == ({"p": -1.0}, {"eval_logps": -1.0})
