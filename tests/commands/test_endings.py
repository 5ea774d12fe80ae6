"""Which errors end as a message: those raised for the user to read, and no fault of the package's."""

import os
import signal

import pytest
from huggingface_hub import HfApi, constants

from trl_selfplay.commands import dispatch
from trl_selfplay.commands.endings import tell_error, tell_pause
from trl_selfplay.commands.recipes import find_recipe
from trl_selfplay.demos.script_arguments import load_reward_func
from trl_selfplay.disk import RESUME, DamagedFileError, naming_damage
from trl_selfplay.rounds.log import say_where_interrupted
from trl_selfplay.termination import ends_at_sigterm


def raised(call) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.value


def damaged() -> None:
    with naming_damage("samples.parquet", "Bring it back."):
        raise OSError("cut off")


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: find_recipe("nowhere"), FileNotFoundError),
        (lambda: open("/nowhere/at/all"), FileNotFoundError),  # noqa: PTH123, SIM115
        (damaged, DamagedFileError),
        (lambda: load_reward_func("no_such"), ValueError),
    ],
)
def test_an_error_for_the_user_is_a_message(call, kind, capsys) -> None:
    error = raised(call)
    assert isinstance(error, kind)
    assert tell_error("star", error) == 1
    said = capsys.readouterr().err
    assert f"trl-selfplay star: {error}\n({kind.__name__}; TRL_SELFPLAY_TRACEBACK=1" in said


@pytest.mark.parametrize(
    "call",
    [
        lambda: find_recipe(None),  # Python's own TypeError inside the package
        lambda: {}["missing"],
        lambda: int("no number"),
    ],
)
def test_a_fault_keeps_its_traceback(call) -> None:
    error = raised(call)
    with pytest.raises(type(error)) as again:
        tell_error("star", error)
    assert again.value is error


def break_tracker() -> None:
    with say_where_interrupted(lambda: "in round 3"):
        raise ConnectionError("tracker.example.com does not answer")


def test_the_message_says_what_is_kept_and_how_to_go_on(capsys) -> None:
    assert tell_error("star", raised(break_tracker)) == 1
    _, first, second, _ = capsys.readouterr().err.splitlines()
    assert first == "trl-selfplay star: tracker.example.com does not answer"
    assert second.startswith("The run stopped in round 3. ")
    assert second.endswith(f"{RESUME}.")


def test_a_connection_that_fails_is_a_message_with_the_address(monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error = raised(lambda: HfApi(endpoint="http://127.0.0.1:9").create_repo("me/star", token="x"))
    assert tell_error("star", error) == 1
    said = capsys.readouterr().err
    assert "no connection to http://127.0.0.1:9/api/repos/create (" in said
    assert "leave out --push_to_hub" in said
    assert "What the run has written is kept." in said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--resume", "true", "--output_dir", "x"], "star --output_dir x --resume"),
        (["--resume=True", "--output_dir", "x"], "star --output_dir x --resume"),
        (["--output_dir", "x", "--resume", "false"], "star --output_dir x --resume"),
        (["--resume", "--resume_from_checkpoint", "x"], "star --resume_from_checkpoint x --resume"),
        (["--dry_run", "false", "--seed", "1"], "star --dry_run false --seed 1 --resume"),
        (["--dry_run", "true", "--seed", "1"], "preflight star --seed 1"),
        (["--seed", "1", "--dry-run"], "preflight star --seed 1"),
    ],
)
def test_the_command_told_has_no_value_of_a_flag_left_behind(
    flags, told, monkeypatch, capsys
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert tell_pause("star", flags, goes_on=True) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"    trl-selfplay {told}"


def test_after_ctrl_c_in_a_preflight_it_is_offered_again(monkeypatch, capsys) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert tell_pause("preflight", ["star", "--seed", "1"], goes_on=False) == 130
    said = capsys.readouterr().err
    assert "nothing was trained" in said
    assert said.endswith("\n    trl-selfplay preflight star --seed 1\n")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    tell_pause("preflight", ["star"], goes_on=False)
    assert capsys.readouterr().err.endswith("Check again with the same command.\n")
    tell_pause("report", ["out"], goes_on=False)
    assert capsys.readouterr().err == "\ntrl-selfplay report: interrupted.\n"


def test_a_pause_tells_the_command_that_goes_on(monkeypatch, capsys) -> None:
    monkeypatch.delenv("RANK", raising=False)
    flags = ["--stop_strings", "a b", "--resume", "--output_dir", "out"]
    assert tell_pause("star", flags, goes_on=True) == 130
    said = capsys.readouterr().err
    assert "\n    trl-selfplay star --stop_strings 'a b' --output_dir out --resume\n" in said
    python = ["/envs/a b/python", "-X", "utf8", "-m", "trl_selfplay"]
    monkeypatch.setattr("sys.orig_argv", [*python, "star", *flags])
    assert tell_pause("star", ["--output_dir", "out"], goes_on=True) == 130
    expected = "'/envs/a b/python' -X utf8 -m trl_selfplay star --output_dir out --resume\n"
    assert expected in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert tell_pause("star", flags, goes_on=True) == 130
    assert "the same command and --resume" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert tell_pause("star", flags, goes_on=True) == 130
    assert capsys.readouterr().err == ""


def terminate() -> None:
    with ends_at_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_command_that_sigterm_ends_has_its_exit_code(monkeypatch, capsys) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(dispatch, "run_recipe", lambda recipe, flags: terminate())
    assert dispatch.main(["star", "--output_dir", "x"]) == 143
    assert capsys.readouterr().err.endswith("\n    trl-selfplay star --output_dir x --resume\n")
