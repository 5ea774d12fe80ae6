"""The command line `trl-selfplay`: find the command, run it, return its exit code.

In: the arguments behind `trl-selfplay`. Out: 0, or 1 after a run that ended with an error, 2 after wrong
use, 130 after Ctrl-C, 143 after SIGTERM. A command's module is imported only when the command is called.
"""

import difflib
import logging
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module

from trl_selfplay.commands.endings import exit_code_of, tell_error, tell_pause
from trl_selfplay.commands.recipes import run_recipe


@dataclass(frozen=True, slots=True)
class Command:
    """A line of the table of commands.

    Attributes:
        group: The heading that it is listed under.
        summary: What it does, in one line.
        target: A recipe's file name, such as "star.py"; or "module:function", a function that takes the
            flags and returns the exit code.
    """

    group: str
    summary: str
    target: str

    @property
    def is_recipe(self) -> bool:
        """Whether it runs a recipe."""
        return ":" not in self.target

    def run(self, flags: list[str]) -> int:
        """Run it with these flags and return the exit code."""
        if self.is_recipe:
            return run_recipe(self.target, flags)
        module, _, function = self.target.partition(":")
        return getattr(import_module(module), function)(flags)


_TRAIN, _BEFORE, _AFTER = "Train", "Before a run", "Look at a run, and use what it sampled"

COMMANDS: dict[str, Command] = {
    "demo": Command(
        _TRAIN, "watch a small model learn on this machine", "trl_selfplay.commands.demo:run"
    ),
    "star": Command(_TRAIN, "STaR: rationales that reach the right answer", "star.py"),
    "rest_em": Command(_TRAIN, "ReST^EM: all that the verifier accepts", "rest_em.py"),
    "rest": Command(_TRAIN, "ReST: Improve steps with rising reward thresholds", "rest.py"),
    "rest_react": Command(_TRAIN, "ReST meets ReAct: trajectories with tools", "rest_react.py"),
    "rft": Command(_TRAIN, "RFT: distinct right reasoning paths, one round", "rft.py"),
    "irpo": Command(_TRAIN, "IRPO: right against wrong completions, with DPO", "irpo.py"),
    "spin": Command(_TRAIN, "SPIN: the data against the model's own completions", "spin.py"),
    "quiet_star": Command(_TRAIN, "Quiet-STaR: a thought before every token", "quiet_star.py"),
    "v_star": Command(_TRAIN, "V-STaR: a verifier from the samples of a run", "v_star.py"),
    "preflight": Command(
        _BEFORE, "check model, data and rewards on a few prompts", "trl_selfplay.commands.preflight:run"
    ),
    "estimate": Command(
        _BEFORE, "tell the memory of a run without loading the model", "trl_selfplay.commands.estimate:run"
    ),
    "audit": Command(
        _BEFORE, "try a reward function on inputs that are known to fool some", "trl_selfplay.commands.audit:run"
    ),
    "report": Command(
        _AFTER, "write one HTML file of a run, finished or not", "trl_selfplay.commands.report:run"
    ),
    "samples": Command(
        _AFTER, "show what was sampled, and why it was dropped", "trl_selfplay.commands.samples:run"
    ),
    "score": Command(
        _AFTER, "measure how much answers depend on kept rationales", "trl_selfplay.commands.score:run"
    ),
    "regrade": Command(
        _AFTER, "let samples be graded again after a wrong reward function", "trl_selfplay.commands.regrade:run"
    ),
    "export": Command(
        _AFTER, "write samples as rows for other trainers", "trl_selfplay.commands.export:run"
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code.

    Args:
        argv: The command's name and its flags; None takes those of the process.
    """
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"trl-selfplay {import_module('trl_selfplay').__version__}")
        return 0
    name = name.replace("-", "_")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(
            f"trl-selfplay: there is no command {name!r}.{hint} `trl-selfplay --help` lists all.",
            file=sys.stderr,
        )
        return 2
    command = COMMANDS[name]
    _quieten()
    try:
        return command.run(flags)
    except KeyboardInterrupt as interrupt:  # or SIGTERM, which is told from it
        code = exit_code_of(interrupt)
        return tell_pause(name, flags, goes_on=command.is_recipe, code=code)
    except Exception as error:
        return tell_error(name, error, trains=command.group == _TRAIN or name == "preflight")


def _quieten() -> None:
    """Leave out what other packages say at every start and a user can do nothing about.

    bitsandbytes misses a kernel for 4-bit weights on a CPU, also where no weight has 4 bits. TRL 1.16
    sets and reads a field that transformers 5.23 has renamed; remove when TRL uses the new name.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
    )
    for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)


def overview() -> str:
    """Return the table of commands."""
    lines = ["Usage: trl-selfplay COMMAND [FLAGS]", ""]
    width = max(map(len, COMMANDS))
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines.append(f"{group}:")
        lines += [
            f"  {name:{width}}  {command.summary}"
            for name, command in COMMANDS.items()
            if command.group == group
        ]
        lines.append("")
    lines.append("`trl-selfplay COMMAND --help` lists the flags of a command.")
    return "\n".join(lines)
