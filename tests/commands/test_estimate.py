"""`trl-selfplay estimate`: the same numbers as from `estimate`, from flags."""

import pytest
from peft import LoraConfig

from trl_selfplay import STaRConfig, estimate
from trl_selfplay.commands.dispatch import main


def test_it_tells_what_estimate_tells_of_the_same_settings(saved_tiny_model, capsys) -> None:
    flags = ["--model_name_or_path", str(saved_tiny_model), "--use_peft", "--lora_r", "2"]
    flags += ["--max_length", "64", "--max_completion_length", "16", "--use_cpu"]
    assert main(["estimate", "star", *flags, "--memory", "4GB"]) == 0
    said = capsys.readouterr().out
    config = STaRConfig(max_length=64, max_completion_length=16, use_cpu=True)
    lora = LoraConfig(r=2, task_type="CAUSAL_LM")
    found = estimate(str(saved_tiny_model), config, peft_config=lora, memory=4 * 10**9)
    assert said == f"{found}\nfits into 4.00 GB\n"


def test_what_does_not_fit_ends_with_1_and_advice(saved_tiny_model, capsys) -> None:
    flags = ["--model_name_or_path", str(saved_tiny_model), "--memory", "1 MB", "--device", "cuda"]
    assert main(["estimate", "star", *flags]) == 1
    said = capsys.readouterr().out
    assert "to fit: " in said
    assert said.endswith("doesn't fit into 1.0 MB\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "required: METHOD"),
        (["grpo"], "invalid choice"),
        (["star"], "which model? Give --model_name_or_path"),
        (["star", "--model_name_or_path", "./nowhere"], "there is nothing at"),
        (["star", "--model_name_or_path", "x", "--memory", "12"], "write '12GB'"),
        (["star", "--model_name_or_path", "x", "--beta", "1"], "this script doesn't take --beta 1"),
    ],
)
def test_wrong_flags_end_with_2(flags, said, capsys) -> None:
    try:
        code = main(["estimate", *flags])
    except SystemExit as ended:  # of argparse
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_reward_models_are_counted_by_whichever_flag_they_are_given(
    saved_tiny_model, capsys
) -> None:
    model = str(saved_tiny_model)
    said = {}
    for flag in ("none", "reward_funcs", "eval_reward_funcs", "reward_model_name_or_path"):
        given = [] if flag == "none" else [f"--{flag}", model]
        given += ["--reward_funcs", "exact_reward"] if flag in ("none", "eval_reward_funcs") else []
        flags = ["--model_name_or_path", model, "--device", "cuda", *given]
        assert main(["estimate", "star", *flags]) == 0
        said[flag] = capsys.readouterr().out
    assert len(set(said.values())) == 2
    assert said["none"] != said["reward_funcs"] == said["reward_model_name_or_path"]


@pytest.mark.parametrize("config", [["--config", "qlora_8gb.yaml"], ["--config=qlora_8gb.yaml"]])
def test_a_file_of_the_recipes_is_found_by_its_name(saved_tiny_model, capsys, config) -> None:
    flags = [*config, "--model_name_or_path", str(saved_tiny_model)]
    flags += ["--load_in_4bit", "false"]  # of a model too narrow for it
    assert main(["estimate", "star", *flags, "--device", "cuda"]) == 0
    assert "paged_adamw_8bit" in capsys.readouterr().out
