"""Recipes as commands: how a run ends, pauses and goes on, and what it prints then."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from processes import start, wait_for

from trl_selfplay.commands.dispatch import main

ROOT = Path(__file__).parent.parent.parent
# A run of seconds in that folder.
FLAGS = [
    *("--model_name_or_path", "./tiny-model", "--dataset_name", "./data", "--output_dir", "out"),
    *("--use_cpu", "--num_rounds", "2", "--num_generations", "4", "--temperature", "1.0"),
    *("--max_completion_length", "8", "--max_steps", "2", "--learning_rate", "1e-2"),
    *("--on_empty_round", "stop", "--report_to", "none"),
]


def _main(arguments, folder) -> None:
    os.setsid()  # as a shell does for what it runs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    sys.exit(main(arguments))


def command(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, BaseProcess]:
    """Run `trl-selfplay` with arguments in a folder; return its exit code and what it printed."""
    log = folder / "printed.txt"
    log.unlink(missing_ok=True)
    process = start(_main, list(arguments), str(folder), log=log, environment=environment)
    return wait_for(process), log.read_text(), process


def lines(folder: Path) -> list[dict]:
    path = folder / "out/_rounds/rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_after_ctrl_c_the_printed_command_goes_on(work_folder) -> None:
    flags = [*FLAGS, "--reward_funcs", "my_rewards.stopped_once"]
    code, printed, process = command(work_folder, "star", *flags)
    assert code == 130
    assert "interrupted in round 1" in printed
    assert [line["round"] for line in lines(work_folder)] == [0]
    assert "Traceback" not in printed
    with suppress(
        ProcessLookupError
    ):  # nothing is left of its group, once all that ends has been reaped
        while True:
            os.killpg(process.pid, 0)
            time.sleep(0.01)
    told = printed[printed.index("Go on with:\n") :].splitlines()[1]
    assert shlex.split(told) == ["trl-selfplay", "star", *flags, "--resume"]

    code, printed, _ = command(work_folder, "star", *flags)
    assert code == 1
    assert "'out' already holds rounds" in printed
    assert "--resume" in printed
    assert "Traceback" not in printed

    code, printed, _ = command(work_folder, *shlex.split(told)[1:])
    assert code == 0, printed
    assert [line["round"] for line in lines(work_folder)] == [0, 1]


@pytest.mark.slow
def test_resume_without_a_run_begins_one(work_folder) -> None:
    flags = [*FLAGS, "--reward_funcs", "my_rewards.contains", "--num_rounds", "1", "--resume"]
    code, printed, _ = command(work_folder, "star", *flags)
    assert code == 0, printed
    assert printed.count("there is nothing to resume in out: the run begins") == 1
    assert [line["round"] for line in lines(work_folder)] == [0]
    assert "gemm_4bit" not in printed
    assert "is deprecated" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        (["--reward_funcs", "my_rewards.broken"], 1, "raised KeyError: 'missing' (line "),
        (["--reward_funcs", "my_rewards.absent"], 1, "my_rewards has no function 'absent'"),
        (["--reward_funcs", "your_rewards.f"], 1, "there is no module 'your_rewards'"),
        (["--reward_funcs", "exact_reward", "--temperature", "-1"], 2, "temperature=-1.0; it must"),
        (["--reward_funcs", "exact_reward", "--nun_rounds"], 2, "did you mean 'num_rounds'?"),
        (["--num_rounds", "x"], 2, "trl-selfplay star: error: argument --num_rounds"),
        (["--model_name_or_path", "./nowhere"], 2, "there is nothing at"),
        (["--dataset_name", "no/such/folder"], 2, "dataset_name='no/such/folder'"),
    ],
)
def test_an_error_of_the_users_is_a_message(work_folder, changes, code, said) -> None:
    ended, printed, _ = command(work_folder, "star", *FLAGS, *changes)
    assert ended == code
    assert said in printed
    assert "Traceback" not in printed
    assert ("TRL_SELFPLAY_TRACEBACK=1 shows where" in printed) is (code == 1)


@pytest.mark.slow
def test_a_traceback_is_shown_on_demand(work_folder) -> None:
    flags = [*FLAGS, "--reward_funcs", "my_rewards.absent"]
    code, printed, _ = command(work_folder, "star", *flags, TRL_SELFPLAY_TRACEBACK="1")
    assert code == 1
    assert "Traceback" in printed


@pytest.mark.slow
def test_a_hub_that_can_t_be_reached_is_a_message_before_anything_is_sampled(work_folder) -> None:
    """In an interpreter of its own, because huggingface_hub reads where the Hub is as it is imported."""
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "none"}
    done = subprocess.run(
        [sys.executable, "-m", "trl_selfplay", "star", *FLAGS, "--reward_funcs", "my_rewards.contains",
         "--push_to_hub", "--hub_model_id", "a/b"],
        cwd=work_folder, check=False, capture_output=True, text=True, timeout=1200,
        env={**os.environ, **hub, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "no connection to http://127.0.0.1:9/" in done.stderr
    assert "Nothing was sampled." in done.stderr
    assert "Traceback" not in done.stderr
