"""Processes that work together notice the end of one, however it ends and whatever they are doing."""

import os
import signal

import peers_process
import pytest
from accelerate import Accelerator
from processes import call_group

from trl_selfplay.peers import check_peers, from_main, shared_counter, together, wait_for_all

KILLED = "process 1 has ended without a word"


def test_one_process_waits_for_no_one() -> None:
    accelerator = Accelerator(cpu=True)
    with together(accelerator):
        wait_for_all(accelerator)
        check_peers()
        counter = shared_counter()
        assert [counter(), counter()] == [0, 1]
        assert from_main(accelerator, "value") == "value"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "meanwhile", "said"),
    [
        ("kill", "wait", KILLED),
        ("kill", "meet", KILLED),
        ("kill", "work", KILLED),
        ("kill", "hang", KILLED),
        ("kill_with_a_child", "wait", KILLED),
        ("fail", "wait", "process 1 stopped (ValueError: row 7 has no solution)"),
        ("fail", "meet", "process 1 stopped (ValueError: row 7 has no solution)"),
    ],
)
def test_the_end_of_one_process_ends_the_other_with_the_reason(
    tmp_path, how, meanwhile, said
) -> None:
    codes = call_group(2, peers_process.end, how, meanwhile, str(tmp_path), 1, logs=tmp_path)
    if how == "kill_with_a_child":
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert codes == [1, 1 if how == "fail" else -signal.SIGKILL]
    assert f"PeerError: {said}" in (printed := (tmp_path / "0").read_text())
    assert "resume with train(resume_from_checkpoint=True)" in printed


@pytest.mark.slow
def test_the_main_process_s_error_reaches_all_others(tmp_path) -> None:
    codes = call_group(3, peers_process.end, "fail", "wait", str(tmp_path), 0, logs=tmp_path)
    assert codes == [1, 1, 1]
    for rank in ("1", "2"):
        assert "PeerError: process 0 stopped (ValueError: row 7" in (tmp_path / rank).read_text()
    assert "PeerError" not in (tmp_path / "0").read_text()


@pytest.mark.slow
def test_any_process_s_end_reaches_those_that_it_has_no_connection_to(tmp_path) -> None:
    codes = call_group(3, peers_process.end, "kill", "work", str(tmp_path), 1, logs=tmp_path)
    assert codes == [1, -signal.SIGKILL, 1]
    for rank in ("0", "2"):
        assert f"PeerError: {KILLED}" in (tmp_path / rank).read_text()


@pytest.mark.slow
def test_processes_that_all_failed_can_work_together_again(tmp_path) -> None:
    assert call_group(3, peers_process.go_on, str(tmp_path), logs=tmp_path) == [0, 0, 0]
    taken = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(3)]
    assert sorted(int(number) for of_rank in taken for number in of_rank) == list(range(50))


@pytest.mark.slow
def test_forked_processes_that_live_on_keep_none_from_leaving(tmp_path) -> None:
    try:
        assert call_group(2, peers_process.leave_with_a_child, str(tmp_path)) == [0, 0]
    finally:
        for path in tmp_path.iterdir():
            os.kill(int(path.read_text()), signal.SIGKILL)
