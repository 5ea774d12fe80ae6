"""`trl-selfplay preflight`: wrong use, and one recipe's dry run to its end, with both exit codes."""

import pytest
from datasets import Dataset, DatasetDict

from trl_selfplay.commands.dispatch import main


def test_help_and_wrong_use(capsys) -> None:
    assert main(["preflight", "--help"]) == 0
    assert "Methods: star, rest_em" in capsys.readouterr().out
    assert main(["preflight"]) == 2
    assert "which method?" in capsys.readouterr().err
    assert main(["preflight", "report"]) == 2
    assert "'report' is no method" in capsys.readouterr().err
    assert main(["preflight", "quiet-star"]) == 2
    assert "--max_steps 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_recipe_s_dry_run_trains_nothing_and_ends_with_its_verdict(
    saved_tiny_model, sums, tmp_path, monkeypatch, capsys
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    DatasetDict({"train": Dataset.from_list(sums(12).to_list())}).save_to_disk(data)
    monkeypatch.setattr(
        "trl_selfplay.demos.script_arguments.load_dataset",
        lambda *a, **k: DatasetDict.load_from_disk(data),
    )
    flags = ["star", "--model_name_or_path", str(saved_tiny_model), "--dataset_name", "sums",
             "--output_dir", str(out), "--use_cpu", "--report_to", "none", "--num_rounds", "1",
             "--dtype", "float32", "--num_generations", "4", "--temperature", "1.0",
             "--rationalize", "false"]  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "two_rewards.py").write_text(
        "def digit(completions, **k): return [float(any(c.isdigit() for c in t)) for t in completions]\n"
        "def never(completions, **k): return [0.0] * len(completions)\n"
    )
    room = ["--max_completion_length", "32"]
    assert main(["preflight", *flags, *room, "--reward_funcs", "two_rewards.digit"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["preflight.json"]
    assert main(["preflight", *flags, *room, "--reward_funcs", "two_rewards.never"]) == 1
    said = capsys.readouterr()
    assert "can't work. The lines with ERROR say why." in said.err
    assert (said.out + said.err).count("nothing to learn from") == 1
