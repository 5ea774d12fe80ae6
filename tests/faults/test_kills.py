"""Whenever a run is killed, it goes on to what an uninterrupted run gives (IR-5 for IRPO).

`benchmarks/faults.py` does the same at many random moments.
"""

import signal
from pathlib import Path

import pytest
from fault_events import Fault
from survival import find_difference, run_whole, survive

from trl_selfplay.rollouts.record import load_rollouts

# For each run, where one process after the other is killed, in the order of a round. The file that
# was written last is cut in half where a moment is torn.
KILLS: dict[str, list[Fault]] = {
    "STaR": [
        Fault("rename rendering.json"),
        Fault("sample train", 19, to="group"),
        Fault("rename samples/hint-0.parquet", 2),
        Fault("grade", 3),
        Fault("open .dataset/state.json", torn=True),
        Fault("save checkpoint-0/scheduler.pt", 1, torn=True),
        Fault("rename rounds.jsonl"),
    ],
    "judged STaR": [Fault("sample judge", 150)],
    # On another day after each kill, the first ones before any shard is whole.
    "dated STaR": [
        Fault("open prompts.parquet"),
        Fault("sample train", 5, to="group"),
        Fault("sample train", 20),
        Fault("open .dataset/state.json", torn=True),
    ],
    "ReST^EM": [
        Fault("rename selection.parquet"),
        Fault("save .model/training_args.bin", torn=True),
        Fault("rmtree checkpoint-0", 2),
    ],
    "student": [
        Fault("rename rounds.jsonl"),
        Fault("open student/.dataset/state.json", torn=True),
        Fault("save student/checkpoint-0/optimizer.pt", 1, torn=True),
        Fault("rename student/_rounds/rounds.jsonl"),
    ],
    "ReST^EM with tools": [  # RA-15
        Fault("turn", 5),
        Fault("sample train", 19, to="group"),
        Fault("rename selection.parquet"),
    ],
    "ReST": [Fault("grade", 3), Fault("open checkpoint-0/trainer_state.json", 2, torn=True)],
    "IRPO": [Fault("rename .dataset-unscored"), Fault("sample eval in training", 5)],
    "SPIN": [Fault("step", 2), Fault("rename evaluation/pairs")],
    "V-STaR": [Fault("rename merged"), Fault("saved", 1)],
    "Quiet-STaR": [
        Fault("open checkpoint-0/quiet_star.json", 2, torn=True),
        Fault("save checkpoint-0/optimizer.pt", torn=True),
        Fault("save checkpoint-0/rng_state.pth", torn=True),
        Fault("open checkpoint-0/trainer_state.json", torn=True),
    ],
}


def test_the_suite_has_twenty_kills_over_all_trainers() -> None:
    assert sum(map(len, KILLS.values())) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_ends_like_one_that_never_stopped(name, request) -> None:
    base = request.getfixturevalue("star_base" if name == "V-STaR" else "fault_base")
    whole = run_whole(base, name)
    survivor = survive(base, name, whole, KILLS[name])
    assert survivor.exit_codes == [-signal.SIGKILL] * len(KILLS[name]) + [0]
    assert survivor.difference is None
    if name == "student":
        assert find_difference(whole / "student", base / "student-killed" / "student") is None
    assert [repeated.lost_samples for repeated in survivor.repeated] == [0] * len(KILLS[name])
    if name == "dated STaR":
        assert first_words(whole) == {"1"}  # the template has printed the first process's day


def first_words(folder: Path) -> set[str]:
    paths = folder.glob("_rounds/*/*/*.parquet")
    return {
        r.prompt.split()[0] for p in paths if p.parent.name == "samples" for r in load_rollouts(p)
    }
