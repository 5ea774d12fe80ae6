"""The demo command: what it says before, shows meanwhile and leaves behind; stopped and started again."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from processes import start, wait_for
from transformers import TrainerControl, TrainerState

from trl_selfplay.commands import demo
from trl_selfplay.commands.dispatch import main
from trl_selfplay.commands.live_rounds import LiveRounds
from trl_selfplay.evaluation.progress import SamplingProgress
from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts

SCORES = {"eval_accuracy": 0.25, "eval_accuracy_low": 0.125, "eval_accuracy_high": 0.5}


def make_line(round_index: int) -> dict:
    funnel = Funnel(
        prompts=40,
        prompts_solved=7,
        unhinted=OutcomeCounts(truncated=20, failed=290, kept=10),
        hinted=OutcomeCounts(failed=250, kept=4),
    )
    line = {"round": round_index, "funnel": funnel.to_dict(), "eval": SCORES, "examples": 14}
    line["seconds"] = {"sample": 51.8, "train": 47.8, "evaluate": 16.9}
    return line | ({"eval_before": {**SCORES, "eval_accuracy": 0.125}} if round_index == 0 else {})


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the demo would be, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return Path("selfplay-demo")


@pytest.fixture
def stopped(folder) -> Path:
    """A demo that was stopped after its first round."""
    (folder / "_rounds").mkdir(parents=True)
    (folder / "_rounds/rounds.jsonl").write_text(json.dumps(make_line(0)) + "\n")
    (folder / demo.MARK).write_text(json.dumps({"flags": []}))
    return folder


@pytest.fixture
def finished(stopped) -> Path:
    (stopped / demo.MARK).write_text(json.dumps({"flags": [], "score": 0.375}))
    return stopped


@contextmanager
def terminal(typed: bytes) -> Iterator[None]:
    """A terminal in place of the standard streams, into which this has been typed."""
    ours, theirs = pty.openpty()
    os.write(ours, typed)
    streams = sys.stdin, sys.stdout
    with os.fdopen(theirs) as keyboard, os.fdopen(os.dup(theirs), "w") as screen:
        sys.stdin, sys.stdout = keyboard, screen
        try:
            yield
        finally:
            sys.stdin, sys.stdout = streams
    os.close(ours)


@pytest.mark.parametrize("flags", [[], ["--restart"]])
def test_a_folder_that_holds_something_else_is_left_alone(folder, flags, capsys) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    assert main(["demo", *flags]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (folder / "thesis.tex").read_text() == "mine"


def test_the_working_directory_is_never_deleted(stopped, monkeypatch, capsys) -> None:
    monkeypatch.chdir(stopped)
    assert main(["demo", "--restart", "--output_dir", "."]) == 2
    assert Path("_rounds/rounds.jsonl").exists()


def test_a_stopped_demo_goes_on_and_says_so(stopped, capsys) -> None:
    assert demo._prepare(stopped, [], restart=False)
    assert "was stopped; going on with it" in capsys.readouterr().out
    assert (stopped / "_rounds/rounds.jsonl").exists()


def test_restart_deletes_what_the_stopped_demo_left(stopped) -> None:
    assert demo._prepare(stopped, ["--seed", "1", "--restart"], restart=True)
    assert [path.name for path in stopped.iterdir()] == [demo.MARK]
    assert json.loads((stopped / demo.MARK).read_text()) == {"flags": ["--seed", "1"]}


def test_a_demo_that_is_running_is_not_deleted(stopped, capsys) -> None:
    with demo.held_by_this_process(stopped):
        assert main(["demo", "--restart"]) == 2
    assert "another process is training" in capsys.readouterr().err
    assert (stopped / "_rounds/rounds.jsonl").exists()


def test_a_stopped_demo_with_other_flags_names_those_it_was_begun_with(stopped, capsys) -> None:
    (stopped / demo.MARK).write_text(json.dumps({"flags": ["--seed", "1"]}))
    assert main(["demo"]) == 2
    assert "trl-selfplay demo --seed 1" in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "is_deleted"), [(b"\n", False), (b"r\n", True)])
def test_on_a_terminal_it_asks_what_to_do_with_a_stopped_demo(stopped, typed, is_deleted) -> None:
    with terminal(typed):
        assert demo._prepare(stopped, [], restart=False)
    assert (stopped / "_rounds").exists() is not is_deleted


def test_the_end_of_input_in_place_of_an_answer_changes_nothing(stopped, capsys) -> None:
    with terminal(b"\x04"):
        assert main(["demo"]) == 130
    assert (stopped / "_rounds").exists()
    assert "the same command goes on" in capsys.readouterr().err


def test_a_finished_demo_is_shown_without_running_anything(finished, capsys) -> None:
    (finished / "rounds.png").touch()
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    assert "untrained 0.12 [0.12, 0.50], saved model (round 0's) 0.25 [0.12, 0.50]." in printed
    assert "Other prompts, which had no part in choosing that model: 0.38" in printed
    assert f"Plot: {finished / 'rounds.png'}" in printed


@pytest.mark.parametrize(
    ("scores", "settings", "expected"),
    [
        ((0.5, 0.25), {}, "saved model (round 0's) 0.50"),
        ((0.5, 0.25), {"load_best_round_at_end": False}, "saved model (round 1's) 0.25"),
        ((0.0, 0.0), {}, "saved model (the untrained one) 0.12"),
    ],
)
def test_the_score_after_training_is_that_of_the_saved_model(
    finished, capsys, scores, settings, expected
) -> None:
    lines = [make_line(i) for i in range(2)]
    for line, score in zip(lines, scores, strict=True):
        line["eval"] = {**SCORES, "eval_accuracy": score}
    (finished / "_rounds/rounds.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    (finished / "_rounds/config.json").write_text(json.dumps(settings))
    assert main(["demo"]) == 0
    assert expected in capsys.readouterr().out


def test_a_finished_demo_without_rounds_says_so(finished, capsys) -> None:
    (finished / "_rounds/rounds.jsonl").unlink()
    assert main(["demo"]) == 0
    assert "No round kept anything to train on" in capsys.readouterr().out


def test_the_number_of_threads_is_set_before_torch_is_there() -> None:
    """Which reads it when it is imported; and the introduction shouldn't wait for that."""
    code = "import sys, trl_selfplay.commands.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_missing_is_named_before_anything_begins(folder, monkeypatch, capsys) -> None:
    monkeypatch.setitem(demo._NEEDED, "no_such_package", "pip install it")
    assert main(["demo"]) == 2
    assert "no_such_package missing: pip install it" in capsys.readouterr().err


def test_rounds_appear_line_by_line_where_there_is_no_terminal(tmp_path) -> None:
    with (tmp_path / "shown.txt").open("w") as file:
        rounds = LiveRounds(file, "5 minutes")
        with rounds.shown():
            assert (tmp_path / "shown.txt").read_text().count("\n") == 1
            events = (None, TrainerState(), TrainerControl())
            rounds.on_round_begin(*events, round_index=1, lines=[make_line(0)])
    header, untrained, first = (
        re.split("  +", line) for line in (tmp_path / "shown.txt").read_text().splitlines()
    )
    assert header[1:] == ["right, held out [95 %]", "samples right", "trained on", "took"]
    assert untrained == ["untrained", "0.12 [0.12, 0.50]"]
    assert first == [
        "round 0", "0.25 [0.12, 0.50]", "10 of 320", "14 (4 hinted)", "1:56",
    ]  # fmt: skip


def test_a_terminal_gets_a_table_with_what_is_being_done(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as screen:
        rounds = LiveRounds(screen, "5 minutes")
        with rounds.shown():
            events = (None, TrainerState(), TrainerControl())
            rounds.on_round_begin(*events, round_index=1, lines=[make_line(0)])
            now = [0.0]
            with SamplingProgress(8, "round 1", 50, disable=True, clock=lambda: now[0]) as progress:
                now[0] = 2.0
                progress.decode(100)
                assert rounds.doing == "round 1, sampling: 25%, 50 tokens/s"
            rounds.on_step_end(None, TrainerState(global_step=3, max_steps=10), TrainerControl())
            assert rounds.doing == "training, step 3 of 10"
    shown = b""
    with suppress(OSError):  # what a terminal without a writer ends with
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    shown = shown.decode()
    assert "14 (4 hinted)" in shown
    assert "of about 5 minutes" in shown


def test_what_libraries_print_goes_to_the_log(tmp_path, capfd) -> None:
    with demo._printing_to(tmp_path / "log.txt") as terminal:
        os.write(1, b"progress\n")  # pytest has replaced sys.stdout, which writes there
        os.write(2, b"warning\n")
        terminal.write("shown\n")
    os.write(1, b"after\n")
    assert (tmp_path / "log.txt").read_text() == "progress\nwarning\n"
    assert capfd.readouterr().out == "shown\nafter\n"


def run_demo(folder: str, flags: list[str]) -> None:
    """Run the command in a folder; imported by its name in another process."""
    os.chdir(folder)
    sys.exit(main(["demo", "--smoke", "--seed", "0", *flags]))


def run_demo_until_interrupted(folder: str) -> None:
    """The same, but once the untrained model's score is shown, wait for a signal."""
    begin = LiveRounds.on_round_begin

    def begin_and_wait(self, *args, **kwargs) -> None:
        begin(self, *args, **kwargs)
        signal.pause()

    LiveRounds.on_round_begin = begin_and_wait
    run_demo(folder, [])


def run_in_process(folder: Path, flags: list[str]) -> tuple[int, str]:
    log = folder / "printed.txt"
    log.unlink(missing_ok=True)
    return wait_for(start(run_demo, str(folder), flags, log=log)), log.read_text()


@pytest.mark.slow
def test_the_demo_runs_from_start_to_report_and_is_shown_again(tiny_demo_model, tmp_path) -> None:
    code, printed = run_in_process(tmp_path, [])
    log = tmp_path / "selfplay-demo/log.txt"
    assert code == 0, printed + log.read_text()[-3000:]
    lines = printed.splitlines()
    assert lines[0].startswith("SmolLM2-135M learns to reverse lists of words")
    assert [line.split("  ")[0] for line in lines if re.match("untrained|round", line)] == [
        "untrained", "round 0", "round 1",
    ]  # fmt: skip
    assert "saved model (" in printed
    assert "Other prompts, which had no part in choosing that model: " in printed
    assert "Report: selfplay-demo/report.html" in printed
    assert "<html" in (tmp_path / "selfplay-demo/report.html").read_text()
    assert "round 0: sample from base" in log.read_text()
    assert "round 0: sample from base" not in printed
    code, again = run_in_process(tmp_path, [])
    assert code == 0
    assert "is finished; here is what it found" in again
    assert again.splitlines()[-4:] == lines[-4:]


@pytest.mark.slow
def test_a_demo_that_was_stopped_goes_on_without_sampling_again(tiny_demo_model, tmp_path) -> None:
    seen = tmp_path / "seen"
    os.mkfifo(seen)
    process = start(run_demo_until_interrupted, str(tmp_path), log=seen)
    with seen.open() as lines:
        for line in lines:
            if line.startswith("untrained"):
                os.kill(process.pid, signal.SIGINT)
                break
        said = lines.read()
    assert wait_for(process) == 130, said
    assert "Stopped. What is done is in selfplay-demo: the same command goes on" in said
    assert "Traceback" not in said
    scored = tmp_path / "selfplay-demo/_rounds/before/evaluation/greedy-00000.parquet"
    written = scored.stat().st_mtime_ns
    code, printed = run_in_process(tmp_path, [])
    assert code == 0, printed
    assert "was stopped; going on with it" in printed
    assert scored.stat().st_mtime_ns == written
    rounds = tmp_path / "selfplay-demo/_rounds/rounds.jsonl"
    assert len(rounds.read_text().splitlines()) == 2


@pytest.mark.slow
def test_an_error_ends_the_demo_with_its_message_and_the_log(tiny_demo_model, tmp_path) -> None:
    code, printed = run_in_process(tmp_path, ["--no_such_flag", "1"])
    assert code == 2, printed
    assert "this script doesn't take --no_such_flag 1" in printed
    assert "All that was printed is in selfplay-demo/log.txt" in printed
    assert "Traceback" not in printed
