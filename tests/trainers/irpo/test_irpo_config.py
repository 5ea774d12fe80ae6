"""IRPOConfig: the paper's settings, and what can't work."""

import pytest
from trl import TrlParser

from trl_selfplay.trainers.irpo.config import IRPOConfig


@pytest.mark.parametrize(
    ("experiment", "samples", "pairs", "temperatures"),
    [
        ("gsm8k", 30, 10, [0.8, 0.8, 1.3, 1.3]),
        ("arc", 30, 20, [0.8, 0.8, 1.3]),
        ("math", 20, 15, [0.8, 0.8, 1.0]),
    ],
)
def test_the_presets_are_the_papers(tmp_path, experiment, samples, pairs, temperatures) -> None:
    config = IRPOConfig.from_paper(experiment, output_dir=str(tmp_path), use_cpu=True)
    assert (config.num_generations, config.max_per_prompt) == (samples, pairs)
    assert (config.num_rounds, config.round_temperatures) == (len(temperatures), temperatures)
    assert (config.beta, config.nll_coef, config.learning_rate) == (0.1, 1.0, 7e-7)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16
    assert (config.max_steps, config.start_from) == (5000, "previous")
    assert config.precompute_ref_log_probs
    assert not config.deduplicate


def test_overrides_win_over_a_preset(tmp_path) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    longer = IRPOConfig.from_paper("math", num_rounds=5, **settings)
    assert longer.round_temperatures == [0.8, 0.8, 1.0, 1.0, 1.0]
    assert IRPOConfig.from_paper("math", num_rounds=1, **settings).round_temperatures == [0.8]
    same = IRPOConfig.from_paper("gsm8k", temperature=0.7, **settings)
    assert (same.temperature, same.round_temperatures, same.num_rounds) == (0.7, None, 4)
    own = IRPOConfig.from_paper("arc", round_temperatures=[0.5, 0.6, 0.7], **settings)
    assert own.round_temperatures == [0.5, 0.6, 0.7]
    with pytest.raises(ValueError, match=r"no preset 'gsm'; there are \('gsm8k', 'arc', 'math'\)"):
        IRPOConfig.from_paper("gsm", **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": "base"}, "the reference is the policy as it enters"),
        ({"precompute_ref_log_probs": False}, "wrong reference from round 1"),
        ({"disable_dropout": False}, "margins don't begin at 0"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0: the reference's"),
        ({"sync_ref_model": True}, "becomes the policy at the start of the next"),
        ({"loss_type": ["sigmoid", "sft"]}, r"loss_type=\['sigmoid', 'sft'\]: IRPO's loss"),
        ({"loss_weights": [0.5]}, r"loss_weights=\[0.5\]: IRPO's loss"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl': IRPO's loss"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5: IRPO's loss"),
        ({"use_weighting": True}, "use_weighting=True: IRPO's loss"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 has no effect here"),
        ({"padding_free": True}, "padding_free=True has no effect here"),
        ({"history_rounds": 1}, "history_rounds=1 has no effect here"),
        ({"nll_coef": -1.0}, "nll_coef=-1.0"),
        ({"max_per_prompt": 0}, "max_per_prompt=0"),
        ({"temperature": 0.0}, "copies of one completion"),
        ({"reward_weights": []}, r"reward_weights=\[\]"),
        ({"metric_for_best_model": "loss"}, "no held-out loss"),
        ({"loss_type": "grpo"}, "one of GRPOConfig's"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        IRPOConfig(str(tmp_path), use_cpu=True, **changes)


def test_the_parser_reads_its_fields(tmp_path) -> None:
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--nll_coef", "0.5",
             "--max_per_prompt", "4", "--round_temperatures", "0.8", "1.0", "1.3"]  # fmt: skip
    (config,) = TrlParser(IRPOConfig).parse_args_and_config(flags)
    assert (config.nll_coef, config.max_per_prompt) == (0.5, 4)
    assert config.round_temperatures == [0.8, 1.0, 1.3]
    assert config.metric_for_best_model == "eval_accuracy"
