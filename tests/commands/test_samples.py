"""Samples of a run in a terminal."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from run_folders import HOSTILE

from trl_selfplay.commands.dispatch import main
from trl_selfplay.inspection.plain_text import visible
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.inspection.samples_data import collect_samples


def show(capsys, *flags):
    assert main(["samples", *map(str, flags)]) == 0
    return capsys.readouterr().out


@pytest.fixture
def folder(write_folder, make_rollout):
    """Two rounds of four prompts: one wrong, three kept, of which one was hinted."""

    def rollouts(index):
        return [
            (
                make_rollout(
                    prompt_id=f"{i}" * 32, round_index=index, reward=float(i), hinted=i == 3,
                    prompt=f"asks {i}", completion=f"says {index}.{i}",
                ),
                "kept" if i else "failed",
            )
            for i in range(4)
        ]  # fmt: skip

    greedy = [make_rollout(prompt_id="9" * 32, phase="eval", completion="held out")]
    return write_folder([rollouts(0), rollouts(1)], evaluations={-1: greedy, 1: greedy})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "1.0 1.1 1.2 1.3"),  # the newest round
        (["--round", "0"], "0.0 0.1 0.2 0.3"),
        (["--round", "0", "1", "--outcome", "failed"], "0.0 1.0"),
        (["--outcome", "wrong"], "1.0"),  # as it is printed
        (["--hinted", "yes"], "1.3"),
        (["--hinted", "no", "--outcome", "kept"], "1.1 1.2"),
        (["--reward-above", "2"], "1.2 1.3"),
        (["--reward-above", "1", "--reward-below", "2"], "1.1 1.2"),
        (["--prompt", "22"], "0.2 1.2"),  # over the rounds
        (["--limit", "1", "--hinted", "yes", "--round", "0", "1"], "0.3 1.3"),  # of each round
        (["--limit", "0", "--round", "1", "0"], "0.0 0.1 0.2 0.3 1.0 1.1 1.2 1.3"),
    ],
)
def test_flags_choose_samples(folder, capsys, flags, expected) -> None:
    text = show(capsys, folder, *flags)
    assert sorted(re.findall(r"says ([\d.]+)", text)) == expected.split()
    lines = show(capsys, folder, *flags, "--json").splitlines()
    if flags and flags[0] in ("--round", "--prompt"):
        found = [json.loads(line)["completion"].removeprefix("says ") for line in lines]
        assert sorted(found) == expected.split()


def test_a_sample_stands_with_what_became_of_it(folder, capsys) -> None:
    text = show(capsys, folder, "--prompt", "3")
    assert text.splitlines()[:5] == [
        "round 0 · kept · with hint",
        "reward 3 · 3 tokens · ended by itself · prompt 33333333, sample 0",
        "    asks 3",
        "  →",
        "    says 0.3",
    ]


def test_a_trajectory_is_shown_step_by_step(write_folder, make_rollout, capsys) -> None:
    call = {"function": {"name": "search", "arguments": {"query": "\x1b[2J"}}}
    turns = (
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "name": "search", "content": "Error: \x1b]0;taken\x07"},
    )
    ids, mask = (3, 4, 5), (True, False, False)
    rollout = make_rollout(
        completion_ids=ids,
        completion_mask=mask,
        messages=turns,
        halt="malformed",
        num_failed_calls=1,
    )
    run = write_folder([[(rollout, "failed")]])
    facts, *lines = show(capsys, run).splitlines()[1:]
    assert "3 tokens · 1 of them the policy's · ended by a call that can't be read" in facts
    assert lines[-7:-1] == [
        "  [turn 1]",
        "    I look.",
        "  [turn 1, call]",
        r'    search({"query": "\u001b[2J"})',
        "  [failed call of search]",
        r"    Error: \x1b]0;taken\x07",
    ]
    [sample] = map(json.loads, show(capsys, run, "--json").splitlines())
    assert (sample["halt"], sample["messages"]) == ("malformed", list(turns))


CALL = {"function": {"name": "search", "arguments": {}}}
IN_WORDS = "Action: search({})\nObservation:"


@pytest.mark.parametrize(
    ("message", "finish", "end", "steps"),
    [
        ({"tool_calls": [CALL]}, "length", "no room for the next result", ["  [turn 1, call]"]),
        ({"content": IN_WORDS}, "length", "no room for the next result", ["  [turn 1]"]),
        ({"content": "Action: sea"}, "length", "cut by length", ["  →"]),
        ({"content": "yes"}, "eos", "ended by itself", ["  →"]),
    ],
)
def test_a_trajectory_whose_result_had_no_room_says_so(
    write_folder, make_rollout, capsys, message, finish, end, steps
) -> None:
    turn = {"role": "assistant", "content": "", **message}
    rollout = make_rollout(finish=finish, messages=(turn,))
    folder = write_folder([[(rollout, "truncated")]])
    facts, *lines = show(capsys, folder).splitlines()[1:]
    assert f" · {end} · " in facts
    assert [line for line in lines if re.match(r"  [\[→]", line)] == steps
    (sample,) = collect_samples(RunFolder.open(folder), 8).samples
    assert sample["end"] == end
    assert ("steps" in sample) == (steps != ["  →"])


def test_held_out_samples_are_shown_on_request(folder, capsys) -> None:
    assert show(capsys, folder, "--evaluation", "--round", "-1").startswith(
        "untrained · held-out\n"
    )
    lines = show(capsys, folder, "--evaluation", "--json").splitlines()
    assert [json.loads(line)["round"] for line in lines] == [-1, 1]


def test_lines_of_json_hold_the_texts_as_they_are(hostile_run, capsys) -> None:
    text = show(capsys, hostile_run, "--json")
    assert text.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    found = [json.loads(line) for line in text.splitlines()]
    assert {sample["completion"] for sample in found} == {f"so {each}" for each in HOSTILE}
    assert all(sample["rewards"] == {HOSTILE[0]: sample["reward"]} for sample in found)


def read_terminal(command) -> str:
    """Return what a command prints to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, stdin=theirs)
    os.close(theirs)
    pieces = []
    try:
        while piece := os.read(ours, 65536):
            pieces.append(piece)
    except OSError:  # Linux: the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return b"".join(pieces).decode()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_hostile_texts_cant_act_on_a_terminal(hostile_run, is_terminal) -> None:
    """No title, no cleared screen, no reordered text: colours alone are left, and rich's markup is text."""
    command = [sys.executable, "-m", "trl_selfplay", "samples", str(hostile_run), "--limit", "0"]
    if is_terminal:
        text = read_terminal(command)
        assert "\x1b[1;32m" in text  # rich's green
        text = re.sub(r"\x1b\[[\d;]*m", "", text).replace("\r\n", "\n")
    else:
        text = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    assert visible(text) == text
    for each in HOSTILE:
        assert f"    so {visible(each)}\n" in text


def test_a_reader_that_leaves_early_gets_no_message(write_folder, make_rollout) -> None:
    rollouts = [
        (make_rollout(prompt_id=f"{i:032x}", completion="long " * 200), "kept") for i in range(400)
    ]
    folder = write_folder([rollouts])
    with subprocess.Popen(
        [sys.executable, "-m", "trl_selfplay", "samples", str(folder), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline().startswith(b"{")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141  # 128 + SIGPIPE


def test_a_terminal_without_unicode_gets_escapes(folder) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "trl_selfplay", "samples", str(folder), "--prompt", "1"]
    found = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert rb"round 0 \xb7 kept" in found.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--round", "7"], "the run has samples of the rounds [0, 1]"),
        (["--evaluation", "--round", "0"], "the run has held-out samples of the rounds [-1, 1]"),
        (["--outcome", "right"], "invalid choice: 'right'"),
        (["--outcome", "kept", "--evaluation"], "held-out samples have none"),
        (["--limit", "-1"], "--limit -1: give 0 or more"),
    ],
)
def test_wrong_use_says_what_there_is(folder, capsys, flags, message) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["samples", str(folder), *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_no_run_and_no_match_are_told(folder, capsys, tmp_path) -> None:
    assert main(["samples", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["samples", str(folder), "--prompt", "ff"]) == 0
    assert capsys.readouterr().err == "No sample matches.\n"
