"""The command `samples`: show in a terminal what a run sampled, and what became of it.

In: flags. Out: samples on standard output, as text or as lines of JSON. What a model wrote can't act on the
terminal: control and invisible characters are shown as escapes.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from trl_selfplay.inspection.charts import OUTCOME_NAMES
from trl_selfplay.inspection.plain_text import visible
from trl_selfplay.inspection.run_folder import UNFINISHED, RunFolder
from trl_selfplay.inspection.sample_choice import choose_samples
from trl_selfplay.inspection.sample_search import SampleSearch, known_rounds
from trl_selfplay.inspection.samples_data import name_outcome
from trl_selfplay.inspection.trajectory import Step, load_decoder, name_end, split_steps
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rounds.run import UNTRAINED

# A round, and those of its samples that are shown with their outcomes.
_RoundSamples = tuple[int, Iterable[tuple[Rollout, str]]]
# Prints text in a style of rich's; the style is left out where there is no rich or no terminal.
_Print = Callable[[str, str], None]

_LIMIT = 10
# Characters of a prompt that are shown unless `--full` is given: its end, which holds the question.
_END_OF_PROMPT = 300
# Machine names by what is printed.
_OUTCOMES = {name_outcome(name): name for name in (*OUTCOME_NAMES, UNFINISHED)}


def run(flags: list[str]) -> int:
    """Show samples and return the exit code."""
    parser = _build_parser()
    args = parser.parse_args(flags)
    if args.limit is not None and args.limit < 0:
        parser.error(f"--limit {args.limit}: give 0 or more.")
    if args.outcome and args.evaluation:
        parser.error("--outcome: held-out samples have none. Leave out one of the two flags.")
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="backslashreplace")
    opened = RunFolder.open(args.output_dir)
    found = _find(parser, args, opened)
    if args.json:
        _print_json(opened, found, args.evaluation)
    else:
        _print_text(opened, found, args.evaluation, is_full=args.full)
    sys.stdout.flush()
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-selfplay samples",
        description="Show what a run sampled, and what became of it: by default of the newest round.",
    )
    parser.add_argument("output_dir", metavar="DIR", help="the output_dir of the run")
    flags: dict[str, dict[str, Any]] = {
        "--round": {
            "type": int,
            "nargs": "+",
            "metavar": "N",
            "help": "these rounds; with --evaluation, -1 is the untrained model",
        },
        "--outcome": {
            "type": lambda text: _OUTCOMES.get(text, text),
            "choices": [*OUTCOME_NAMES, UNFINISHED],
            "metavar": "NAME",
            "help": "those that came to this, by either name: "
            + ", ".join(
                f"{name} ({shown!r})" for shown, name in _OUTCOMES.items() if shown != name
            ),
        },
        "--hinted": {"choices": ["yes", "no"], "help": "those sampled with a hint, or without"},
        "--prompt": {
            "metavar": "ID",
            "help": "those of this prompt, in all rounds; the first digits of its id are enough",
        },
        "--reward-above": {"type": float, "metavar": "X", "help": "with a reward of X or more"},
        "--reward-below": {"type": float, "metavar": "X", "help": "with a reward of X or less"},
        "--evaluation": {"action": "store_true", "help": "held-out samples, not training ones"},
        "--limit": {
            "type": int,
            "metavar": "N",
            "help": "the most of each round, shared among the outcomes; 0 shows all. Default: "
            f"{_LIMIT}; all with --prompt or --json",
        },
        "--full": {"action": "store_true", "help": "show prompts whole, not only their ends"},
        "--json": {"action": "store_true", "help": "lines of JSON, one per sample, of all rounds"},
    }
    for flag, options in flags.items():
        parser.add_argument(flag, **options)
    return parser


def _find(
    parser: argparse.ArgumentParser, args: argparse.Namespace, run: RunFolder
) -> Iterator[_RoundSamples]:
    """Return the samples of each round that is wanted; end where the run has no such round."""
    known = known_rounds(run, args.evaluation)
    for index in args.round or ():
        if index not in known:
            kind = "held-out samples" if args.evaluation else "samples"
            parser.error(f"--round {index}: the run has {kind} of the rounds {known}.")
    everything = args.prompt or args.json
    limit = args.limit if args.limit is not None else 0 if everything else _LIMIT
    search = SampleSearch(
        outcome=args.outcome,
        hinted=None if args.hinted is None else args.hinted == "yes",
        prompt=args.prompt,
        reward_above=args.reward_above,
        reward_below=args.reward_below,
        held_out=args.evaluation,
    )
    for index in args.round or (known if everything else known[-1:]):
        found = search.find(run, index)
        yield index, choose_samples(found, limit).samples if limit else found


def _print_json(run: RunFolder, found: Iterable[_RoundSamples], held_out: bool) -> None:
    for index, samples in found:
        for rollout, outcome in samples:
            fields: dict[str, Any] = {
                "round": index,
                "set" if held_out else "outcome": outcome,
                "prompt_id": rollout.prompt_id,
                "sample_index": rollout.sample_index,
                "hinted": rollout.hinted,
                "finish": rollout.finish,
                "halt": rollout.halt,
                "reward": rollout.reward,
                "rewards": run.scores(rollout),
                "cause": rollout.cause,
                "tokens": len(rollout.completion_ids),
                "prompt": rollout.prompt,
                "completion": rollout.completion,
                "messages": rollout.messages,
            }
            print(json.dumps(fields))  # in ASCII: escapes stand for what could act on a terminal


def _print_text(
    run: RunFolder, found: Iterable[_RoundSamples], held_out: bool, is_full: bool
) -> None:
    show, decode = _printer(), load_decoder(run)
    prompts, count = run.prompts, 0
    for index, samples in found:
        for rollout, outcome in samples:
            count += 1
            steps = split_steps(rollout, decode)
            where = "untrained" if index == UNTRAINED else f"round {index}"
            kind = f"held-out {outcome}".strip() if held_out else name_outcome(outcome)
            head = [where, visible(kind), *(["with hint"] if rollout.hinted else [])]
            reward = "no reward" if rollout.reward is None else f"reward {rollout.reward:g}"
            scores = [
                f"{visible(n)} {'–' if s is None else s}" for n, s in run.scores(rollout).items()
            ]
            facts = [
                reward,
                *(scores if len(scores) > 1 else []),
                *([f"not graded: {visible(rollout.cause)}"] if rollout.cause else []),
                f"{len(rollout.completion_ids)} tokens",
                *([f"{len(rollout.own_ids)} of them the policy's"] if steps else []),
                name_end(rollout),
                f"prompt {rollout.prompt_id[:8]}, sample {rollout.sample_index}",
            ]
            show(" · ".join(head), "bold green" if outcome == "kept" else "bold")
            show(" · ".join(facts), "dim")
            is_cut = not is_full and len(rollout.prompt) > _END_OF_PROMPT
            prompt = f"…{rollout.prompt[-_END_OF_PROMPT:]}" if is_cut else rollout.prompt
            show(_indent(prompt), "cyan")
            for step in steps or [Step("policy", "", rollout.completion)]:
                is_failure = step.writer == "failure"
                show(
                    f"  [{visible(step.name)}]" if step.name else "  →",
                    "red" if is_failure else "dim",
                )
                show(_indent(step.text), "" if step.writer == "policy" else "yellow")
            if prompts is not None and rollout.prompt_id in prompts:
                solution = prompts[rollout.prompt_id].solution
                if solution is not None:
                    show(f"  solution: {visible(str(solution))}", "dim")
            show("", "")
    if not count:
        print("No sample matches.", file=sys.stderr)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in visible(text).split("\n"))


def _printer() -> _Print:
    """Return what prints text: in colours on a terminal if rich is installed."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.text import Text
        except ImportError:
            pass  # rich only adds colours
        else:
            console = Console(highlight=False, markup=False, emoji=False)
            return lambda text, style: console.print(Text(text, style=style), soft_wrap=True)
    return lambda text, _: print(text)
