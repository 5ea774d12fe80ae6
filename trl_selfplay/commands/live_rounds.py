"""A table of the rounds of a run that grows while it runs.

In: the events of a trainer over rounds. Out: on a terminal a table that is drawn anew several times a
second, with what is being done below it; elsewhere one line per round.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_selfplay.evaluation.estimates import summarize_heldout
from trl_selfplay.evaluation.progress import SamplingProgress
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.funnel import Funnel
from trl_selfplay.rounds.run import UNTRAINED

HEADER = ("", "right, held out [95 %]", "samples right", "trained on", "took")
_WIDTHS = (10, 23, 15, 15, 5)


class LiveRounds(TrainerCallback):
    """Shows the held-out score of the untrained model and of every round as soon as it is known.

    Args:
        file: Where it is shown; a terminal gets a live table if rich is installed.
        expected: How long the run takes, in words, such as "5 minutes".
        clock: Returns the time in seconds; tests pass their own.
    """

    def __init__(
        self, file: TextIO, expected: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file, self._expected, self._clock = file, expected, clock
        self._started = clock()
        self._rows: list[tuple[str, ...]] = []
        self._doing = "loading the model"
        self._is_live = False

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the rounds while this lasts; the table stays when it ends."""
        if not (self._file.isatty() and _has_rich()):
            self._write(HEADER)
            yield
            return
        from rich.console import Console
        from rich.live import Live

        self._is_live = True
        # What libraries print goes elsewhere, so nothing has to be kept above the table.
        with Live(
            console=Console(file=self._file), get_renderable=self._table, refresh_per_second=4,
            redirect_stdout=False, redirect_stderr=False,
        ) as live:  # fmt: skip
            live.refresh()
            yield
            self._doing = ""

    def on_round_begin(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        round_index: int,
        lines: Sequence[Mapping[str, Any]],
        **kwargs: Any,
    ) -> None:
        """Show the untrained model's score, and in a run that goes on, those of finished rounds."""
        if not self._rows:
            self._add(untrained_row(lines[0]["eval_before"] if lines else _score_before(args)))
            for line in lines:
                self._add(round_row(line))
        self._doing = f"round {round_index}, choosing what to train on"

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far the training of a round is."""
        self._doing = f"training, step {state.global_step} of {state.max_steps}"

    def on_round_end(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        lines: Sequence[Mapping[str, Any]],
        **kwargs: Any,
    ) -> None:
        """Show the round that has ended."""
        self._add(round_row(lines[-1]))
        self._doing = "the last score, on prompts that chose nothing"

    @property
    def doing(self) -> str:
        """What the run is doing, in words, with the share that is done where it is known."""
        progress = SamplingProgress.current
        if progress is None:
            return self._doing
        names = {"held-out": "scoring held-out prompts"}
        what = names.get(progress.description, f"{progress.description}, sampling")
        speed = progress.tokens_per_second
        return f"{what}: {progress.share:.0%}" + (f", {speed:,.0f} tokens/s" if speed else "")

    def _add(self, row: tuple[str, ...]) -> None:
        self._rows.append(row)
        if not self._is_live:
            self._write(row)

    def _elapsed(self) -> str:
        return format_clock(self._clock() - self._started)

    def _write(self, row: tuple[str, ...]) -> None:
        cells = (cell.ljust(width) for cell, width in zip(row, _WIDTHS, strict=True))
        self._file.write(f"{'  '.join(cells).rstrip()}\n")
        self._file.flush()

    def _table(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in HEADER:
            table.add_column(Text(name))
        for row in self._rows:
            table.add_row(*map(Text, row))
        if not self._doing:
            return table
        return Group(table, Text(f"{self._elapsed()} of about {self._expected}: {self.doing}"))


def untrained_row(metrics: Mapping[str, float]) -> tuple[str, ...]:
    """Return the cells of the untrained model."""
    return ("untrained", format_score(metrics), "", "", "")


def round_row(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a finished round; the last is its own time, in whichever process."""
    funnel = Funnel.from_dict(line["funnel"])
    examples = f"{line['examples']:,}"
    if funnel.rationalized:
        examples += f" ({funnel.hinted.kept:,} hinted)"
    return (
        f"round {line['round']}",
        format_score(line["eval"]),
        f"{funnel.correct:,} of {funnel.sampled:,}",
        examples,
        format_clock(sum(line["seconds"].values())),
    )


def format_score(metrics: Mapping[str, float]) -> str:
    """Return the greedy accuracy with its interval."""
    accuracy, low, high = (metrics[f"eval_accuracy{end}"] for end in ("", "_low", "_high"))
    return f"{accuracy:.2f} [{low:.2f}, {high:.2f}]"


def format_clock(seconds: float) -> str:
    """Return minutes and seconds.

    >>> format_clock(83)
    '1:23'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _score_before(args: Any) -> Mapping[str, float]:
    scored = RunFolder.open(args.output_dir).evaluation(UNTRAINED)
    rollouts = [rollout for rollout, set_name in scored if not set_name]
    return summarize_heldout(rollouts, reward_threshold=args.reward_threshold, prefix="eval")


def _has_rich() -> bool:
    from importlib.util import find_spec

    return find_spec("rich") is not None
