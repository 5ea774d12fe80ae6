"""Fields that were set and change nothing are named in a warning."""

import logging

import pytest

from trl_selfplay import QuietSTaRConfig

NOTHING_UNUSED = ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"log_unique_prompts": True}, "log_unique_prompts=True: without effect without log_com"),
        ({"num_completions_to_print": 3, "log_completions": True}, NOTHING_UNUSED),
        (
            {"temperature": 0.0, "num_generations": 1, "top_p": 0.9, "top_k": 5},
            "top_p=0.9, top_k=5: without effect without a temperature above 0",
        ),
        ({"top_p": 0.9, "top_k": 5}, NOTHING_UNUSED),
        ({"temperature_eval": 0.5}, "temperature_eval=0.5: without effect without an `eval_dat"),
        ({"few_shot_in_training": True}, "without effect without `few_shot_examples`"),
        ({"num_prompts_per_round": 13}, "num_prompts_per_round=13 has no effect: there are 12"),
        ({"num_prompts_per_round": 12}, NOTHING_UNUSED),
        (
            {"round_learning_rates": [1e-3, 1e-4], "learning_rate": 1e-2},
            "learning_rate=0.01 has no effect: round_learning_rates=",
        ),
        ({"round_learning_rates": [1e-2, 1e-4], "learning_rate": 1e-2}, NOTHING_UNUSED),
    ],
)
def test_a_field_without_effect_is_named(build_star, caplog, fields, message) -> None:
    with caplog.at_level(logging.WARNING):
        build_star(**fields)
    if message == NOTHING_UNUSED:
        assert "effect" not in caplog.text
    else:
        assert message in caplog.text


def test_a_held_out_temperature_needs_held_out_samples(build_star, sums, caplog) -> None:
    heldout = sums(4, first=90)
    with caplog.at_level(logging.WARNING):
        build_star("a", temperature_eval=0.5, eval_dataset=heldout)
        assert "effect" not in caplog.text
        build_star("b", temperature_eval=0.5, num_generations_eval=0, eval_dataset=heldout)
    assert (
        "temperature_eval=0.5: without effect without num_generations_eval above 0" in caplog.text
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_thoughts": 0, "thought_length": 4}, "thought_length=4: without effect without num_"),
        (
            {"num_thoughts": 1, "thought_length": 0, "thought_temperature": 0.5},
            "thought_temperature=0.5: without effect without thought_length above 0",
        ),
        (
            {"reinforce_weight": 0.0, "reinforce_baseline": "base"},
            "reinforce_baseline='base': without effect without reinforce_weight above 0",
        ),
    ],
)
def test_a_field_of_thoughts_without_effect_is_named(tmp_path, caplog, fields, message) -> None:
    with caplog.at_level(logging.WARNING):
        QuietSTaRConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)
    assert message in caplog.text
