"""A reward function that misbehaves once stops a run with what to do, or leaves no trace in it.

Real runs, each in a process of its own, forked from one that has played the run without a fault.
"""

import json
import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import processes
import pytest
from misbehaving_rewards import CASES, FEW, KINDS, Misbehaves
from tiny_models import save_tiny_model
from tiny_rewards import contains_solution
from tiny_runs import build, outcome_of, samples_of

from trl_selfplay.disk import RESUME


def graded(**given: Any) -> list[float]:
    """Grade as `Misbehaves` does without a fault; its name enters the lines of a run."""
    return contains_solution(**given)


def train(folder: str, function: Any) -> None:
    trainer = build(
        "STaR", folder, "source", reward_funcs=function, num_rounds=1, max_steps=2, rationalize=False,
        load_best_round_at_end=False,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)


def try_cases(names: list[str], base: str) -> None:
    """Play a run without a fault, then one for each case; write their exit codes."""
    os.chdir(base)
    save_tiny_model(Path("source"))
    train("whole", graded)
    codes = {}
    for name in names:
        function = Misbehaves(CASES[name].act)
        codes[name] = [_in_fork(f"{name}.log", name, function)]
        if CASES[name].end in ("stops", "dies"):
            shutil.copytree(name, f"{name}, mended")
            codes[name].append(_in_fork("mended.log", f"{name}, mended", graded))
    Path("codes.json").write_text(json.dumps(codes))


def _in_fork(log: str, folder: str, function: Any) -> int:
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        train(folder, function)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(FEW, marks=pytest.mark.slow, id="few"),
        *(pytest.param([*cases], marks=pytest.mark.full, id=kind) for kind, cases in KINDS.items()),
    ],
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows can't fork")
def test_a_run_tells_of_a_function_that_misbehaves_or_ends_as_if_it_had_not(
    names, tmp_path
) -> None:
    assert processes.call(try_cases, names, str(tmp_path)) == 0
    codes = json.loads((tmp_path / "codes.json").read_text())
    whole = outcome_of(tmp_path / "whole")
    found = {name: ending_of(tmp_path, name, codes[name], CASES[name], whole) for name in names}
    assert found == {name: CASES[name].end for name in names}


def ending_of(base: Path, name: str, codes: list[int], case: Any, whole: Any) -> str:
    """Return how a run ended, in the words of a `Case`, or what is wrong."""
    printed = (base / f"{name}.log").read_text(errors="replace")
    told = re.findall("reward function '?graded'? .*", printed)
    if not any(case.says in line for line in told) if case.says else told:
        return f"tells {told}"
    kept, outcome = samples_of(base / name), outcome_of(base / name)
    if len(codes) == 1:
        if codes != [0]:
            return printed[-2000:]
        if outcome == whole:
            return "equal"
        drawn = [
            {shard: [r.completion_ids for r in rollouts] for shard, rollouts in samples.items()}
            for samples in (kept, whole["samples"])
        ]
        return "accepted" if drawn[0] == drawn[1] else "draws other samples"
    ended = outcome_of(base / f"{name}, mended")
    if codes[1] != 0 or ended != whole or not kept or not kept.keys() <= ended["samples"].keys():
        return f"goes on otherwise: {codes}, {[*kept]}"
    if codes[0] == 0:
        return "dies"
    return "stops" if RESUME in printed else "doesn't tell how to go on"
