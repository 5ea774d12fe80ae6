"""The command that writes a run's report."""

import pytest

from trl_selfplay.commands.dispatch import main


def test_the_command_writes_the_report_and_prints_its_path(
    write_folder, make_rollout, capsys, tmp_path
) -> None:
    one, two = (write_folder([[(make_rollout(), "kept")]], name) for name in ("one", "two"))
    assert main(["report", str(one)]) == 0
    assert capsys.readouterr().out == f"{one / 'report.html'}\n"
    target = tmp_path / "both.html"
    flags = ["--compare", str(two), "--output", str(target), "--samples", "0"]
    assert main(["report", str(one), *flags]) == 0
    assert "Comparison" in target.read_text()


def test_what_is_wrong_is_told_with_the_exit_code(
    write_folder, make_rollout, capsys, tmp_path
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "Pass the output_dir" in capsys.readouterr().err
    folder = write_folder([[(make_rollout(), "kept")]] * 2)
    path = folder / "_rounds" / "rounds.jsonl"
    path.write_text("{}\n" + path.read_text())
    assert main(["report", str(folder)]) == 1
    assert "line 1 of" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder), "--samples", "-1"])
    assert ended.value.code == 2
