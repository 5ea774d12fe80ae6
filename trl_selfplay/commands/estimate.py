"""`trl-selfplay estimate METHOD`: tell the memory of a run from the flags of its command.

In: a method, its flags and the memory that is free. Out: a table of the phases, what would make the run
fit, and the exit code.
"""

import argparse
import runpy
import sys

from trl_selfplay.commands.dispatch import COMMANDS
from trl_selfplay.commands.recipes import find_config, find_recipe


def run(flags: list[str]) -> int:
    """Estimate a run; return 0, 1 if it doesn't fit, or 2 where the flags are wrong."""
    parser = _parser()
    args, others = parser.parse_known_args(flags)
    from trl_selfplay.demos.script_arguments import WrongFlagsError, model_arguments, reward_models
    from trl_selfplay.estimation.forecast import estimate
    from trl_selfplay.estimation.record import read_bytes, size_text

    # With a dataset, which isn't read, the defaults are the method's own and not the demo's.
    given = [*find_config(others), "--dataset_name", "unread"]
    program = {"COMMAND": f"trl-selfplay estimate {args.method}"}
    recipe = runpy.run_path(str(find_recipe(args.method)), program)
    try:
        script, config, model, _ = recipe["parse_arguments"](given)
        if model.model_name_or_path is None:
            parser.error("which model? Give --model_name_or_path, a Hub id or a folder.")
        memory = None if args.memory is None else read_bytes(args.memory)
        found = estimate(
            model.model_name_or_path,
            config,
            **model_arguments(config, model),
            prompt_length=args.prompt_length,
            row_length=args.row_length,
            memory=memory,
            device=args.device,
            reward_models=reward_models(script),
        )
    except (WrongFlagsError, ValueError) as error:
        print(f"trl-selfplay estimate: {error}", file=sys.stderr)
        return 2
    print(found)
    if memory is None:
        return 0
    verdict = "fits" if found.fits(memory) else "doesn't fit"
    print(f"{verdict} into {size_text(memory)}")
    return int(not found.fits(memory))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "trl-selfplay estimate",
        usage="trl-selfplay estimate METHOD [FLAGS of METHOD] [--memory AMOUNT] …",
        description="Tell how much memory a run takes, phase by phase. Only the model's configuration "
        "is read. `trl-selfplay METHOD --help` lists the flags of a method.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "method",
        metavar="METHOD",
        type=lambda name: name.replace("-", "_"),
        choices=[name for name, command in COMMANDS.items() if command.is_recipe],
        help="such as star",
    )
    parser.add_argument(
        "--memory",
        help="what is free on the device, such as 12GB or 11.5GiB; of an 8 GB card about 7.4GB. If "
        "the run doesn't fit, the table ends with what would make it fit",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: this machine's")
    parser.add_argument("--prompt_length", type=int, help="tokens of the longest prompt")
    parser.add_argument("--row_length", type=int, help="tokens of the longest row of training")
    return parser
