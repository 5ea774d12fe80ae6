"""Programs that attack the sandbox get no right answer, reach nothing, and leave nothing behind."""

import threading
import time

import hostile_programs
import pytest
import torch  # a grader has it loaded, with its threads
from holdings import held
from patience import ENDS_S

from trl_selfplay.rewards.sandbox import ProgramEnded, Ran, Sandbox

DEADLINE_S = 1.0
CORE_PROGRAMS = ("fork bomb", "kill of all", "null pointer", "frames", "exit at once", "daemon")
CORE_FUNCTIONS = ("integer equal to all", "garbage", "patched codec", "exit at once", "deep value")


@pytest.fixture(scope="module")
def sandbox():
    torch.ones(100, 100) @ torch.ones(100, 100)
    before = held()
    made = Sandbox(workers=2)
    with (  # both are started: the deadline is the program's
        made.session("", deadline_s=ENDS_S),
        made.session("", deadline_s=ENDS_S),
    ):
        pass
    yield made
    assert made.run("print(2 * int(input()))", "43210", deadline_s=ENDS_S) == Ran("86420\n", "ok")
    with made.session("def double(x): return 2 * x", deadline_s=ENDS_S) as session:
        assert session.call("double", [43210]).value == 86420
    made.close()
    assert held() <= before


def find_fault(sandbox, kind, source) -> str | None:
    """Return what an attack achieved, or None."""
    started = time.monotonic()
    fault = None
    if kind == "program":
        ran = sandbox.run(source, "43210\n", deadline_s=DEADLINE_S)
        if "escaped" in ran.stdout or ran.stdout.split() == ["86420"]:
            fault = f"it printed {ran.stdout!r}"
    else:
        try:
            with sandbox.session(source, deadline_s=DEADLINE_S) as session:
                called = session.call("double", [43210])
            # As literals, so no == of the program is asked.
            if called.value == 86420:
                fault = f"it returned {called}"
        except ProgramEnded:
            pass
    seconds = time.monotonic() - started
    if seconds > DEADLINE_S + ENDS_S:  # rather than wait for what never ends
        fault = f"it took {seconds:.2f} s"
    return fault


@pytest.mark.parametrize("name", CORE_PROGRAMS)
def test_a_hostile_program_achieves_nothing(sandbox, name) -> None:
    assert find_fault(sandbox, "program", hostile_programs.PROGRAMS[name]) is None


@pytest.mark.parametrize("name", CORE_FUNCTIONS)
def test_a_hostile_function_achieves_nothing(sandbox, name) -> None:
    """VF-6."""
    assert find_fault(sandbox, "function", hostile_programs.FUNCTIONS[name]) is None


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [False, True])
def test_no_attack_of_the_list_achieves_anything(sandbox, swapped) -> None:
    """VF-4, VF-6, VF-7: each from the main thread and, in the other case, from another one."""
    attacks = [("program", *item) for item in hostile_programs.PROGRAMS.items()]
    attacks += [("function", *item) for item in hostile_programs.FUNCTIONS.items()]
    assert len(attacks) >= 100
    faults = {}

    def run(part) -> None:
        for kind, name, source in part:
            fault = find_fault(sandbox, kind, source)
            if fault is not None:
                faults[kind, name] = fault

    other = threading.Thread(target=run, args=(attacks[swapped::2],))
    other.start()
    run(attacks[not swapped :: 2])
    other.join()
    assert faults == {}
