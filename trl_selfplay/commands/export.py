"""`trl-selfplay export`: write what a run sampled as rows for other trainers.

In: the flags of the command. Out: a file, one line about it, and the exit code.
"""

import argparse
from pathlib import Path

from trl_selfplay.inspection.export import export_run
from trl_selfplay.inspection.row_forms import FORMS
from trl_selfplay.inspection.run_folder import RunFolder

_KINDS = {
    "sft": "prompt and completion, of what the rounds trained on",
    "dpo": "prompt, chosen and rejected: right against wrong completions of a prompt in a round",
    "kto": "prompt, completion and label: every right and wrong completion",
    "parquet": "every sample with its tokens, rewards, outcome, prompt and solution",
}


def run(flags: list[str]) -> int:
    """Export a run and return the exit code."""
    args = _parser().parse_args(flags)
    if args.kind == "parquet" and args.form is not None:
        _parser().error("--form has no effect on --as parquet, which has one form of its own")
    folder = RunFolder.open(args.run)
    name = folder.output_dir.resolve().name
    default = f"{name}.parquet" if args.kind == "parquet" else f"{name}-{args.kind}.jsonl"
    path = args.out or Path(default)
    form = args.form or "trl"
    count = export_run(folder, args.kind, path, form=form, rounds=args.rounds, overwrite=args.force)
    print(f"{count:,} {'row' if count == 1 else 'rows'} in {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "trl-selfplay export",
        description="Write what a run sampled as rows for other trainers. Prompts are those of the "
        "dataset, without few-shot examples, hints and chat template.",
    )
    parser.add_argument("run", type=Path, metavar="DIR", help="the run's output_dir")
    parser.add_argument(
        "--as",
        dest="kind",
        required=True,
        choices=_KINDS,
        help="; ".join(f"{name}: {text}" for name, text in _KINDS.items()),
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="a file that ends in .jsonl or .parquet; by default the run's name and the kind, in the "
        "current folder",
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="trl (the default): prompt and completion, as text or messages, read by TRL and unsloth; "
        "messages: OpenAI's roles, read by axolotl, LLaMA-Factory and unsloth; sharegpt: "
        "conversations; alpaca: instruction and output",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        nargs="+",
        metavar="N",
        help="export the samples of these rounds alone",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    return parser
