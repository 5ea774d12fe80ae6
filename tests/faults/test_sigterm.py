"""At SIGTERM a run keeps what is finished, ends with exit code 143, and goes on as if never stopped."""

import signal
from pathlib import Path

import pytest
from fault_events import Fault
from fault_runs import run
from processes import call_twice
from survival import find_difference, run_whole, survive

from trl_selfplay.termination import EXIT_CODE

STOPS: dict[str, list[Fault]] = {
    "STaR": [
        Fault("sample train", 19),
        Fault("grade", 2),
        Fault("open .dataset/state.json"),
        Fault("step", 1),
        Fault("save checkpoint-0/scheduler.pt"),
        Fault("sample eval", 2),
    ],
    "judged STaR": [Fault("sample judge", 100)],
    "Quiet-STaR": [Fault("step", 1), Fault("save checkpoint-0/optimizer.pt", 1)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_loses_nothing_that_was_finished(name, fault_base) -> None:
    whole = run_whole(fault_base, name)
    stops = [Fault(f.event, f.after, number=signal.SIGTERM) for f in STOPS[name]]
    survivor = survive(fault_base, name, whole, stops)
    assert survivor.exit_codes == [EXIT_CODE] * len(stops) + [0]
    assert survivor.difference is None
    assert [repeated.samples for repeated in survivor.repeated] == [0] * len(stops)
    printed = next(fault_base.glob("*-killed.log")).read_text()
    assert printed.count("complete checkpoints are kept") == len(stops) or name == "Quiet-STaR"
    assert printed.count("resume with train(resume_from_checkpoint=True)") == len(stops)


@pytest.mark.slow
def test_all_processes_of_a_run_stop_and_go_on(fault_base) -> None:
    folders = [str(fault_base / name) for name in ("whole", "stopped")]
    inputs = str(fault_base / "inputs")
    stop = Fault("sample train", number=signal.SIGTERM, to="ranks")
    assert call_twice(run, folders[0], "STaR", inputs, None) == [0, 0]
    assert call_twice(run, folders[1], "STaR", inputs, stop) == [EXIT_CODE] * 2
    assert call_twice(run, folders[1], "STaR", inputs, None) == [0, 0]
    assert find_difference(*map(Path, folders)) is None
