"""Which reasoning-gym tasks accept their own answers in the forms that models write?

For each task: ten entries, whose own answers `puzzle_reward` scores behind "Answer:", between
`<answer>` tags, and there again with the metadata as JSON text, as a dataset holds it; and the next
entry's answer and a sentence that is none, which aren't right.

    OMP_NUM_THREADS=1 python benchmarks/puzzles.py

takes about ten minutes on two cores and writes results/puzzles.md.
"""

import argparse
import datetime
import json
import signal
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from trl_selfplay.rewards import puzzle_reward

RESULTS = Path(__file__).parent / "results" / "puzzles.md"
SEED = 42
MOST_SECONDS = 60
FORMS = {"line": "Let me think.\nAnswer: {}", "tags": "Let me think.\n<answer>{}</answer>"}
# Tasks that aren't one: a mixture of others.
NOT_A_TASK = ("composite",)


class TooSlow(Exception):
    """Making a task's entries takes too long."""


def entries_of(task: str, size: int) -> list[dict[str, Any]]:
    """Return entries of a task."""

    def stop(*_: Any) -> None:
        raise TooSlow(f"its entries aren't made within {MOST_SECONDS} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        return list(reasoning_gym.create_dataset(task, size=size, seed=SEED))
    finally:
        signal.alarm(0)


def as_json(entries: Sequence[dict[str, Any]]) -> list[str] | None:
    """Return the metadata as JSON text; None if it isn't representable."""
    try:
        return [json.dumps(entry["metadata"]) for entry in entries]
    except TypeError:
        return None


def try_task(task: str, size: int) -> dict[str, Any]:
    """Return a task's mean scores by form, or what prevents them."""
    try:
        entries = entries_of(task, size)
    except Exception as error:  # whatever a task raises
        return {"reason": f"no entries: {type(error).__name__}: {error}"[:120]}
    golds = [entry["answer"] for entry in entries]
    if any(gold is None for gold in golds):
        return {"reason": "its entries have no answer: many are right"}
    metadata = [entry["metadata"] for entry in entries]
    try:
        reward = puzzle_reward(task, deadline=20.0)
    except ValueError as error:
        return {"reason": str(error)}

    def mean(texts: Sequence[str], rows: Sequence[Any] | None) -> float | None:
        scores = reward(texts, solution=golds, metadata=rows) if rows is not None else [None]
        return None if None in scores else fmean(scores)

    found: dict[str, Any] = {
        name: mean([form.format(gold) for gold in golds], metadata) for name, form in FORMS.items()
    }
    tagged = [FORMS["tags"].format(gold) for gold in golds]
    found["json"] = mean(tagged, as_json(entries))
    others = [
        score
        for score, gold, other in zip(
            reward(tagged[1:] + tagged[:1], solution=golds, metadata=metadata),
            golds,
            golds[1:] + golds[:1],
            strict=True,
        )
        if gold != other
    ]
    found["other"] = max((s for s in others if s is not None), default=None)
    nonsense = [FORMS["tags"].format("I don't know.")] * len(golds)
    scores = reward(nonsense, solution=golds, metadata=metadata)
    found["nonsense"] = max((s for s in scores if s is not None), default=None)
    found["lines"] = any("\n" in str(gold).strip() for gold in golds)
    return found


def why(found: dict[str, Any]) -> str:
    """Return why a task's own answers don't all score 1."""
    if "reason" in found:
        return str(found["reason"])
    if found["tags"] is None:
        return "the scorer raises or hangs on its own answers"
    return f"the scorer gives its own answers {found['tags']:.2f} on average"


def table(found: dict[str, dict[str, Any]], size: int) -> str:
    """Return the result file."""
    right = {task: f for task, f in found.items() if f.get("tags") == 1.0}

    def show(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = [
        f"| {task} | {show(f['line'])} | {show(f['tags'])} | {show(f['json'])} | {show(f['other'])} | {show(f['nonsense'])} |"
        for task, f in right.items()
    ]
    strict = sum(max(f["other"] or 0.0, f["nonsense"] or 0.0) < 1.0 for f in right.values())
    lines = sum(f["lines"] for f in right.values())
    return "\n".join(
        [
            "# Puzzles that accept their own answers",
            "",
            f"{size} entries of each of {len(found)} tasks, seed {SEED}; reasoning-gym "
            f"{version('reasoning-gym')}, two shared x86-64 cores, {datetime.date.today()}. "
            "Script: `benchmarks/puzzles.py`.",
            "",
            f"In {len(right)} tasks all own answers score 1.0 between `<answer>` tags. In "
            f"{sum(f['line'] == 1.0 for f in right.values())} of them they do behind \"Answer:\" as well; "
            f"the others' answers have several lines ({lines} tasks) or are cut at a sign that ends a "
            f"line's answer. In {sum(f['json'] == 1.0 for f in right.values())} they do with the metadata "
            "as JSON text, which turns tuples into lists, as a dataset does. \"Other\" is the highest score "
            "of the next entry's answer where it differs, and the last column that of \"I don't know.\": "
            f"both are below 1.0 in {strict} tasks. A number between 0 and 1 there is partial credit.",
            "",
            '| task | "Answer:" | tags | metadata as JSON | other | no answer |',
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "## Where the own answers don't all score 1, or others do",
            "",
            *(f"- {task}: {why(f)}" for task, f in found.items() if task not in right),
            "",
        ]
    )  # fmt: skip


def main() -> None:
    """Try all tasks, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=10, help="entries per task")
    parser.add_argument("--tasks", nargs="*", default=None, help="some tasks; prints the table")
    args = parser.parse_args()
    tasks = args.tasks or [task for task in sorted(DATASETS) if task not in NOT_A_TASK]
    found = {}
    for task in tasks:
        found[task] = try_task(task, args.size)
        print(task, found[task], flush=True)
    text = table(found, args.size)
    if args.tasks:
        print(text)
    else:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
