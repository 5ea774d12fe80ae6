"""The reference of a DPO loss over rounds, and completions that the policy wrote only in part."""

import pytest
import torch
from datasets import Dataset

from trl_selfplay import WrongOpponentError, WrongReferenceError

# What a row holds: prompt, completions, and which of their tokens the policy wrote.
PAIRS = [
    {
        "prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 11], "rejected_ids": [12, 13],
        "chosen_mask": [1, 0, 0, 1], "rejected_mask": [1, 1],
    },
    {
        "prompt_ids": [5], "chosen_ids": [9, 8], "rejected_ids": [7, 6, 5, 8, 9],
        "chosen_mask": [0, 1], "rejected_mask": [1, 0, 1, 0, 1],
    },
]  # fmt: skip


def written_logps(model, pairs, side):
    """Each row's log p of the written tokens, one by one, from the model's plain logits."""
    sums = []
    for pair in pairs:
        ids = torch.tensor([*pair["prompt_ids"], *pair[f"{side}_ids"]])
        with torch.no_grad():
            logps = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        start = len(pair["prompt_ids"])
        mask = pair.get(f"{side}_mask") or [1] * len(pair[f"{side}_ids"])
        sums.append(
            sum(float(logps[start + i - 1, ids[start + i]]) for i, m in enumerate(mask) if m)
        )
    return sums


def test_only_tokens_that_the_policy_wrote_are_scored(build_spin, tmp_path) -> None:
    trainer = build_spin()
    rows = trainer.store_reference(Dataset.from_list(PAIRS), tmp_path / "pairs")
    for side in ("chosen", "rejected"):
        expected = written_logps(trainer.model, PAIRS, side)
        assert rows[f"ref_{side}_logps"] == pytest.approx(expected, abs=1e-4)
    plain = Dataset.from_list(PAIRS).remove_columns(["chosen_mask", "rejected_mask"])
    everything = trainer.store_reference(plain, tmp_path / "plain")
    assert everything["ref_rejected_logps"][1] < rows["ref_rejected_logps"][1]


def test_only_tokens_that_the_policy_wrote_are_trained_on(build_spin, tmp_path) -> None:
    """Through the parent's own dataloader and loss: at the first step the margin is 0, later not."""
    trainer = build_spin(data_seed=0)
    rows = trainer.store_reference(Dataset.from_list(PAIRS), tmp_path / "pairs")
    trainer.train_dataset = rows
    (batch,) = trainer.get_train_dataloader()
    assert batch["completion_mask"].sum() == sum(
        sum(pair[mask]) for pair in PAIRS for mask in ("chosen_mask", "rejected_mask")
    )
    trainer.check_reference(trainer.model, batch, 0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    with pytest.raises(WrongReferenceError, match="the policy as it enters the round"):
        trainer.check_reference(trainer.model, batch, 0)
    trainer.model.eval()
    margins = [
        (chosen - ref_chosen) - (rejected - ref_rejected)
        for chosen, rejected, ref_chosen, ref_rejected in zip(
            written_logps(trainer.model, PAIRS, "chosen"),
            written_logps(trainer.model, PAIRS, "rejected"),
            rows["ref_chosen_logps"],
            rows["ref_rejected_logps"],
            strict=True,
        )
    ]
    expected = -torch.nn.functional.logsigmoid(trainer.beta * torch.tensor(margins)).mean()
    with torch.no_grad():
        assert float(trainer.compute_loss(trainer.model, batch)) == pytest.approx(
            float(expected), abs=1e-5
        )


def test_a_mask_of_another_length_is_refused(build_spin, tmp_path) -> None:
    pairs = [{**PAIRS[0], "rejected_mask": [1]}]
    with pytest.raises(ValueError, match="`rejected_mask` has 1 values for the 2 tokens"):
        build_spin().store_reference(Dataset.from_list(pairs), tmp_path / "pairs")


def test_what_spin_raises_has_its_name_of_old() -> None:
    assert issubclass(WrongReferenceError, WrongOpponentError)
