"""The M-step's loss: against NumPy, filter against reward, scale, negative rewards (EM-6 to EM-10)."""

import numpy as np
import pytest
import torch
from conftest import digit_share
from datasets import Dataset, load_from_disk

from trl_selfplay.self_play import load_kept, load_samples


def read_rows(trainer, round_index):
    return load_from_disk(trainer.run.folder(round_index) / "dataset")


def loss_and_gradient(trainer, rows):
    """Return loss and gradients of one optimizer step on rows, through the trainer's own code."""
    trainer.train_dataset = rows
    model = trainer.model
    model.train()
    loader = iter(trainer.get_train_dataloader())
    batches, num_items = trainer.get_batch_samples(
        loader, trainer.args.gradient_accumulation_steps, model.device
    )
    trainer.current_gradient_accumulation_steps = len(batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=num_items)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def weighted_rows(weights, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 20, size=5 + i).tolist() for i in range(len(weights))]
    labels = [[-100] * 2 + row[2:] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "weight": list(weights)})


def build_weighted(build_rest_em, folder, **changes):
    return build_rest_em(
        folder, loss_weighting="reward", per_device_train_batch_size=2,
        gradient_accumulation_steps=2, **changes,
    )  # fmt: skip


def test_weights_of_0_and_1_give_the_gradient_of_the_filter(build_rest_em) -> None:
    """EM-6."""
    rows = weighted_rows([1.0, 0.0, 1.0, 0.0])
    weighted, gradient = loss_and_gradient(build_weighted(build_rest_em, "w"), rows)
    kept = rows.filter(lambda row: row["weight"] == 1.0).remove_columns("weight")
    plain = build_rest_em("f", per_device_train_batch_size=2)
    filtered, expected = loss_and_gradient(plain, kept)
    assert weighted == pytest.approx(filtered, abs=1e-6)
    for name in expected:
        torch.testing.assert_close(gradient[name], expected[name], atol=1e-6, rtol=1e-5)


def test_the_scale_of_rewards_changes_no_gradient(build_rest_em) -> None:
    """EM-7: also where the sum of weights is far below one token."""
    weights = [0.2, 0.9, 0.5, 0.1]
    results = [
        loss_and_gradient(
            build_weighted(build_rest_em, f"s{scale}"), weighted_rows([scale * w for w in weights])
        )
        for scale in (1.0, 1e-4)
    ]
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-6, rtol=1e-4)


def by_numpy(trainer, rows, weights):
    """Return Σ_j r_j Σ_t −log p(y_t) / Σ_j r_j T_j from the model's own logits, in float64."""
    numerator = denominator = 0.0
    for row, weight in zip(rows, weights, strict=True):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([row["input_ids"]])).logits[0].double().numpy()
        shifted = logits[:-1] - logits[:-1].max(-1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        targets = np.array(row["labels"][1:])
        places = np.flatnonzero(targets != -100)
        numerator -= weight * log_probs[places, targets[places]].sum()
        denominator += weight * len(places)
    return numerator / denominator


def test_the_weighted_loss_is_the_sum_over_tokens_by_the_sum_of_weights(build_rest_em) -> None:
    """EM-10: against NumPy on the model's own logits, under accumulation."""
    weights = [1.0, 0.5, 0.25, 2.0]
    rows = weighted_rows(weights)
    trainer = build_weighted(build_rest_em, "w")
    loss, _ = loss_and_gradient(trainer, rows)
    assert loss == pytest.approx(by_numpy(trainer, rows, weights), abs=1e-6)


def test_the_filtered_loss_is_the_mean_over_the_kept_tokens(build_rest_em) -> None:
    """EM-10 with all weights 1: each token counts alike, those of long completions too."""
    rows = weighted_rows([1.0] * 4).remove_columns("weight")
    trainer = build_rest_em(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    loss, _ = loss_and_gradient(trainer, rows)
    assert loss == pytest.approx(by_numpy(trainer, rows, [1.0] * 4), abs=1e-6)


def test_a_run_weighs_each_row_with_its_reward(build_rest_em) -> None:
    trainer = build_rest_em(reward_funcs=digit_share, loss_weighting="reward", num_rounds=1)
    trainer.train()
    kept = load_kept(trainer.run.folder(0))
    assert sorted(read_rows(trainer, 0)["weight"]) == sorted(r.reward for r in kept)
    positive = {
        r for r in load_samples(trainer.run.folder(0)) if r.reward > 0 and r.finish == "eos"
    }
    assert set(kept) <= positive
    assert len({r.reward for r in kept}) > 2


def test_a_negative_reward_can_be_no_weight(build_rest_em) -> None:
    """EM-8: the error shows prompt, reward and function name."""

    def grumpy_reward(completions, **kwargs):
        return [-0.5] * len(completions)

    trainer = build_rest_em(reward_funcs=grumpy_reward, loss_weighting="reward")
    with pytest.raises(ValueError, match=r"grumpy_reward gave -0\.5") as raised:
        trainer.train()
    assert "= ?" in str(raised.value)
    assert list((trainer.run.folder(0) / "samples").glob("*.parquet"))  # nothing is lost


def test_a_loss_of_the_users_own_can_not_be_weighted(build_rest_em) -> None:
    with pytest.raises(ValueError, match="compute_loss_func"):
        build_rest_em(loss_weighting="reward", compute_loss_func=lambda *a, **k: None)
