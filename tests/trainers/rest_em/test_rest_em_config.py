"""ReSTEMConfig: the papers' presets, and what can't work. Invariants RE-5, EM-12, RF-8."""

import pytest

from trl_selfplay import ReSTEMConfig


def test_the_defaults_are_those_of_rest_em(tmp_path) -> None:
    config = ReSTEMConfig(str(tmp_path))
    assert (config.num_generations, config.max_per_prompt, config.temperature) == (32, 10, 0.7)
    assert (config.top_k, config.num_rounds, config.start_from) == (40, 3, "base")
    assert config.few_shot_in_training
    assert config.metric_for_best_model == "eval_accuracy"


def test_the_presets_are_the_papers_settings(tmp_path) -> None:
    """EM-12, MATH's half of it, and the settings of ReST and RFT."""
    math = ReSTEMConfig.from_paper("math", output_dir=str(tmp_path))
    assert (math.num_generations, math.max_per_prompt, math.top_k) == (32, 10, 40)
    assert (math.temperature, math.num_rounds) == (0.7, 3)
    rest = ReSTEMConfig.from_paper("rest", output_dir=str(tmp_path))
    assert (rest.num_generations, rest.temperature, rest.start_from) == (100, 0.8, "previous")
    assert rest.num_improve_steps == 3
    assert rest.warm_up_on_gold
    rft = ReSTEMConfig.from_paper("rft", output_dir=str(tmp_path))
    assert (rft.num_generations, rft.temperature, rft.start_from) == (100, 0.7, "base")
    assert (rft.learning_rate, rft.num_train_epochs, rft.max_length) == (2e-5, 3, 512)
    assert rft.per_device_train_batch_size * rft.gradient_accumulation_steps == 128


def test_rft_is_one_round(tmp_path) -> None:
    """RF-8."""
    assert ReSTEMConfig.from_paper("rft", output_dir=str(tmp_path)).num_rounds == 1
    with pytest.raises(ValueError, match="RFT is one round"):
        ReSTEMConfig.from_paper("rft", output_dir=str(tmp_path), num_rounds=2)


def test_an_unknown_preset_names_those_there_are(tmp_path) -> None:
    with pytest.raises(ValueError, match="math"):
        ReSTEMConfig.from_paper("code", output_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"improve_thresholds": [0.5, 0.4], "start_from": "previous"}, "doesn't rise"),
        ({"improve_thresholds": [0.5, 0.9]}, "start_from='previous'"),
        (
            {
                "improve_thresholds": [50.0, 120.0],
                "threshold_kind": "percentile",
                "start_from": "previous",
            },
            "between 0 and 100",
        ),
        ({"improve_learning_rate_factor": 1.5}, "improve_learning_rate_factor=1.5"),
        ({"improve_learning_rate_factor": 0.0}, "improve_learning_rate_factor=0.0"),
        ({"loss_weighting": "advantage"}, "'filter', 'reward'"),
        ({"loss_weighting": "reward", "packing": True}, "packing=True"),
        ({"loss_weighting": "reward", "loss_type": "dft"}, "loss_type='dft'"),
        ({"gold_ratio": 0.0}, "gold_ratio=0.0"),
        ({"deduplicate_against_gold": True, "gold_ratio": 0.5}, "gold_ratio=None"),
        ({"deduplicate_against_gold": True, "deduplicate": False}, "deduplicate=True"),
        ({"deduplicate_against_gold": True, "loss_weighting": "reward"}, "with loss_weighting"),
        ({"max_per_prompt": 0}, "max_per_prompt=0"),
        ({"few_shot_rounds": 1}, "few_shot_in_training=True"),
        ({"metric_for_best_model": "loss"}, "no held-out loss"),
    ],
)
def test_settings_that_can_not_work_are_refused(tmp_path, settings, message) -> None:
    """RE-5 among them: before anything is sampled."""
    with pytest.raises(ValueError, match=message):
        ReSTEMConfig(str(tmp_path), **settings)


def test_thresholds_from_yaml_become_numbers(tmp_path) -> None:
    config = ReSTEMConfig(str(tmp_path), improve_thresholds=["-inf", "5e-1"], start_from="previous")
    assert config.improve_thresholds == [float("-inf"), 0.5]
