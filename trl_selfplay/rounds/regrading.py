"""Take scores back, so that a resumed run grades the samples on disk again.

In: the folder of a run whose reward functions were wrong, and the first round with wrong scores. Out: that
round's samples without scores. What followed from them is in a folder beside `_rounds`: its selection, rows
and training, and all later rounds, which sampled with weights that were trained on it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl_selfplay.disk import (
    RESUME,
    DamagedFileError,
    delete,
    naming_damage,
    save_text,
    tell_gone,
    unused_aside,
)
from trl_selfplay.rollouts.record import Rollout, save_rollouts
from trl_selfplay.rollouts.shards import load_shard
from trl_selfplay.rounds.identity import GRADED_ANEW
from trl_selfplay.rounds.mirror import RECORD
from trl_selfplay.rounds.run import UNTRAINED, Run, find_best_round, load_lines

# There while scores are being taken back: which round's, and where to.
_MARKER = "regrade.json"
_COMMAND = "trl-selfplay regrade"
# What the first round's scores decided for the whole run, and graders said of its human completions.
_OF_FIRST_ROUND = ("calibration.json", "gold.parquet", "judgements")
# What was measured of kept completions, and the runs of trackers, whose steps can't go back.
_OF_ANY_ROUND = ("faithfulness.json", "trackers.json")


@dataclass(slots=True)
class Regrade:
    """What has been taken back.

    Attributes:
        round_index: The round whose samples are graded again.
        aside: The folder with what counts no more, by its names below `_rounds`.
        num_samples: Samples of the round, and `num_heldout` held-out ones of the untrained model, that lost
            their scores.
        num_held: Samples of the round, also those that had no score.
        num_environments: Samples that keep what their environment gave as reward.
        moved: Names below `_rounds` of what was moved.
    """

    round_index: int
    aside: Path
    num_samples: int = 0
    num_held: int = 0
    num_heldout: int = 0
    num_environments: int = 0
    moved: list[str] = field(default_factory=list)


def take_scores_back(
    root: Path, config: Mapping[str, Any], round_index: int | None = None
) -> Regrade:
    """Make a run such that it goes on with grading a round's samples.

    Nothing is deleted: what counts no more is moved, and shards are copied before they lose their scores.
    If this is interrupted, the run isn't resumed before it was called again.

    Args:
        root: The run's folder `_rounds`, which no other process may use.
        config: The settings that the run recorded, as `RunFolder` has them.
        round_index: The first round with wrong scores; None: the one under way, if no round is finished.

    Raises:
        ValueError: The samples of that round can't be graded again, or which round isn't clear.
        DamagedFileError: rounds.jsonl can't be read.
    """
    if root.stat().st_dev != root.parent.stat().st_dev:
        raise ValueError(
            f"{root} lies on another disk than {root.parent}, where what counts no more would go. Move the "
            "whole output_dir to one disk first."
        )
    lines, marker = load_lines(root / "rounds.jsonl"), root / _MARKER
    if marker.exists():
        found = _continue(marker, round_index)
    else:
        round_index = _choose_round(root, config, lines, round_index)
        found = Regrade(round_index, unused_aside(root))
        save_text(marker, json.dumps({"round": round_index, "aside": found.aside.name}))
    _take_rounds_back(root, found, lines)
    if found.round_index == 0:
        _take_first_round_back(root, found)
    for name in _OF_ANY_ROUND:
        _move(root / name, root, found)
    if (root.parent / "student" / root.name).exists():  # trained on the last round's mixture
        _move(root.parent / "student", root.parent, found)
    if not config.get("rounds_dir"):  # a store that isn't followed any more has other rounds now
        _move(root.parent / RECORD, root.parent, found)
    delete(marker)
    return found


def refuse_half_regraded(root: Path) -> None:
    """Raise DamagedFileError for a run of which some scores were taken back and others weren't."""
    if (root / _MARKER).exists():
        raise DamagedFileError(
            f"taking back the scores in {root} was interrupted, so some samples have their old scores still. "
            f"Call `{_COMMAND} {root.parent}` again, then {RESUME}."
        )


def _continue(marker: Path, round_index: int | None) -> Regrade:
    """Return what an interrupted call was about."""
    with naming_damage(marker, f"Delete it and call `{_COMMAND}` with --round again."):
        begun = json.loads(marker.read_text())
        found = Regrade(int(begun["round"]), marker.parent.with_name(begun["aside"]))
    if round_index not in (None, found.round_index):
        raise ValueError(
            f"taking back the scores of round {found.round_index} was interrupted. Finish it with --round "
            f"{found.round_index} first."
        )
    return found


def _choose_round(
    root: Path, config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], index: int | None
) -> int:
    """Return the round to grade again.

    Raises:
        ValueError: It isn't given and not clear, or can't be graded again.
    """
    run = _run_of(root, config)
    if config.get("reward_funcs", "") in (None, "None"):  # as text in early versions
        raise ValueError(
            f"the samples in {root.parent} have no scores: this run ({config.get('method')}) has no reward "
            "functions. A verifier or student that was trained on another run's samples is trained anew, in "
            "another output_dir, once that run has graded them again."
        )
    last = len(lines)  # the round under way
    has_begun = _has_samples(run, last)
    sampled = [i for i in range(last + has_begun) if _has_samples(run, i)]
    possible = [str(i) for i in sampled if not _lacks(run, lines, i)]
    choice = f"Rounds that can be graded again: {', '.join(possible) or 'none'}."
    if others := [str(i) for i in sampled if str(i) not in possible]:
        choice += f" Not {', '.join(others)}: a model that the resumed run would load is gone."
    if index is None and lines:
        finished = (
            f"rounds 0 to {last - 1} are finished, and were trained on the scores that they have"
        )
        if last == 1:
            finished = "round 0 is finished, and was trained on the scores that it has"
        raise ValueError(
            f"{finished}. Say with --round "
            "which is the first with wrong scores: 0 where the reward function was wrong from the start. "
            + choice
        )
    index = index or 0
    steps = len(config.get("improve_thresholds") or [1])
    if index % steps and 0 <= index <= last:
        raise ValueError(
            f"round {index} is an Improve step on the samples of round {index - index % steps}: give that round."
        )
    if index < 0:
        raise ValueError(f"--round {index}: rounds are counted from 0. {choice}")
    if index > last or not _has_samples(run, index):
        raise ValueError(f"round {index} has no samples on disk yet. {choice}")
    if lacking := _lacks(run, lines, index):
        raise ValueError(f"round {index} can't be graded again: {lacking}. {choice}")
    return index


def _run_of(root: Path, config: Mapping[str, Any]) -> Run:
    """Return a run as far as its folder tells it."""
    return Run(
        root=root,
        chosen_metric=config.get("metric_for_best_model"),
        loads_best_round=config.get("load_best_round_at_end") is not False
        or "best_round" in config.values(),  # what an alarm does
        keeps_initial_weights=(root / "initial").exists(),
        keeps_every_model=False,
        greater_is_better=config.get("greater_is_better") is not False,
    )


def _has_samples(run: Run, index: int) -> bool:
    """Return whether a round, or before the first one the untrained model, has sampled anything."""
    folders = [run.folder(index) / "samples"]
    if index == 0:
        folders.append(run.folder(UNTRAINED) / "evaluation")
    return any(any(folder.glob("*.parquet")) for folder in folders)


def _lacks(run: Run, lines: Sequence[Mapping[str, Any]], index: int) -> str | None:
    """Return which weights are gone that a round needs which is played again; None if none are."""
    if index == 0:
        return None
    # Loaded also where all samples are there and training starts from the base: hinted ones may follow.
    needed = {index - 1: f"a resumed run loads before round {index}, whether or not it samples"}
    if run.loads_best_round and run.chosen_metric is not None:
        best = find_best_round(run, lines[:index])
        needed.setdefault(best, "are the best before it")
    for number, why in needed.items():
        folder = run.folder(number) / "model"
        if number != UNTRAINED and not folder.exists():
            return (
                f"{folder} is gone, whose weights {why} (without adapters a run keeps the newest and the best "
                "model alone)"
            )
    return None


def _take_rounds_back(root: Path, found: Regrade, lines: Sequence[Mapping[str, Any]]) -> None:
    """Take back the round, but for its samples, and all later ones: what came last goes first."""
    path, index = root / "rounds.jsonl", found.round_index
    if len(lines) > index:
        texts = path.read_text().splitlines(keepends=True)
        save_text(found.aside / path.name, "".join(texts))
        if index:
            save_text(path, "".join(texts[:index]))
        else:
            delete(path)
        found.moved.append(path.name)
    run = _run_of(root, {})
    numbers = [int(folder.name.removeprefix("round-")) for folder in root.glob("round-[0-9]*")]
    for number in sorted(numbers, reverse=True):
        if number > index:
            _move(run.folder(number), root, found)
    folder = run.folder(index)
    for made in sorted(folder.iterdir()) if folder.exists() else ():
        if made.name != "samples":
            _move(made, root, found)
    # Which prompts get hints depends on scores: planned anew around what is sampled.
    _move(folder / "samples" / "hint-plan.json", root, found)
    for path in sorted((folder / "samples").glob("*.parquet")):
        held = _clear(path, root, found)
        found.num_held += len(held)
        found.num_samples += sum(r.is_graded for r in held)
        found.num_environments += sum(r.environment_reward is not None for r in held)


def _take_first_round_back(root: Path, found: Regrade) -> None:
    """Take back what was graded before the first round, and let reward functions be others."""
    evaluation = root / "before" / "evaluation"
    _move(evaluation / "judgements", root, found)
    for path in sorted(evaluation.glob("*.parquet")):
        found.num_heldout += sum(r.is_graded for r in _clear(path, root, found))
    for name in _OF_FIRST_ROUND:
        _move(root / name, root, found)
    config = root / "config.json"
    if config.exists():
        record = json.loads(config.read_text())
        save_text(config, json.dumps({**record, GRADED_ANEW: True}, indent=1, sort_keys=True))


def _clear(path: Path, root: Path, found: Regrade) -> list[Rollout]:
    """Take the scores out of a shard, once it is copied; return the samples as they were.

    Shards of hinted prompts are copied also without scores: those that no longer fail are dropped from
    them when the run goes on.
    """
    held, copy = load_shard(path), found.aside / path.relative_to(root)
    cleared = [replace(r, reward=None, rewards=(), causes=()) for r in held]
    is_new = path.name.startswith("hint-") and not copy.exists()
    if held and (cleared != held or is_new):
        save_rollouts(copy, held)
    if cleared != held:
        save_rollouts(path, cleared)
    return held


def _move(path: Path, root: Path, found: Regrade) -> None:
    """Move a file or folder aside, if it is there."""
    if not path.exists():
        return
    name = path.relative_to(root)
    target = found.aside / name
    target.parent.mkdir(parents=True, exist_ok=True)
    tell_gone(path)
    path.rename(target)
    found.moved.append(name.as_posix())
