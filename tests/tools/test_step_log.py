"""What a step log gives back after a kill, damage, or a change of tools."""

import threading
from contextlib import closing

import pytest

from trl_selfplay.tools.record import ToolResult
from trl_selfplay.tools.step_log import Step, StepLog

TURN = Step((1, 2, 3), "stop", -1.5)
RESULTS = ToolResult("add", "7\n\u2028é\ud800", False), ToolResult("add", "Error: no", True)


def write(path, keys=(1, 2), identity="a"):
    with closing(StepLog(path, identity)) as log:
        for key in keys:
            log.add(key, TURN)
        for result in RESULTS:
            for key in keys:
                log.add_result(key, result)
        for key in keys:
            log.add(key, Step((4,), "eos", None))
            log.add_reward(key, 0.5)


def read(path, keys=(1, 2), identity="a"):
    with closing(StepLog(path, identity)) as log:
        return [log.recorded(key) for key in keys]


def test_it_gives_back_what_was_written(tmp_path) -> None:
    write(tmp_path / "log")
    for found in read(tmp_path / "log"):
        assert found.steps == [Step((1, 2, 3), "stop", -1.5, RESULTS), Step((4,), "eos", None)]
        assert found.rewards == [0.5]
    assert read(tmp_path / "log", [3])[0].steps == []


def is_beginning(found, whole):
    """Return whether steps and rewards are the first ones of an undamaged file."""
    for step, other in zip(found.steps, whole.steps, strict=False):
        is_last = step is found.steps[-1]
        assert step.turn_ids == other.turn_ids
        assert other.results[: len(step.results)] == step.results
        assert is_last or step.results == other.results
    return len(found.steps) <= len(whole.steps) and found.rewards in ([], whole.rewards)


@pytest.mark.parametrize("damage", [b"9", b"\n", b"\xff", b""])
def test_damage_shifts_nothing_and_what_it_hides_can_be_written_again(tmp_path, damage) -> None:
    path = tmp_path / "log"
    write(path)
    whole, before = read(path), path.read_bytes()
    for place in range(0, len(before), 29):
        path.write_bytes(before[:place] + damage + before[place + 1 :])
        for found, other in zip(read(path), whole, strict=True):
            assert is_beginning(found, other)
            rest = found.num_events
            with closing(StepLog(path, "a")) as log:
                events = [
                    lambda key: log.add(key, TURN),
                    lambda key: log.add_result(key, RESULTS[0]),
                    lambda key: log.add_result(key, RESULTS[1]),
                    lambda key: log.add(key, Step((4,), "eos", None)),
                    lambda key: log.add_reward(key, 0.5),
                ]
                for event in events[rest:]:
                    event(1 if other is whole[0] else 2)
        assert read(path) == whole


def test_lines_that_a_crash_left_twice_or_as_zeros_change_nothing(tmp_path) -> None:
    path = tmp_path / "log"
    write(path)
    whole, before = read(path), path.read_bytes()
    lines = before.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, *lines[1:]]))
    assert read(path) == whole
    path.write_bytes(before + bytes(4096))
    assert read(path) == whole
    write(path, [3])
    assert read(path, [1, 2, 3]) == [*whole, *[whole[0]]]


def test_steps_of_other_tools_are_not_taken_up(tmp_path, caplog) -> None:
    path = tmp_path / "log"
    write(path, identity="a")
    assert [found.steps for found in read(path, identity="b")] == [[], []]
    assert "the tools aren't those with which" in caplog.text
    write(path, identity="b")
    assert read(path, identity="b")[0].rewards == [0.5]
    path.write_bytes(path.read_bytes()[5:])
    caplog.clear()
    assert [found.steps for found in read(path, identity="b")] == [[], []]
    assert "the line that names its tools can't be read" in caplog.text
    path.write_bytes(b"")
    caplog.clear()
    assert read(path)[0].steps == []
    assert not caplog.text


def test_threads_write_whole_lines(tmp_path) -> None:
    path, count = tmp_path / "log", 8
    with closing(StepLog(path)) as log:

        def record(key):
            log.add(key, TURN)
            for number in range(20):
                log.add_result(key, ToolResult("add", str(number) * 1000))

        threads = [threading.Thread(target=record, args=(key,)) for key in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for found in read(path, range(count), ""):
        assert [r.content[0] for r in found.steps[0].results] == [str(n)[0] for n in range(20)]
