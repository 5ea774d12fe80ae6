"""Check a run on a few prompts before it begins: `trl-selfplay preflight METHOD [FLAGS]`.

In: a method and the flags of its command. Out: what `dry_run=True` prints and `preflight.json` in the
output directory. Exit code 0 if the run can work, with or without warnings, and 1 if not.
"""

import sys

from trl_selfplay.commands.dispatch import COMMANDS

_USAGE = """\
Usage: trl-selfplay preflight METHOD [FLAGS]

Checks a run of METHOD with these flags on a few training prompts, and trains nothing: where
completions end, what the reward functions say of right answers, how often the model is right
already, lengths, examples and steps of a round, memory, time and disk.

Methods: {methods}. `trl-selfplay METHOD --help` lists the flags."""
# Trained in one go on ordinary text: nothing is sampled or graded that could be checked.
_WITHOUT_ROUNDS = "quiet_star"


def run(flags: list[str]) -> int:
    """Run the command of a method with `--dry_run`."""
    trained = [name for name, command in COMMANDS.items() if command.is_recipe]
    methods = [name for name in trained if name != _WITHOUT_ROUNDS]
    usage = _USAGE.format(methods=", ".join(methods))
    name, *others = flags or [""]
    if name in ("-h", "--help"):
        print(usage)
        return 0
    name = name.replace("-", "_")
    if name == _WITHOUT_ROUNDS:
        print(
            "trl-selfplay preflight: Quiet-STaR has no rounds, samples and rewards to check. Run "
            "`trl-selfplay quiet_star` with --max_steps 1 instead; it tells its memory first.",
            file=sys.stderr,
        )
        return 2
    if name not in methods:
        problem = f"{name!r} is no method with rounds" if name else "which method?"
        print(f"trl-selfplay preflight: {problem}\n\n{usage}", file=sys.stderr)
        return 2
    from trl_selfplay.rounds.preflight import PreflightError

    try:
        return COMMANDS[name].run([*others, "--dry_run", "true"])
    except PreflightError:  # its text is in the table
        print(
            "\ntrl-selfplay preflight: a run with these settings can't work. The lines with ERROR say why.",
            file=sys.stderr,
        )
        return 1
    except SystemExit as ended:  # after the dry run, the help or an error
        return int(ended.code or 0)
