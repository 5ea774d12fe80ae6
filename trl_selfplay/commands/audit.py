"""`trl-selfplay audit FUNCTION`: try a reward function on what is known to fool some.

In: a reward function's name or import path, and a dataset's rows. Out: the table of `audit_reward`, and
the exit code.
"""

import argparse
from typing import Any

# Without a dataset. Answers that are numbers; those of other rows are the wrong ones.
_ROWS = [
    {"prompt": f"{a} + {b} = ?", "solution": str(a + b)}
    for a, b in ((3, 4), (12, 9), (25, 17), (40, 61))
]


def run(flags: list[str]) -> int:
    """Audit a reward function; return 0, 1 if something was found, or 2 where the flags are wrong."""
    args = _parser().parse_args(flags)
    from trl_selfplay.rewards.audit import audit_reward

    func, rows = _find_function(args.function), _load_rows(args)
    found = audit_reward(
        func, rows, tolerance=args.tolerance, deadline=args.deadline, max_rows=args.max_rows,
        in_process=args.in_process,
    )  # fmt: skip
    print(found)
    return int(not found.passed)


def _find_function(name: str) -> Any:
    """Return a reward function as the flag `--reward_funcs` takes it."""
    from trl_selfplay.demos.script_arguments import load_reward_func

    found = load_reward_func(name)
    is_model = isinstance(found, str)
    if is_model:
        raise ValueError(f"{name!r} is a reward model; only functions are audited.")
    return found


def _load_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.dataset_name is None:
        return _ROWS
    from trl_selfplay.demos.script_arguments import (
        GradedScriptArguments,
        load_named_dataset,
        prepare,
    )
    from trl_selfplay.disk import refuse_missing_path

    refuse_missing_path(args.dataset_name, "dataset_name")
    rows = load_named_dataset(args.dataset_name, args.split, name=args.dataset_config)
    columns = {"prompt_column": args.prompt_column, "solution_column": args.solution_column}
    chosen = prepare(rows, GradedScriptArguments(**columns))
    for flag, column in columns.items():
        if flag.removesuffix("_column") not in chosen.column_names:
            raise ValueError(
                f"{args.dataset_name} has no column {column!r}; its columns are "
                f"{rows.column_names}. Name the column with --{flag}."
            )
    return [dict(row) for row in chosen.select(range(min(args.max_rows, len(chosen))))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "trl-selfplay audit",
        description="Feed a reward function right answers and completions that aren't any, and show "
        "what scores. Exit code 1 if something scores that shouldn't, or a right answer doesn't.",
    )
    parser.add_argument(
        "function", metavar="FUNCTION", help="my_module:my_reward, or a name such as math_reward"
    )
    parser.add_argument(
        "--dataset_name", help="a folder, file or Hub id with the rows; default: four additions"
    )
    parser.add_argument("--dataset_config")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--solution_column", default="solution")
    parser.add_argument(
        "--max_rows", type=int, default=4, help="how many rows are used, default: 4"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="highest score of a wrong answer, default: 0"
    )
    parser.add_argument(
        "--deadline", type=float, default=30.0, help="seconds per call, default: 30"
    )
    parser.add_argument(
        "--in_process", action="store_true", help="call it here, such as one that holds a model"
    )
    return parser
