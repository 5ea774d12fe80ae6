"""The M-step's loss: against NumPy, filter against reward, scale, batch size (EM-6 to EM-10)."""

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from tiny_rewards import digit_share

from trl_selfplay.rollouts.stored import load_kept, load_samples
from trl_selfplay.trainers.rest_em.row_weights import relative_weights


def read_rows(trainer, round_index):
    return load_from_disk(trainer.run.folder(round_index) / "dataset")


def losses(trainer, rows):
    """Yield the loss of each optimizer step of an epoch, through the trainer's own code.

    The weights stay as they are; the gradients are those of all steps so far.
    """
    trainer.train_dataset = rows
    model = trainer.model
    model.train()
    model.zero_grad()
    loader = trainer.get_train_dataloader()
    batches = iter(loader)
    accumulated = trainer.args.gradient_accumulation_steps
    for _ in range(-(-len(loader) // accumulated)):
        step, num_items = trainer.get_batch_samples(batches, accumulated, model.device)
        trainer.current_gradient_accumulation_steps = len(step)
        total = 0.0
        for batch in step:
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=num_items)
            loss.backward()
            total += loss.item()
        yield [row for batch in step for row in batch["input_ids"].tolist()], total


def loss_and_gradient(trainer, rows):
    """Return loss and gradients of rows that are one optimizer step."""
    ((_, loss),) = losses(trainer, rows)
    parameters = trainer.model.named_parameters()
    return loss, {n: p.grad.clone() for n, p in parameters if p.grad is not None}


def weighted_rows(rewards, seed=0):
    """Rows of random tokens, their weights made of these rewards; two tokens are the prompt."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 20, size=5 + i).tolist() for i in range(len(rewards))]
    labels = [[-100] * 2 + row[2:] for row in ids]
    weights = relative_weights(rewards, [len(row) - 2 for row in ids])
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "weight": weights})


def build_weighted(build_rest_em, folder, **changes):
    return build_rest_em(
        folder, loss_weighting="reward", per_device_train_batch_size=2,
        gradient_accumulation_steps=2, **changes,
    )  # fmt: skip


def test_weights_of_0_and_1_give_the_gradient_of_the_filter(build_rest_em) -> None:
    """EM-6."""
    rows = weighted_rows([1.0, 0.0, 1.0, 0.0])
    weighted, gradient = loss_and_gradient(build_weighted(build_rest_em, "w"), rows)
    kept = rows.filter(lambda row: row["weight"] > 0.0).remove_columns("weight")
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


def log_likelihoods(trainer, rows):
    """Return Σ_t log p(y_t) of each row's completion from the model's own logits, in float64."""
    sums = []
    for row in rows:
        with torch.no_grad():
            logits = trainer.model(torch.tensor([row["input_ids"]])).logits[0].double().numpy()
        shifted = logits[:-1] - logits[:-1].max(-1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        targets = np.array(row["labels"][1:])
        places = np.flatnonzero(targets != -100)
        sums.append(log_probs[places, targets[places]].sum())
    return np.array(sums)


def by_numpy(trainer, rows, rewards):
    """Return Σ_j r_j Σ_t −log p(y_t) / Σ_j r_j T_j."""
    lengths = np.array([len(row["input_ids"]) - 2 for row in rows])
    return -(np.array(rewards) @ log_likelihoods(trainer, rows)) / (np.array(rewards) @ lengths)


def test_the_weighted_loss_is_the_sum_over_tokens_by_the_sum_of_weights(build_rest_em) -> None:
    """EM-10: against NumPy on the model's own logits, under accumulation."""
    weights = [1.0, 0.5, 0.25, 2.0]
    rows = weighted_rows(weights)
    trainer = build_weighted(build_rest_em, "w")
    loss, _ = loss_and_gradient(trainer, rows)
    assert loss == pytest.approx(by_numpy(trainer, rows, weights), abs=1e-6)


def test_predict_gives_the_weighted_loss(build_rest_em) -> None:
    weights = [1.0, 0.5, 0.25, 2.0]
    rows = weighted_rows(weights)
    trainer = build_weighted(build_rest_em, "w")
    with pytest.warns(FutureWarning, match="return_outputs"):
        metrics = trainer.predict(rows).metrics
    assert metrics["test_loss"] == pytest.approx(by_numpy(trainer, rows, weights), abs=1e-6)


@pytest.mark.parametrize(("rows_a_batch", "batches_a_step"), [(1, 1), (1, 4), (2, 1), (4, 2)])
def test_what_a_row_counts_depends_on_no_batch(build_rest_em, rows_a_batch, batches_a_step) -> None:
    """Every step is Σ_j r_j / r̄ Σ_t −log p / Σ_j T_j, with r̄ the mean of the round's tokens."""
    rewards = np.array([1.0, 0.1, 0.5, 2.0, 0.1, 1.0, 0.3, 0.7])
    rows = weighted_rows(rewards.tolist())
    trainer = build_rest_em(
        loss_weighting="reward", per_device_train_batch_size=rows_a_batch,
        gradient_accumulation_steps=batches_a_step,
    )  # fmt: skip
    lengths = np.array([len(ids) - 2 for ids in rows["input_ids"]])
    weights = rewards * lengths.sum() / (rewards @ lengths)
    likelihoods = log_likelihoods(trainer, rows)
    places = {tuple(ids): i for i, ids in enumerate(rows["input_ids"])}
    pad = trainer.processing_class.pad_token_id
    seen = []
    for batch, loss in losses(trainer, rows):
        step = [places[tuple(i for i in ids if i != pad)] for ids in batch]
        assert len(step) == rows_a_batch * batches_a_step
        expected = -(weights[step] @ likelihoods[step]) / lengths[step].sum()
        assert loss == pytest.approx(expected, abs=1e-6)
        seen += step
    assert sorted(seen) == list(range(8))


def test_weights_are_rewards_by_their_mean_over_tokens() -> None:
    weights = relative_weights([1.0, 0.1, 0.5], [2, 3, 5])
    assert weights == pytest.approx([1.0 / 0.48, 0.1 / 0.48, 0.5 / 0.48])
    assert relative_weights([0.3] * 4, [1, 2, 3, 4]) == pytest.approx([1.0] * 4)
    assert relative_weights([1e308] * 4, [1, 2, 3, 4]) == pytest.approx([1.0] * 4)


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
    rewards = np.array([r.reward for r in kept])
    lengths = np.array([len(r.completion_ids) for r in kept])
    expected = rewards * lengths.sum() / (rewards @ lengths)
    assert sorted(read_rows(trainer, 0)["weight"]) == pytest.approx(sorted(expected))
    positive = {
        r for r in load_samples(trainer.run.folder(0)) if r.reward > 0 and r.finish == "eos"
    }
    assert set(kept) <= positive
    assert len({r.reward for r in kept}) > 2


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_gold_weighs_as_much_as_the_mean_whatever_the_scale(
    build_rest_em, gold_answers, scale
) -> None:
    """One function gives what another gives by 100."""

    def reward(completions, **kwargs):
        return [scale * share for share in digit_share(completions)]

    trainer = build_rest_em(
        f"gold-{scale}", reward_funcs=reward, loss_weighting="reward", num_rounds=1,
        gold_dataset=gold_answers(3),
    )  # fmt: skip
    trainer.train()
    gold = {(*r.prompt_ids, *r.completion_ids) for r in trainer.gold.rollouts}
    rows = list(read_rows(trainer, 0))
    own = [row for row in rows if tuple(row["input_ids"]) not in gold]
    assert [row["weight"] for row in rows if row not in own] == [1.0] * 3
    lengths = np.array([sum(label != -100 for label in row["labels"]) for row in own])
    weights = np.array([row["weight"] for row in own])
    assert weights @ lengths / lengths.sum() == pytest.approx(1.0)
    assert len(set(weights)) > 2


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
