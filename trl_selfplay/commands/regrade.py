"""The command `regrade`: let a run grade its samples again, because a reward function was wrong.

In: flags. Out: the run's folder without the scores and what followed from them, and what was done to it on
standard output.
"""

import argparse

from trl_selfplay.disk import RESUME, held_by_this_process
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rounds.mirror import followed_by_store
from trl_selfplay.rounds.regrading import Regrade, take_scores_back


def run(flags: list[str]) -> int:
    """Take the scores back and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="trl-selfplay regrade",
        description="Take back the scores of a round, and what followed from them, so that the run, once it "
        "is resumed with the right reward function, grades the samples again and samples nothing twice. What "
        "counts no more is moved to a folder beside `_rounds`.",
    )
    parser.add_argument("output_dir", metavar="DIR", help="The output_dir of the run.")
    parser.add_argument(
        "--round",
        type=int,
        metavar="N",
        help="The first round with wrong scores; it has to be given once a round is finished. Later rounds "
        "are played anew.",
    )
    args = parser.parse_args(flags)
    opened = RunFolder.open(args.output_dir)
    with (
        held_by_this_process(opened.output_dir),
        followed_by_store(opened.config.get("rounds_dir"), opened.root),
    ):
        opened = RunFolder.open(opened.output_dir)  # as it is now that nobody else changes it
        found = take_scores_back(opened.root, opened.config, args.round)
    print(describe(found))
    return 0


def describe(found: Regrade) -> str:
    """Return what was taken back, what is kept and how the run goes on."""
    number, count = found.round_index, found.num_held
    if not found.aside.exists():
        samples = f"{count} samples have no scores" if count != 1 else "1 sample has no score"
        return (
            f"Round {number}: nothing is left to take back: its {samples}. With the right reward "
            f"function, {RESUME}."
        )
    lines = [
        f"Round {number}: {count} samples are kept, without their scores."
        if count != 1
        else f"Round {number}: 1 sample is kept, without its score."
    ]
    if found.num_heldout:
        lines.append(f"Held-out samples of the untrained model: {found.num_heldout}, likewise.")
    if found.num_environments:
        lines.append("What environments gave as rewards comes from sampling, and is kept.")
    if number == 1:
        lines.append("From before, round 0 keeps its scores and weights.")
    elif number:
        lines.append(f"From before, rounds 0 to {number - 1} keep their scores and weights.")
    if found.moved:
        moved = "".join(f"\n  {name}" for name in found.moved)
        lines.append(
            f"Moved to {found.aside}, beside copies of the samples with their scores:{moved}"
        )
    else:
        lines.append(f"In {found.aside} are copies of the samples as they were.")
    lines.append(
        f"With the right reward function, {RESUME}: round {number} is graded, not sampled."
    )
    return "\n".join(lines)
