"""How a command ends that doesn't reach its end: with a message where the user can do something.

In: what was raised. Out: a message on stderr and an exit code, or the error itself with its traceback.
"""

import contextlib
import dis
import os
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from traceback import walk_tb
from types import TracebackType

INTERRUPTED = 130  # 128 + SIGINT, as a shell says it
_CLOSED_PIPE = 141  # 128 + SIGPIPE
_OF_FLAGS = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, ImportError
)  # fmt: skip
_YES = ("true", "t", "yes", "y", "1")  # what the parser takes for it
_TRACEBACK = "TRL_SELFPLAY_TRACEBACK"
_PACKAGE = Path(__file__).parent.parent
_RECIPES = _PACKAGE.parent / "recipes"


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code after Ctrl-C, or after SIGTERM, which has its own."""
    return int(getattr(interrupt, "code", INTERRUPTED))


def tell_pause(name: str, flags: list[str], goes_on: bool, code: int = INTERRUPTED) -> int:
    """Say, after Ctrl-C or SIGTERM, how a run goes on; return the exit code.

    Args:
        name: The command's.
        flags: Its flags.
        goes_on: Whether it takes `--resume`.
        code: The exit code.
    """
    if os.environ.get("RANK", "0") != "0":
        return code  # the main process says it
    others, dry_run = _take(flags, "dry_run")
    if goes_on and dry_run.lower() in _YES:
        name, flags, goes_on = "preflight", [name, *others], False
    if name == "preflight":
        said, added = "Interrupted; nothing was trained. Check again with", ""
    elif goes_on:
        said, added = "Paused. Go on with", "--resume"
        flags, _ = _take(flags, "resume")
    else:
        print(f"\ntrl-selfplay {name}: interrupted.", file=sys.stderr)
        return code
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun and accelerate, whose flags aren't known
        print(f"\n{said} the same command{added and ' and ' + added}.", file=sys.stderr)
    else:
        command = shlex.join([*_called_as(), name, *flags, *([added] if added else [])])
        print(f"\n{said}:\n    {command}", file=sys.stderr)
    return code


def _take(flags: list[str], name: str) -> tuple[list[str], str]:
    """Return flags without the yes-or-no flag of a name, and its value; "" if it isn't given."""
    others, value, left = [], "", list(flags)
    while left:
        word = left.pop(0)
        flag, equals, given = word.partition("=")
        if not flag.startswith("--") or flag[2:].replace("-", "_") != name:
            others.append(word)
        elif equals:
            value = given
        else:
            value = left.pop(0) if left and not left[0].startswith("-") else "true"
    return others, value


def _called_as() -> list[str]:
    """Return what was typed before the command's name."""
    typed = sys.orig_argv
    for place, words in enumerate(pairwise(typed)):
        if words == ("-m", "trl_selfplay"):
            return typed[: place + 2]
    return ["trl-selfplay"]


def tell_error(name: str, error: Exception, trains: bool = True) -> int:
    """Print an error's message if it was raised for the user to read; return the exit code.

    Args:
        name: The command's.
        error: What ended it.
        trains: Whether it trains. In other commands a wrong value, or a file that isn't there, can
            only come from the flags.

    Raises:
        Exception: The error itself, if it wasn't, or if TRL_SELFPLAY_TRACEBACK is set.
    """
    if isinstance(error, BrokenPipeError) and _is_stdout_closed():
        return _CLOSED_PIPE
    if os.environ.get(_TRACEBACK) or not _is_meant_for_the_user(error):
        raise error
    is_wrong_use = not trains and isinstance(error, _OF_FLAGS)
    code = 2 if is_wrong_use else getattr(error, "exit_code", 1)
    explained = _explain_connection(error) if _is_of_the_connection(error) else error
    # Where a run stopped, what is kept and how to go on is a note.
    said = "\n".join([f"trl-selfplay {name}: {explained}", *getattr(error, "__notes__", ())])
    print(f"\n{said}", file=sys.stderr)
    if code == 1:
        print(f"({type(error).__name__}; {_TRACEBACK}=1 shows where.)", file=sys.stderr)
    return code


def _is_meant_for_the_user(error: Exception) -> bool:
    """Return whether an error comes from a `raise` of the package's or a recipe's own.

    Of other packages' errors, those about files, connections and missing packages are meant so too.
    What Python raises itself in the package's code, such as for a missing key, is a fault in it.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    if isinstance(error, OSError | ImportError) or _is_of_the_connection(error):
        return True
    path = Path(last.tb_frame.f_code.co_filename)
    return _is_raised(last) and any(path.is_relative_to(folder) for folder in (_PACKAGE, _RECIPES))


def _is_of_the_connection(error: Exception) -> bool:
    """Return whether a request failed without an answer, as the Hub's client raises it.

    Such errors are those of the library under the client, httpx or another, from whose base class the
    client's own errors derive.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError.__bases__) and not isinstance(error, OSError)


def _explain_connection(error: Exception) -> str:
    """Return what couldn't be reached, what to do, and whether the run had begun."""
    address = os.environ.get("HF_ENDPOINT", "the Hub")
    with contextlib.suppress(AttributeError, RuntimeError):  # an error may lack its request
        address = str(error.request.url)  # type: ignore[attr-defined]
    frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    began = not any(
        code.co_name == "__init__" and Path(code.co_filename).is_relative_to(_PACKAGE)
        for code in frames
    )
    lost = "What the run has written is kept." if began else "Nothing was sampled."
    return (
        f"no connection to {address} ({error}). Check the network and HF_ENDPOINT, or work without the "
        f"Hub: leave out --push_to_hub, and name folders as model and dataset. {lost}"
    )


def _is_raised(last: TracebackType) -> bool:
    """Return whether a frame stopped at a `raise` statement."""
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _is_stdout_closed() -> bool:
    """Return whether what reads our output has ended, as in `… | head`."""
    try:
        print(flush=True)  # flushing alone finds nothing where the failed write was the last
    except BrokenPipeError:
        # The interpreter flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
