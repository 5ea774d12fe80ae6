"""The process of an engine: it starts, passes messages of any size, and is gone at the end."""

import os
import re
import signal
import subprocess
import sys
from collections import deque

import psutil
import pytest
import torch
from engines import StandIn
from patience import ENDS_S

from trl_selfplay.generation.vllm_process import EngineFailure, EngineProcess, engine_environment

ARGUMENTS = {"model": "a-model", "max_num_seqs": 8, "max_model_len": 64, "quantization": None}
CPU = torch.device("cpu")


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


@pytest.fixture
def start(stand_in):
    """Start processes that are ended with the test: `start(python=…, step_patience_s=…)`."""
    started = []

    def start_one(python: str | None = stand_in.python, **patience: float) -> EngineProcess:
        environment = engine_environment(python, CPU, 1)
        patience = {"start_patience_s": ENDS_S, "step_patience_s": ENDS_S, **patience}
        started.append(EngineProcess(python, ARGUMENTS, environment, **patience))
        return started[-1]

    yield start_one
    for process in started:
        process.end(at_once=True)


def adding(count: int, prompt: list[int], **changes) -> dict:
    sampling = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": [],
        "logprobs": 0,
    }
    return {
        "add": [[i, prompt, i, 5] for i in range(count)],
        "sampling": sampling,
        "excluded": [],
        "streams": True,
        "adapter": None,
        **changes,
    }


def family(process: EngineProcess) -> list[psutil.Process]:
    """The watcher, and all that are under it."""
    watcher = psutil.Process(process._process.pid)
    return [watcher, *watcher.children(recursive=True)]


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(map(is_alive, processes))


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(processes: list[psutil.Process]) -> None:
    psutil.wait_procs(processes, timeout=ENDS_S)
    assert are_gone(processes)


def test_messages_larger_than_a_pipe_pass_both_ways(start) -> None:
    process = start()
    prompt = list(range(1000, 2000))
    for number in range(4):  # 8 MB, while the answers of the first are waiting
        process.send(
            adding(400, prompt, add=[[400 * number + i, prompt, i, 60] for i in range(400)])
        )
    tokens, finished = [0] * 1600, set()
    while len(finished) < 1600:
        for name, new, logprobs, is_finished in process.receive():
            assert len(new) == len(logprobs)
            tokens[name] += len(new)
            if is_finished:
                finished.add(name)
    assert tokens == [60] * 1600


def test_all_that_an_engine_has_started_ends_with_it(start, stand_in) -> None:
    stand_in.plan(orphan=True)  # in another session, deaf to SIGTERM
    process = start()
    (note,) = stand_in.notes("orphan")
    members = family(process)
    assert note["orphan"] in [member.pid for member in members]
    process.end()
    assert are_gone(members)
    process.end()


@pytest.mark.parametrize("whom", ["worker", "watcher"])
def test_a_killed_process_leaves_nothing(start, stand_in, whom) -> None:
    process = start()
    members = family(process)
    os.kill(members[whom == "worker"].pid, signal.SIGKILL)
    with pytest.raises(EngineFailure, match=r"was ended by SIGKILL. It printed last:\n.*loading"):
        process.receive()
    assert are_gone(members)


@pytest.mark.parametrize("whom", ["worker", "watcher"])
def test_a_stopped_process_is_noticed_and_ended(start, whom, monkeypatch) -> None:
    monkeypatch.setattr("trl_selfplay.generation.vllm_process._END_PATIENCE_S", 0.5)
    process = start()
    members = family(process)
    process.send(adding(1, [1], add=[[1, [1], 1, 10**9]]))
    process.receive()
    process._patience_s = 0.3
    os.kill(members[1].pid, signal.SIGSTOP)
    if whom == "watcher":
        os.kill(members[0].pid, signal.SIGSTOP)
    with pytest.raises(EngineFailure, match=r"did not finish a step within 0\.3 s"):
        deque(iter(process.receive, None))  # what it has said before
    assert are_gone(members)


def test_a_busy_engine_without_news_says_that_it_is_alive(start) -> None:
    process = start()
    process.send(adding(1, [1], add=[[1, [1], 1, 10**9]], streams=False))
    assert process.receive() == []


def test_a_script_may_stand_between_the_trainer_and_the_interpreter(start, tmp_path, stand_in):
    script = tmp_path / "wrapper"
    script.write_text(f'#!/bin/sh\n{stand_in.python} "$@"\nexit $?\n')  # without `exec`
    script.chmod(0o755)
    process = start(str(script))
    members = family(process)
    assert len(members) == 3
    assert psutil.wait_procs(members, timeout=2.5)[0] == []  # more than the watcher's grace
    process.end()
    assert are_gone(members)


TRAINER = """
import os, sys, time, torch
from trl_selfplay.generation.vllm_process import EngineProcess, engine_environment
python, arguments, message = map(eval, sys.argv[1:])
environment = engine_environment(python, torch.device("cpu"), 1)
process = EngineProcess(python, arguments, environment, 120.0, 120.0)
forked = os.fork()
if forked == 0:
    os.close(1)
    time.sleep(600)
process.send(message)
print(forked, flush=True)
while True:
    process.receive()
"""


def test_an_engine_ends_with_its_parent(stand_in) -> None:
    """Though a process that was forked from the parent holds copies of its pipes."""
    stand_in.plan(orphan=True)
    message = adding(1, [1], add=[[1, [1], 1, 10**9]])
    command = [sys.executable, "-c", TRAINER, *map(repr, (stand_in.python, ARGUMENTS, message))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        forked = psutil.Process(int(trainer.stdout.readline()))
        members = psutil.Process(trainer.pid).children(recursive=True)
        engine = [member for member in members if member != forked]
        assert len(engine) == 3
        trainer.kill()
        wait_until_gone(engine)
        assert forked.is_running()
        forked.kill()


def test_an_interpreter_that_is_not_there_is_an_error(start) -> None:
    with pytest.raises(FileNotFoundError, match="vllm_python='/no/such/python' can't be run"):
        start("/no/such/python")


@pytest.mark.parametrize(
    ("version", "message"),
    [("none", "can't import vLLM"), ("0.31.2", "has vLLM 0.31.2; 0.32 or later is needed")],
)
def test_an_environment_without_a_fitting_vllm_is_an_error(
    start, monkeypatch, version, message
) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", version)
    with pytest.raises(EngineFailure, match=message) as caught:
        start()
    assert not caught.value.may_pass


@pytest.mark.parametrize("version", ["0.32.1.dev7+g1234", "0.100.0", "1.0", "dev"])
def test_later_versions_fit(start, monkeypatch, version) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", version)
    assert start().ready["version"] == version


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("hang", r"did not start within 0\.5 s"),
        ("exit", r"ended with exit code 3. It printed last:\n.*loading.*\n.*the driver is too old"),
        ("raise", "failed: ValueError: architecture NoSuchModel"),
    ],
)
def test_an_engine_that_does_not_start_says_why(start, stand_in, what, message) -> None:
    stand_in.plan(start=what)
    with pytest.raises(EngineFailure, match=message) as caught:
        start(start_patience_s=0.5 if what == "hang" else ENDS_S)
    assert caught.value.may_pass == (what != "raise")
    assert not any(psutil.pid_exists(note["pid"]) for note in stand_in.notes("engine"))


def test_an_engine_sees_the_users_variables_without_those_of_a_launcher(monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "/cache")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    seen = engine_environment("/other/python", CPU, 1)
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(seen)
    assert "PYTHONPATH" not in seen
    assert seen["HF_HOME"] == "/cache"
    assert seen["VLLM_NO_USAGE_STATS"] == "0"  # the user's own
    assert seen["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert engine_environment(None, CPU, 1)["PYTHONPATH"] == "/ours"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in engine_environment(None, CPU, 2)


@pytest.mark.parametrize(
    ("visible", "index", "devices", "seen"),
    [
        (None, 0, 1, "0"),
        (None, 2, 1, "2"),
        ("5,7", 1, 1, "7"),
        ("GPU-a,GPU-b", 0, 1, "GPU-a"),
        (None, 1, 2, "1,0"),
    ],
)
def test_an_engine_is_given_the_trainers_device(monkeypatch, visible, index, devices, seen) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environment = engine_environment(None, torch.device("cuda", index), devices)
    assert environment["CUDA_VISIBLE_DEVICES"] == seen


def test_nothing_is_imported_by_the_worker_but_the_standard_library_and_vllm() -> None:
    """Its environment may lack everything else."""
    from trl_selfplay.generation import vllm_worker

    text = vllm_worker.__loader__.get_data(vllm_worker.__file__).decode()
    imported = re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)
    assert {name for name in imported if name not in sys.stdlib_module_names} == {"vllm"}
