"""The folder of a run: the paths of its rounds, which are finished, and which was best.

In: `output_dir/_rounds`. Out: `Run`, the fixed settings of a run; `RoundProgress`, its current state; and
functions that read and write files other than rollouts. All writes are atomic.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_selfplay.disk import DamagedFileError, save_text
from trl_selfplay.evaluation.monitor import best_round, rounds_without_gain
from trl_selfplay.rounds.plan import RoundPlan

if TYPE_CHECKING:  # readers of a run do without it
    from datasets import Dataset

logger = logging.getLogger(__name__)

UNTRAINED = -1


@dataclass(frozen=True, slots=True)
class Run:
    """The fixed settings of a run: its folders on disk and which models are kept.

    Attributes:
        root: `output_dir/_rounds`.
        chosen_metric: The held-out metric that selects the best round, None without a held-out set.
        loads_best_round: Whether to load the best round's weights at the end.
        keeps_initial_weights: Whether to save the initial weights; False if they can be read again
            from the model's source.
        keeps_every_model: Whether to keep each round's model (adapters), not only the last and best.
        greater_is_better: Whether a higher value of `chosen_metric` is better.
    """

    root: Path
    chosen_metric: str | None
    loads_best_round: bool
    keeps_initial_weights: bool
    keeps_every_model: bool
    greater_is_better: bool = True

    def folder(self, round_index: int) -> Path:
        """Return the folder of a round; that of the untrained model is `before`."""
        return self.root / ("before" if round_index == UNTRAINED else f"round-{round_index:03d}")

    @property
    def warm_up_folder(self) -> Path:
        """The folder of the training before anything is sampled."""
        return self.root / "warm-up"

    @property
    def initial_weights(self) -> Path:
        """The file of the trainable parameters from before round 0."""
        return self.root / "initial" / "trainable.safetensors"

    @property
    def rendering_path(self) -> Path:
        """The record of what renders the prompts, fixed when the run began."""
        return self.root / "rendering.json"

    @property
    def prompts_path(self) -> Path:
        """The training prompts as the dataset has them."""
        return self.root / "prompts.parquet"

    @property
    def calibration_path(self) -> Path:
        """The scores of round 0 that calibrated reward functions are compared with."""
        return self.root / "calibration.json"

    @property
    def lines_path(self) -> Path:
        """The file with one line per finished round."""
        return self.root / "rounds.jsonl"

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The finished rounds' records in order, read from disk.

        Raises:
            DamagedFileError: A line before the last can't be read.
        """
        return load_lines(self.lines_path)


@dataclass(slots=True)
class RoundProgress:
    """The state of one call of `train`, which changes from round to round.

    Attributes:
        plans: One per round of the run.
        warm_up_rows: What to train on before anything is sampled for training, or None.
        lines: Records of the finished rounds, as in rounds.jsonl.
        round_index: The round in progress; None before the first.
        warm_up_steps: Optimizer steps before round 0.
        steps_before: Optimizer steps before the round in progress, the offset of the log.
        pending_logs: Metrics to log once the trackers have started with the parent's training.
        num_examples: Number of selected examples of the round in progress.
        seconds: Wall-clock time of its phases in this process, by name.
        seconds_before: The same of what precedes round 0: "evaluate_before", the scores of the untrained model,
            and "warm_up".
    """

    plans: Sequence[RoundPlan]
    warm_up_rows: "Dataset | None" = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    round_index: int | None = None
    warm_up_steps: int = 0
    steps_before: int = 0
    pending_logs: list[dict[str, float]] = field(default_factory=list)
    num_examples: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    seconds_before: dict[str, float] = field(default_factory=dict)

    def begin(self, round_index: int) -> None:
        """Begin a round."""
        self.round_index = round_index
        self.steps_before = self.warm_up_steps + self.total_steps
        self.num_examples, self.seconds = 0, {}

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all finished rounds."""
        return sum(line["steps"] for line in self.lines)

    def weights_before(self, round_index: int) -> str:
        """Return a name for the weights that a round starts with."""
        if round_index == 0 and self.warm_up_rows is not None:
            return "warm-up"
        return name_of_weights(round_index - 1)


def load_lines(path: Path) -> list[dict[str, Any]]:
    """Return the finished rounds' records, in order.

    Raises:
        DamagedFileError: A line before the last can't be read.
    """
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    texts = path.read_bytes().splitlines()
    for number, text in enumerate(texts):
        try:
            line = json.loads(text)
            if line["round"] != number:
                raise ValueError(f"it is round {line['round']}")
            lines.append(line)
        except (ValueError, LookupError, TypeError) as error:
            if number < len(texts) - 1:
                raise DamagedFileError(
                    f"line {number + 1} of {path} can't be read as that of round {number} "
                    f"({error}): {text[:80]!r}. Bring the file back, or delete this line and those "
                    "after it: their rounds are finished again from what lies in their folders."
                ) from error
            # Cut off in the middle of the last line: its round goes on.
            logger.warning("%s ends in an unfinished line; that round is finished again.", path)
    return lines


def append_line(path: Path, line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> None:
    """Append a line by rewriting all of them, since an interrupted append could leave half a line."""
    save_text(path, "".join(json.dumps(each) + "\n" for each in [*lines, line]))


def name_of_weights(round_index: int) -> str:
    """Return a name for the weights that a round ended with."""
    return "base" if round_index == UNTRAINED else f"round {round_index}"


def find_best_round(run: Run, lines: Sequence[Mapping[str, Any]]) -> int:
    """Return the finished round with the best held-out score, the last one without such scores."""
    history = _heldout_history(run, lines)
    if not history:
        return len(lines) - 1
    return best_round(history, run.greater_is_better)


def has_stalled(run: Run, lines: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Return whether the held-out score has not improved for `patience` rounds."""
    history = _heldout_history(run, lines)
    if patience is None or not history:
        return False
    stalled = rounds_without_gain(history, run.greater_is_better)
    if stalled >= patience:
        logger.warning("stopping: %d rounds in a row without a better held-out score.", stalled)
    return stalled >= patience


def _heldout_history(run: Run, lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return (round, held-out score) of the untrained model and each finished round."""
    metric = run.chosen_metric
    if metric is None or not lines:
        return []
    scored = [(UNTRAINED, lines[0].get("eval_before", {}).get(metric))]
    scored += [(line["round"], line["eval"].get(metric)) for line in lines]
    return [(index, value) for index, value in scored if value is not None]
