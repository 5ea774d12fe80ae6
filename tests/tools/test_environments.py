"""Environments: one per trajectory, replayed on resume, gone with it."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
from patience import ENDS_S
from processes import start
from simple_tools import (
    Adds,
    Counter,
    Dice,
    Holds,
    Moody,
    ResetsToDict,
    Undescribed,
    Unmakeable,
    add,
)
from test_trajectories import OPTIONS, Script, ask

from trl_selfplay.tools.environments import Environments
from trl_selfplay.tools.react import ReActDialogue
from trl_selfplay.tools.record import ToolCall, ToolResult
from trl_selfplay.tools.trajectories import Trajectories


@pytest.fixture(scope="module")
def counters():
    with closing(Environments(Counter, [add], ENDS_S)) as found:
        yield found


@pytest.fixture(scope="module")
def dice():
    with closing(Environments(Dice, [], ENDS_S)) as found:
        yield found


def children_of(pid):
    """Return the processes that descend from one, itself included."""
    found, pending = [], [pid]
    while pending:
        found.append(pending.pop())
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for task in Path(f"/proc/{found[-1]}/task").glob("*/children"):
                pending += map(int, task.read_text().split())
    return found


def wait_for_end(pids):
    """Return once these processes have ended, whether or not someone reaps them."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)


def increase(by=1):
    return ToolCall("increase", {"by": by})


def test_an_environment_is_described_as_by_grpo_trainer(counters) -> None:
    assert [s["function"]["name"] for s in counters.schemas] == ["add", "die", "hold", "increase"]
    assert counters.schemas_of({}) == counters.schemas
    assert counters.rewarding == {"Counter": frozenset({None})}
    assert counters.has_environments
    assert counters.sources == {"add": add, "environment": Counter}
    assert counters.observation({"start": 4, "prompt": "?"}) == "It stands at 4."


def test_each_trajectory_has_an_environment_of_its_own(counters) -> None:
    one, other = (counters.open({"start": start}, start) for start in (1, 10))
    with closing(one), closing(other):
        told = [s.call(increase(by)).content for s, by in ((one, 2), (other, 3), (one, 4))]
        assert told == ["3", "13", "7"]
        assert one.call(ToolCall("add", {"a": 1, "b": 2})).content == "3"
        processes = {s.call(increase(0)).content.split()[-1] for s in (one, other)}
        assert len(processes) == 2
        assert (one.reward(), other.reward()) == (7.0, 13.0)


def test_an_environment_that_dies_is_gone_and_its_trajectory_goes_on(counters) -> None:
    with closing(counters.open({}, 1)) as session:
        assert session.call(ToolCall("die", {})) == ToolResult(
            "die", "Error: the process died", failed=True, has_ended=True
        )
        result = session.call(increase())
        assert result.failed
        assert result.content == "Error: the environment has ended: the process died"
        assert session.call(ToolCall("add", {"a": 1, "b": 2})).content == "3"
        assert session.reward() is None


def test_recorded_calls_are_repeated_in_a_new_environment(counters) -> None:
    """RA-15."""
    with closing(counters.open({"start": 5}, 1)) as session:
        session.replay(increase(2), ToolResult("increase", "7"))
        session.replay(ToolCall("increase", {"by": "x"}), ToolResult("increase", "Error: …", True))
        session.replay(increase(3), ToolResult("increase", "10"))
        assert session.call(increase(1)).content == "11"
        assert session.reward() == 11.0


def test_what_is_drawn_depends_on_the_row_the_trajectory_and_the_number_of_the_call(dice) -> None:
    def throw(key, times=2, **columns):
        with closing(dice.open(columns, key)) as session:
            return [session.call(ToolCall("throw", {})).content.split() for _ in range(times)]

    assert throw(1) == throw(1)
    assert throw(1)[0][0] == throw(2)[0][0]  # the target is the row's
    assert throw(1)[0][1] != throw(2)[0][1]
    assert throw(1)[0][1] != throw(1)[1][1]
    assert throw(1, row=1)[0][0] != throw(1)[0][0]
    with closing(dice.open({}, 1)) as session:
        first = ToolResult("throw", " ".join(throw(1)[0]))
        session.replay(ToolCall("throw", {}), first)
        assert session.call(ToolCall("throw", {})).content.split() == throw(1)[1]


def test_a_trajectory_does_not_depend_on_its_batch(dice, byte_tokenizer) -> None:
    def respond(text):
        is_last = text.count("Observation:") == len(text.split("Action")[0])
        return "So." if is_last else "Action: throw({})\nObservation:"

    def run(order, batch_size):
        requests = [ask(byte_tokenizer, "Q" * (1 + i % 3), i) for i in order]
        sampler = trajectories(dice, byte_tokenizer).over(
            Script(byte_tokenizer, respond), [{"row": i // 2} for i in order]
        )
        return {order[n]: found for n, found in sampler.sample(requests, OPTIONS, batch_size)}

    together = run(range(6), 6)
    assert together == run([5, 3, 1, 0, 2, 4], 2)
    assert together[4] == run([4], 1)[4]
    assert len({found.messages[1]["content"] for found in together.values()}) == 6


def counts(text):
    number = text.count("Observation:")
    call = f'Action: increase({{"by": {number + 1}}})\nObservation:'
    return call if number < 3 else "So."


def trajectories(environments, tokenizer):
    return Trajectories(environments, ReActDialogue(tokenizer))


def test_trajectories_resume_in_their_environments(counters, byte_tokenizer, tmp_path) -> None:
    """RA-15: and a reward is asked for once."""
    how = trajectories(counters, byte_tokenizer)
    rows = [{"start": 10 * i} for i in range(3)]
    requests = [ask(byte_tokenizer, f"Q{i}", i) for i in range(3)]
    path = tmp_path / "steps.jsonl"

    def run():
        with closing(how.step_log(path)) as log:
            script = Script(byte_tokenizer, counts)
            found = dict(how.over(script, rows, log).sample(requests, OPTIONS, 2))
        return found

    whole = run()
    assert [whole[i].environment_reward for i in range(3)] == [6.0, 16.0, 26.0]
    told = [m["content"] for m in whole[1].messages if m["role"] == "tool"]
    assert told == ["11", "13", "16"]
    header, *lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 * (4 + 3 + 1)
    for kept in range(0, len(lines) + 1, 3):
        path.write_bytes(b"".join([header, *lines[:kept]]))
        assert run() == whole


def test_an_environment_that_has_ended_stays_so_on_resume(
    counters, byte_tokenizer, tmp_path
) -> None:
    """RA-15: wherever the run was interrupted, the policy reads the same."""

    def respond(text):
        acts = ("increase[2]", "die()", "increase[1]", "increase[1]")
        number = text.count("Observation:")
        return f"Action: {acts[number]}\nObservation:" if number < len(acts) else "So."

    how, path = trajectories(counters, byte_tokenizer), tmp_path / "steps.jsonl"

    def run():
        with closing(how.step_log(path)) as log:
            sampler = how.over(Script(byte_tokenizer, respond), [{}], log)
            [(_, found)] = sampler.sample([ask(byte_tokenizer, "Q")], OPTIONS, 1)
        return found

    whole = run()
    ended = "Error: the environment has ended: the process died"
    told = [m["content"] for m in whole.messages if m["role"] == "tool"]
    assert told == ["2", "Error: the process died", ended, ended]
    assert whole.environment_reward is None
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1):
        path.write_bytes(b"".join(lines[:kept]))
        assert run() == whole


def test_closing_a_session_ends_its_reset(tmp_path) -> None:
    path = tmp_path / "pid"
    with closing(Environments(Holds, [], ENDS_S)) as holds, ThreadPoolExecutor() as pool:
        session = holds.open({"file": str(path)}, 1)
        waiting = pool.submit(session.call, ToolCall("go", {}))
        while not path.exists() or not path.read_text():
            time.sleep(0.01)
        session.close()
        assert waiting.result().content == "Error: the process died"  # and not: no answer in time


def test_no_process_is_left_when_sampling_is_stopped(counters, byte_tokenizer, tmp_path) -> None:
    how, path = trajectories(counters, byte_tokenizer), tmp_path / "pid"

    def respond(text):
        if text == "Q1":
            return f"Action: hold[{path}]\nObservation:"
        while not path.exists() or not path.read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    requests = [ask(byte_tokenizer, text, i) for i, text in enumerate(("Q1", "Q2"))]
    sampling = how.over(Script(byte_tokenizer, respond), [{}] * 2).sample(requests, OPTIONS, 2)
    with pytest.raises(KeyboardInterrupt):
        next(sampling)
    wait_for_end([int(path.read_text())])


def sample_until_killed(path):
    environments = Environments(Counter, [], ENDS_S)
    session = environments.open({}, 1)
    session.call(increase())
    Path(path).write_text(" ".join(map(str, children_of(os.getpid()))))
    signal.pause()


def test_no_process_is_left_when_the_run_is_killed(tmp_path) -> None:
    path = tmp_path / "pids"
    run = start(sample_until_killed, str(path))
    while not path.exists() or not (pids := path.read_text().split()):
        time.sleep(0.01)
    assert len(pids) == 3
    run.kill()
    run.join()
    wait_for_end(map(int, pids))


@pytest.mark.parametrize(
    ("factory", "error", "words"),
    [
        (3, TypeError, "give a class"),
        ({}, TypeError, "give a class"),
        (object, ValueError, "need a method `reset`"),
        (Undescribed, ValueError, "'go' can't be described"),
        (Adds, ValueError, "both named 'add'"),
    ],
)
def test_what_cannot_be_an_environment_is_refused_at_once(factory, error, words) -> None:
    with pytest.raises(error, match=words):
        Environments(factory, [add], 5.0)


def test_rows_name_one_of_several_environments() -> None:
    with closing(Environments({"count": Counter, "dice": Dice}, [add], ENDS_S)) as several:
        names = {
            name: [s["function"]["name"] for s in several.schemas_of({"environment": name})]
            for name in ("count", "dice")
        }
        assert names == {"count": ["add", "die", "hold", "increase"], "dice": ["add", "throw"]}
        assert {s["function"]["name"] for s in several.schemas} == {*names["count"], "throw"}
        assert several.rewarding == {"Counter": frozenset({"count"})}
        for columns in ({}, {"environment": "chess"}, {"environment": None}):
            with pytest.raises(ValueError, match=r"there are \['count', 'dice'\]"):
                several.observation(columns)
        with closing(several.open({"environment": "dice"}, 1)) as session:
            assert session.call(increase()).content == (
                "Error: no tool 'increase'; known: add, throw"
            )
            assert session.reward() is None


def test_a_reset_that_fails_or_says_something_else_is_an_error(byte_tokenizer, tmp_path) -> None:
    with closing(Environments(Moody, [], ENDS_S)) as moody:
        with pytest.raises(ValueError, match="its reset failed: LookupError: no mood"):
            moody.observation({"file": None})
        row = {"file": str(tmp_path / "mood")}
        assert moody.observation(row) == "calm"
        assert moody.observation({**row, "other": 1}) == "cross"
        with (
            closing(moody.open(row, 1)) as session,
            pytest.raises(ValueError, match="and something else before"),
        ):
            session.call(ToolCall("sigh", {}))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Unmakeable, "making it failed: LookupError: no key"),
        (ResetsToDict, "its reset failed: TypeError: it returned a dict; expected text, a list"),
    ],
)
def test_an_environment_that_cannot_begin_says_at_which_step(kind, words) -> None:
    with closing(Environments(kind, [], ENDS_S)) as found, pytest.raises(ValueError, match=words):
        found.observation({})


def test_a_reward_that_is_none_is_told_once(caplog) -> None:
    with closing(Environments(Moody, [], ENDS_S)) as moody:
        for key in (1, 2):
            with closing(moody.open({"file": "/dev/null"}, key)) as session:
                assert session.reward() is None
    assert caplog.text.count("get_reward of an environment gave no reward: TypeError") == 1
