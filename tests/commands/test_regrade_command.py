"""The command that lets a run grade its samples again."""

from trl_selfplay.commands.dispatch import main
from trl_selfplay.disk import held_by_this_process


def test_the_command_says_what_it_took_back_what_it_kept_and_how_to_go_on(
    write_folder, make_rollout, capsys
) -> None:
    rounds = [[(make_rollout(round_index=i, environment_reward=1.0), "kept")] for i in range(3)]
    folder = write_folder(rounds, evaluations={-1: [make_rollout(phase="eval")]})
    (folder / "_rounds" / "round-000" / "model").mkdir()
    assert main(["regrade", str(folder), "--round", "1"]) == 0
    said = capsys.readouterr().out
    assert "Round 1: 1 sample is kept, without its score." in said
    assert "environments gave" in said
    assert "round 0 keeps its scores and weights" in said
    assert f"Moved to {folder / '_rounds_aside'}" in said
    assert "\n  rounds.jsonl\n  round-002\n  round-001/selection.parquet\n" in said
    assert "resume with train(resume_from_checkpoint=True)" in said
    assert main(["regrade", str(folder), "--round", "0"]) == 0
    said = capsys.readouterr().out
    assert "Held-out samples of the untrained model: 1, likewise." in said
    assert f"Moved to {folder / '_rounds_aside_2'}" in said


def test_a_second_call_says_that_nothing_is_left_to_take_back(
    write_folder, make_rollout, capsys
) -> None:
    samples = [(make_rollout(sample_index=n), "kept") for n in range(3)]
    folder = write_folder([samples], evaluations={-1: [make_rollout(phase="eval")]})
    command = ["regrade", str(folder), "--round", "0"]
    assert main(command) == 0
    assert "Round 0: 3 samples are kept, without their scores." in capsys.readouterr().out
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("Round 0: nothing is left to take back: its 3 samples have no scores.")
    assert "resume with train(" in said
    assert "Moved" not in said
    assert not (folder / "_rounds_aside_2").exists()


def test_a_round_of_which_nothing_followed_says_where_the_copies_are(
    write_folder, make_rollout, capsys
) -> None:
    folder = write_folder([[(make_rollout(), "kept")]], finished=0)
    (folder / "_rounds" / "round-000" / "selection.parquet").unlink(missing_ok=True)
    assert main(["regrade", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"In {folder / '_rounds_aside'} are copies of the samples as they were." in said
    assert "Moved" not in said


def test_what_cannot_be_graded_again_ends_with_the_exit_code(
    write_folder, make_rollout, capsys, tmp_path
) -> None:
    assert main(["regrade", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    folder = write_folder([[(make_rollout(), "kept")]])
    assert main(["regrade", str(folder)]) == 2
    assert "Say with --round which is the first" in capsys.readouterr().err
    with held_by_this_process(folder):  # as a run that trains does
        assert main(["regrade", str(folder), "--round", "0"]) == 1
    assert "another process is training into" in capsys.readouterr().err
    assert main(["samples", str(folder)]) == 0
    assert "kept" in capsys.readouterr().out
