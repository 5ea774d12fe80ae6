import logging

import pytest
from trl import GRPOConfig, TrlParser

from trl_selfplay import STaRConfig
from trl_selfplay.trainers.config import SelfPlayConfig


@pytest.mark.parametrize("experiment", ["gsm8k", "commonsense_qa"])
def test_the_growth_preset_has_the_paper_s_steps(tmp_path, experiment) -> None:
    """ST-10: 20 % more each round, capped at round 30's 7,912."""
    config = STaRConfig.from_paper(experiment, output_dir=str(tmp_path), num_rounds=36)
    assert config.round_max_steps[:6] == [40, 48, 57, 69, 82, 99]
    assert config.round_max_steps[29] == 7912
    assert set(config.round_max_steps[30:]) == {7912}


def test_the_linear_preset_has_the_paper_s_steps(tmp_path) -> None:
    """ST-11."""
    config = STaRConfig.from_paper("addition", output_dir=str(tmp_path))
    assert config.num_rounds == 16
    assert config.round_max_steps[:3] == [300, 320, 340]
    assert config.num_prompts_per_round == 10_000


def test_a_preset_is_the_paper_s_optimizer_and_decoding(tmp_path) -> None:
    config = STaRConfig.from_paper("gsm8k", output_dir=str(tmp_path), learning_rate=1e-5)
    assert config.learning_rate == 1e-5  # overrides win
    assert (config.warmup_steps, config.lr_scheduler_type) == (100, "constant_with_warmup")
    assert (config.weight_decay, config.per_device_train_batch_size) == (0.0, 8)
    assert (config.temperature, config.num_generations, config.start_from) == (0.0, 1, "base")
    assert config.packing
    assert STaRConfig.from_paper("gsm8k", output_dir=str(tmp_path)).learning_rate == 1e-6


def test_an_unknown_preset_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no preset 'math'"):
        STaRConfig.from_paper("math", output_dir=str(tmp_path))


def test_every_field_of_ours_has_a_help_text() -> None:
    ours = {*SelfPlayConfig.__dataclass_fields__, *STaRConfig.__annotations__}
    for name in ours:
        assert len(STaRConfig.__dataclass_fields__[name].metadata["help"]) > 20, name


def test_fields_of_grpo_have_its_defaults_where_the_method_gives_none() -> None:
    ours, theirs = STaRConfig.__dataclass_fields__, GRPOConfig.__dataclass_fields__
    for name in (
        "max_completion_length", "top_p", "top_k", "min_p", "repetition_penalty",
        "generation_kwargs", "chat_template_kwargs", "log_completions",
        "num_completions_to_print", "reward_weights",
    ):  # fmt: skip
        assert ours[name].default == theirs[name].default, name


def test_bfloat16_is_off_without_a_gpu_and_one_line_says_so(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert STaRConfig(str(tmp_path), use_cpu=True).bf16 is False
    assert sum("float32" in record.message for record in caplog.records) == 1
    caplog.clear()
    assert STaRConfig(str(tmp_path), use_cpu=True, bf16=False).bf16 is False
    assert not caplog.records


def test_flags_and_yaml_reach_every_kind_of_field(tmp_path) -> None:
    file = tmp_path / "star.yaml"
    file.write_text("num_rounds: 2\nround_learning_rates: [1e-5, 2e-5]\nstop_strings: [a, b]\n")
    flags = ["--config", str(file), "--output_dir", str(tmp_path), "--use_cpu", "--min_p", "0.1",
             "--generation_kwargs", '{"top_k": 5}', "--round_max_steps", "3", "4"]  # fmt: skip
    (config,) = TrlParser((STaRConfig,)).parse_args_and_config(flags)
    assert config.round_learning_rates == [1e-5, 2e-5]
    assert config.stop_strings == ["a", "b"]
    assert config.generation_kwargs == {"top_k": 5}
    assert (config.min_p, config.round_max_steps) == (0.1, [3, 4])
