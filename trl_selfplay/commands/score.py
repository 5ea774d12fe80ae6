"""The command `score`: how much do kept answers depend on the rationales before them?

In: flags. Out: a table on standard output and `_rounds/faithfulness.json`, which the report shows.
"""

import argparse
from typing import Any

from trl_selfplay.inspection.faithfulness import CONDITIONS, FILE_NAME, score_run
from trl_selfplay.inspection.run_folder import RunFolder

_NAMES = {
    "own": "after its own rationale",
    "dropped": "with the rationale dropped",
    "foreign": "after another prompt's rationale",
    "own - dropped": "own - dropped",
    "own - foreign": "own - another's",
}


def run(flags: list[str]) -> int:
    """Score a run and return the exit code."""
    args = _parser().parse_args(flags)
    folder = RunFolder.open(args.output_dir)
    found = score_run(folder, args.model, rounds=args.rounds, limit=args.limit)
    print(format_scores(found))
    print(folder.root / FILE_NAME)
    return 0


def format_scores(found: dict[str, Any]) -> str:
    """Return what `score_run` found as a table: log-probs of the answer, in nats, with intervals."""
    not_split = sum(found["not_split"].values())
    causes = ", ".join(f"{count} {cause}" for cause, count in found["not_split"].items())
    rounds = ", ".join(map(str, found["rounds"]))
    lines = [
        f"{found['tried']} of {found['kept']} kept completions of round {rounds}, scored by {found['model']}",
        f"not scored: {not_split / found['tried']:.0%}" + (f" ({causes})" if causes else ""),
    ]
    for name, group in found["groups"].items():
        lines += [
            "",
            f"{name} (completions: {group['completions']}, prompts: {group['prompts']}): log-prob of the "
            "answer, mean over prompts",
        ]
        for key, label in _NAMES.items():
            if key in group:
                value = group[key]
                sign = "" if key in CONDITIONS else "+"
                text = f"  {label:33}{value['mean']:{sign}8.2f}"
                if "low" in value:  # equal values of all prompts, or a single one, have no interval
                    text += f"  [{value['low']:.2f}, {value['high']:.2f}]"
                lines.append(text)
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-selfplay score",
        description="Measure how much kept answers depend on the rationales before them: the log-prob of the "
        "answer after its own rationale, without it, and after the rationale of another prompt.",
    )
    parser.add_argument("output_dir", metavar="DIR", help="the output_dir of the run")
    parser.add_argument(
        "--model", help="a folder or a name on the Hub; by default the run's final model"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        nargs="+",
        metavar="N",
        help="score what these rounds kept; by default the last one",
    )
    parser.add_argument(
        "--limit",
        type=_positive,
        default=200,
        metavar="N",
        help="score at most this many completions; default: %(default)s",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return number
