"""DPOConfig's losses and other fields in SPIN: margins begin at 0, whatever they are."""

import math

import pytest
import torch

LN_2 = math.log(2.0)
# By hand, at beta 0.5 and label smoothing 0.1, where every log-ratio is 0.
FIRST = {
    "sigmoid": LN_2,
    "sigmoid_norm": LN_2,
    "robust": (0.9 * LN_2 - 0.1 * LN_2) / 0.8,
    "aot": 0.9 * LN_2 + 0.1 * LN_2,
    "aot_unpaired": LN_2,
    "nca_pair": 1.3862944,
    "bco_pair": 1.3862944,
    "hinge": 1.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "ipo": 1.0,  # (0 - 1 / (2 * 0.5))**2
    "sppo_hard": 2.0,  # twice (0.5 / 0.5)**2
    "exo_pair": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    "discopop": 0.8465736,
}


def test_every_loss_begins_where_the_config_says(build_spin) -> None:
    """With policy and opponent the same, through TRL's own loss."""
    trainer = build_spin(beta=0.5)
    rows = trainer.play_round(0).training_rows.select(range(4))
    batch = trainer.data_collator(rows.to_list())
    trainer.label_smoothing = trainer.args.label_smoothing = 0.1
    for name, expected in FIRST.items():
        trainer.loss_types = trainer.args.loss_type = [name]
        with torch.no_grad():
            loss = float(trainer.compute_loss(trainer.model, dict(batch)))
        assert loss == pytest.approx(expected, abs=1e-5), name
        assert trainer.args.first_loss(0.5) == pytest.approx(expected, abs=1e-6), name
    trainer.loss_types = trainer.args.loss_type = ["sigmoid", "ipo"]
    trainer.loss_weights = trainer.args.loss_weights = [0.5, 2.0]
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, dict(batch)))
    assert loss == pytest.approx(0.5 * LN_2 + 2.0, abs=1e-5)
    assert trainer.args.first_loss(0.5) == pytest.approx(loss, abs=1e-5)


FIELDS = {
    "ld_alpha": {"ld_alpha": 0.3},
    "use_weighting": {"use_weighting": True},
    "ipo": {"loss_type": "ipo"},
    "with sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "pad_to_multiple_of": {"pad_to_multiple_of": 8},
    "precompute_ref_batch_size": {"precompute_ref_batch_size": 5},
    "no max_length": {"max_length": None},
    "dataset_num_proc": {"dataset_num_proc": 2},
    "no checkpointing": {"gradient_checkpointing": False},
    "all columns": {"remove_unused_columns": False},
    "accumulation": {"gradient_accumulation_steps": 2},
    "eval in rounds": {"eval_strategy": "steps", "eval_steps": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_margins_begin_at_0_in_every_round_with_every_field(
    build_spin, pair_recorder, answers, name
) -> None:
    trainer = build_spin(num_rounds=2, max_steps=2, callbacks=[pair_recorder],
                         max_completion_length=24, eval_dataset=answers(4, first=50),
                         **FIELDS[name])  # fmt: skip
    trainer.train()
    assert sorted(pair_recorder.steps) == [0, 1]
    for steps in pair_recorder.steps.values():
        assert steps[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
        first = trainer.args.first_loss(trainer.beta)
        if first is not None:
            assert steps[0]["loss"] == pytest.approx(first, abs=1e-4)


def test_held_out_likelihood_does_not_depend_on_the_opponents_length(build_spin, answers) -> None:
    """`ld_alpha` weighs what exceeds the shorter completion; held-out scores are of whole ones."""
    heldout = answers(4, first=50)
    plain = build_spin("plain", eval_dataset=heldout).evaluate()
    weighed = build_spin("weighed", eval_dataset=heldout, ld_alpha=0.3).evaluate()
    assert weighed["eval_logps"] == pytest.approx(plain["eval_logps"], abs=1e-6)
