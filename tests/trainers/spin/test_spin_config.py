"""SPINConfig: the algorithm's defaults, the published recipe, and what is refused."""

import logging

import pytest
from trl import DPOConfig, TrlParser

from trl_selfplay import SPINConfig


def test_the_defaults_are_the_algorithm(tmp_path) -> None:
    config = SPINConfig(str(tmp_path), use_cpu=True)
    assert isinstance(config, DPOConfig)
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (1.0, 1.0, 0, None)
    assert (config.start_from, config.history_rounds, config.num_generations) == ("previous", 0, 1)
    assert config.loss_type == ["sigmoid"]
    assert config.precompute_ref_log_probs
    assert config.metric_for_best_model == "eval_logps"


def test_the_papers_recipe(tmp_path, caplog) -> None:
    """arXiv 2401.01335, section 6.1, and the configs of uclaml/SPIN."""
    with caplog.at_level(logging.WARNING):
        config = SPINConfig.from_paper(output_dir=str(tmp_path), use_cpu=True)
    assert "another distribution" in caplog.text
    assert config.num_rounds == 4
    assert config.round_learning_rates == [5e-7, 5e-7, 1e-7, 1e-7]
    assert config.round_betas == [0.1, 0.1, 0.1, 5.0]
    assert (config.temperature, config.history_rounds, config.optim) == (0.0, 1, "rmsprop")
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64
    assert config.get_warmup_steps(1000) == 100
    longer = SPINConfig.from_paper(output_dir=str(tmp_path), use_cpu=True, num_rounds=6)
    assert longer.round_betas == [0.1, 0.1, 0.1, 5.0, 5.0, 5.0]
    scaled = SPINConfig.from_paper(
        output_dir=str(tmp_path), use_cpu=True, learning_rate=5e-6, beta=0.05
    )
    assert scaled.round_learning_rates == pytest.approx([5e-6, 5e-6, 1e-6, 1e-6])
    assert scaled.round_betas == pytest.approx([0.05, 0.05, 0.05, 2.5])


def test_generation_kwargs_that_change_the_opponent_are_warned_of(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        SPINConfig(str(tmp_path), use_cpu=True, generation_kwargs={"top_p": 1.0})
    assert "another distribution" not in caplog.text
    with caplog.at_level(logging.WARNING):
        SPINConfig(str(tmp_path), use_cpu=True, generation_kwargs={"temperature": 0.5})
    assert "temperature=0.5: the opponent is sampled from another distribution" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precompute_ref_log_probs": False}, "wrong opponent from round 1"),
        ({"start_from": "base"}, "the policy as it enters"),
        ({"disable_dropout": False}, "margins don't begin at 0"),
        ({"neftune_noise_alpha": 50.0}, "neftune_noise_alpha=50.0: the opponent's"),
        ({"stop_strings": ["\n"]}, "without EOS"),
        ({"generation_kwargs": {"eos_token_id": 3}}, "has eos_token_id=3"),
        ({"round_betas": [0.1, 0.1]}, "round_betas has 2 values for num_rounds=3"),
        ({"round_betas": [0.1] * 4}, "round_betas has 4 values"),
        ({"round_betas": [0.1, 0.0, 1.0]}, "each element a number above 0"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"round_learning_rates": [1e-6]}, "round_learning_rates has 1 values"),
        ({"temperature": 0.0, "num_generations": 2}, "copies of one completion"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"sync_ref_model": True}, "becomes the policy at the start of the next"),
        ({"loss_type": ["spin"]}, "TRL has no loss 'spin'; choose among"),
        ({"loss_type": ["sft"]}, "alone has no opponent"),
        ({"loss_type": "exo_pair"}, "'exo_pair' needs a value between 0 and 1"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "at least 0 and below 0.5"),
        ({"ld_alpha": 1.5}, "ld_alpha=1.5; it must be a number of at least 0 and at most 1"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 has no effect here"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect here"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect here"),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef=0.3 has no effect here"),
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha=0.5 has no effect here"),
        ({"ref_model_sync_steps": 5}, "ref_model_sync_steps=5 has no effect here"),
        ({"padding_free": True}, "padding_free=True has no effect here"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        SPINConfig(str(tmp_path), use_cpu=True, **changes)


def test_the_parser_reads_lists_of_a_value_a_round(tmp_path) -> None:
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--num_rounds", "2",
             "--round_betas", "0.1", "5", "--round_learning_rates", "5e-7", "1e-7"]  # fmt: skip
    (config,) = TrlParser(SPINConfig).parse_args_and_config(flags)
    assert config.round_betas == [0.1, 5.0]
    assert config.round_learning_rates == [5e-7, 1e-7]


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_a_truncation_that_never_happens_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="truncation_mode='keep_end' has no effect here"):
        SPINConfig(str(tmp_path), use_cpu=True, truncation_mode="keep_end")


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"loss_type": "ipo"}, "25.0000"),
        ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.5, 0.2]}, "0.5466"),
        ({"loss_type": ["sigmoid", "sft"]}, "not known beforehand"),
        ({"use_weighting": True}, "not known beforehand"),
        ({"ld_alpha": 0.5}, "0.6931"),
        ({"f_divergence_type": "js_divergence"}, "0.6931"),
    ],
)
def test_another_loss_says_what_becomes_of_ln_2(tmp_path, caplog, changes, first) -> None:
    with caplog.at_level(logging.WARNING):
        SPINConfig(str(tmp_path), use_cpu=True, **changes)
    assert f"but the loss then is {first}, where SPIN's" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        SPINConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert caplog.text == ""
