"""The folder of a run as a reader sees it: its rounds, settings and samples, finished or not.

In: an `output_dir`, also while a run writes into it, and of runs of earlier versions. Out: `RunFolder`, with
the lines of rounds.jsonl, the settings, and each round's rollouts with their outcomes, read shard by shard.
Nothing is written.
"""

import ast
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from trl_selfplay.disk import BRING_BACK, naming_damage
from trl_selfplay.rollouts.kept_prompts import KeptPrompts, load_prompts
from trl_selfplay.rollouts.record import Rollout, load_rollouts
from trl_selfplay.rollouts.sequence import StoredShard
from trl_selfplay.rollouts.shards import read_plan, sampled_prefixes
from trl_selfplay.rollouts.stored import read_history, read_selection, refuse_lost_hints
from trl_selfplay.rounds.run import UNTRAINED, load_lines

logger = logging.getLogger(__name__)

# The outcome of a rollout that nothing has been decided about.
UNFINISHED = "unfinished"
# What a run's end leaves in its output directory: the final model.
_FINAL_MODEL = ("config.json", "adapter_config.json")


class RunFolder:
    """A run on disk. Lines and settings are read when it is opened, samples when they are asked for.

    Attributes:
        output_dir: The run's output directory.
        root: `output_dir/_rounds`.
        lines: Records of the finished rounds, as in rounds.jsonl.
        config: The settings that the run recorded, by name; those in a dict have the dict's name before
            theirs, with a dot. Empty if it has recorded none yet.
    """

    def __init__(
        self, output_dir: Path, lines: Sequence[dict[str, Any]], config: dict[str, Any]
    ) -> None:
        self.output_dir = output_dir
        self.root = output_dir / "_rounds"
        self.lines = list(lines)
        self.config = config

    @classmethod
    def open(cls, output_dir: str | Path) -> Self:
        """Open a run by its `output_dir`, or by the folder `_rounds` in it.

        Raises:
            FileNotFoundError: There is no run.
            DamagedFileError: Its records can't be read.
        """
        if "://" in str(output_dir):
            raise FileNotFoundError(
                f"{str(output_dir)!r} is a URL, and a run is read from a folder on disk. Pass the output_dir "
                "of the run, or copy its rounds into a folder first, such as with `aws s3 cp --recursive "
                "s3://bucket/run DIR/_rounds`, and pass DIR."
            )
        given = Path(output_dir)
        whole = given.resolve()
        found = whole.parent if whole.name == "_rounds" else given
        root = found / "_rounds"
        if not root.is_dir():
            there = (
                "there is no such folder" if not given.exists() else "it has no folder `_rounds`"
            )
            raise FileNotFoundError(
                f"{str(given)!r} isn't the output_dir of a run over rounds: {there}. Pass the output_dir "
                "that the trainer was given."
            )
        path = root / "config.json"
        config: dict[str, Any] = {}
        if path.exists():
            with naming_damage(path, BRING_BACK):
                config = dict(json.loads(path.read_text()))
        return cls(found, load_lines(root / "rounds.jsonl"), config)

    @classmethod
    def open_training(cls, output_dir: str | Path) -> Self:
        """Open a run; or a training without rounds, as Quiet-STaR's, that has left a log.

        Raises:
            FileNotFoundError: There is neither.
            DamagedFileError: As `open`.
        """
        folder = Path(output_dir).resolve()
        if "://" in str(output_dir):
            return cls.open(output_dir)
        if not (folder / "_rounds").is_dir() and load_log(folder):
            is_quiet_star = (folder / "quiet_star.json").exists()
            return cls(folder, [], {"method": "Quiet-STaR"} if is_quiet_star else {})
        try:
            return cls.open(output_dir)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} A training without rounds, such as Quiet-STaR's, is shown by its log: call "
                "trainer.save_state() at its end, or keep checkpoints (save_steps)."
            ) from error

    @property
    def has_rounds(self) -> bool:
        """Whether it is a run over rounds."""
        return self.root.is_dir()

    @property
    def method(self) -> str:
        """The name of the method, such as "STaR", or "" if the run hasn't recorded it."""
        return str(self.config.get("method") or "")

    def scores(self, rollout: Rollout) -> dict[str, float | None]:
        """Return a rollout's scores by the names of the functions that gave them.

        Raises:
            DamagedFileError: The record of their names can't be read.
        """
        held_out = self._reward_names("eval_reward_funcs") if rollout.phase == "eval" else ()
        names = held_out or self._reward_names("reward_funcs")
        numbered = (f"function {i + 1}" for i in range(len(names), len(rollout.rewards)))
        return dict(zip((*names, *numbered), rollout.rewards, strict=False))

    def _reward_names(self, setting: str) -> tuple[str, ...]:
        """Return the names that a setting has recorded; none before the run has recorded its settings."""
        with naming_damage(self.root / "config.json", BRING_BACK):
            return tuple(ast.literal_eval(self.config.get(setting) or "()"))

    @property
    def planned_rounds(self) -> int | None:
        """How many rounds the run is to have, ReST's Improve steps each; None if it isn't recorded."""
        grow = self.config.get("num_rounds")
        if not isinstance(grow, int):
            return None
        return grow * len(self.config.get("improve_thresholds") or [1])

    @property
    def is_finished(self) -> bool:
        """Whether all rounds are finished, or the run ended before and saved the final model.

        A run that is resumed records its settings anew: an older model isn't its final one.
        """
        lines = self.root / "rounds.jsonl"
        if not lines.exists():
            return not self.has_rounds
        if self.planned_rounds is not None and len(self.lines) >= self.planned_rounds:
            return True
        records = (lines, self.root / "config.json")
        ended = max(path.stat().st_mtime for path in records if path.exists())
        models = (self.output_dir / name for name in _FINAL_MODEL)
        return any(path.exists() and path.stat().st_mtime >= ended for path in models)

    @property
    def rounds(self) -> list[int]:
        """The indices of the rounds with samples of their own, in order."""
        return sorted(
            int(folder.parent.name.removeprefix("round-"))
            for folder in self.root.glob("round-[0-9]*/samples")
            if {*sampled_prefixes(folder)} - {"hint-"}
        )

    def folder(self, round_index: int) -> Path:
        """Return the folder of a round, -1 for that of the untrained model."""
        return self.root / ("before" if round_index == UNTRAINED else f"round-{round_index:03d}")

    def sampling_round(self, round_index: int) -> int:
        """Return the round whose samples a round trains on: itself, or an earlier one (ReST).

        Raises:
            FileNotFoundError: There are no samples on disk.
        """
        earlier = [index for index in self.rounds if index <= round_index]
        if not earlier:
            raise FileNotFoundError(f"{self.root} has no samples that round {round_index} uses.")
        return earlier[-1]

    def rollouts(self, round_index: int) -> Iterator[tuple[Rollout, str]]:
        """Yield each rollout that a round trains on or drops, with its outcome, shard by shard.

        Outcomes are those of `rollouts/funnel.py: OutcomeCounts`, such as "kept", and "unfinished"
        where the round hasn't selected yet. Samples with hints come after those without. Of a round that is
        being sampled, the shards that are on disk; these may be without rewards still.

        Raises:
            FileNotFoundError: The round has no samples on disk.
            DamagedFileError: A file can't be read, or one of a finished round is gone.
        """
        outcomes = self._outcomes(round_index)
        sampled = self.sampling_round(round_index)
        is_finished = sampled < len(self.lines)
        if is_finished:
            refuse_lost_hints(self.folder(sampled))
        for rollout in self._read(self.folder(sampled) / "samples", is_finished):
            of_prompt = outcomes.get(rollout.prompt_id, {})
            yield rollout, of_prompt.get(rollout.sample_index, UNFINISHED)

    def history(self, round_index: int) -> Iterator[tuple[Rollout, str]]:
        """Yield the rollouts of earlier rounds that a round trains on too, with their outcomes there.

        Runs of earlier versions haven't recorded them.

        Raises:
            FileNotFoundError, DamagedFileError: As `rollouts`.
        """
        path = self.folder(round_index) / "history.parquet"
        chosen: dict[int, set[tuple[str, int]]] = {}
        for index, prompt_id, sample_index in read_history(path) if path.exists() else ():
            chosen.setdefault(index, set()).add((prompt_id, sample_index))
        for index, of_round in sorted(chosen.items()):
            for rollout, outcome in self.rollouts(index):
                if (rollout.prompt_id, rollout.sample_index) in of_round:
                    yield rollout, outcome

    def evaluation(self, round_index: int) -> Iterator[tuple[Rollout, str]]:
        """Yield each held-out rollout after a round, -1 the untrained model, with the name of its set.

        The set is "" if there is one only. " few-shot" follows the name where the prompt has the
        few-shot examples though training hasn't; " opponent" where SPIN's opponent wrote it, which
        isn't graded. `sample_index` 0 is the greedy completion.

        Raises:
            DamagedFileError: As `rollouts`.
        """
        folder = self.folder(round_index) / "evaluation"
        # The untrained model has been scored once round 0 is finished.
        is_finished = max(round_index, 0) < len(self.lines)
        for plan in sorted(folder.glob("*-plan.json")):
            prefix = plan.name.removesuffix("plan.json")
            name = prefix.removesuffix("greedy-").removesuffix("sampled-")
            form = " few-shot" if name.endswith("few_shot_") else ""
            set_name = name.removesuffix("few_shot_").removesuffix("-") + form
            for rollout in self._read(folder, is_finished, [prefix]):
                yield rollout, set_name.strip()
        for plan in sorted(folder.glob("**/samples/plan.json")):  # one folder deep, or in the set's
            of_set = plan.parent.parent.relative_to(folder).as_posix()
            set_name = f"{'' if of_set == '.' else of_set} opponent".strip()
            for rollout in self._read(plan.parent, is_finished):
                yield rollout, set_name

    @property
    def prompts(self) -> KeptPrompts | None:
        """The training prompts as the dataset has them; None where an earlier version kept none.

        Raises:
            DamagedFileError: They can't be read.
        """
        return self.read_prompts() if (self.root / "prompts.parquet").exists() else None

    def read_prompts(self) -> KeptPrompts:
        """Read the training prompts, those of an agent's steps as well.

        Raises:
            FileNotFoundError: An earlier version kept none.
            DamagedFileError: They can't be read.
        """
        steps = sorted(self.root.glob("round-[0-9]*/steps.parquet"))
        return load_prompts(self.root / "prompts.parquet", steps)

    @property
    def faithfulness(self) -> dict[str, Any] | None:
        """What `trl-selfplay score` measured of the kept rationales; None before it has.

        Raises:
            DamagedFileError: The file can't be read.
        """
        path = self.root / "faithfulness.json"
        if not path.exists():
            return None
        with naming_damage(path, "Run `trl-selfplay score` again."):
            return dict(json.loads(path.read_text()))

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """What all trainings logged, in order, as far as it can be read: the warm-up's, and each round's."""
        if not self.has_rounds:
            return load_log(self.output_dir)
        history: list[dict[str, Any]] = []
        for path in (self.root / "warm-up", *sorted(self.root.glob("round-[0-9]*"))):
            history += load_log(path)
        return history

    @property
    def gold(self) -> list[Rollout]:
        """The human completions that rounds train on as well, with their rewards.

        Raises:
            DamagedFileError: They can't be read.
        """
        path = self.root / "gold.parquet"
        return load_rollouts(path) if path.exists() else []

    def _read(
        self, folder: Path, is_finished: bool, prefixes: Sequence[str] | None = None
    ) -> Iterator[Rollout]:
        """Yield the rollouts of planned shards; of a phase in progress, of those on disk."""
        for prefix in sampled_prefixes(folder) if prefixes is None else prefixes:
            for number, shard in enumerate(read_plan(folder / f"{prefix}plan.json") or ()):
                path = folder / f"{prefix}{number:05d}.parquet"
                if shard.prompt_ids and is_finished:
                    yield from StoredShard(path, shard.prompt_ids).rollouts()
                elif shard.prompt_ids and path.exists():
                    yield from load_rollouts(path)  # a kill may have left it with some prompts only

    def _outcomes(self, round_index: int) -> dict[str, dict[int, str]]:
        """Return the outcome of each rollout by prompt and sample index; none before the selection."""
        path = self.folder(round_index) / "selection.parquet"
        outcomes: dict[str, dict[int, str]] = {}
        for prompt_id, index, outcome in read_selection(path) if path.exists() else ():
            outcomes.setdefault(prompt_id, {})[index] = sys.intern(outcome)
        return outcomes


def load_log(folder: Path) -> list[dict[str, Any]]:
    """Return what a training into `folder` has logged: its state, or that of its newest checkpoint."""
    checkpoints = sorted(
        folder.glob("checkpoint-*/trainer_state.json"),
        key=lambda path: int(path.parent.name.rpartition("-")[2]),
    )
    for path in (folder / "trainer_state.json", *reversed(checkpoints)):
        try:
            return list(json.loads(path.read_text())["log_history"])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("%s can't be read (%s); the report lacks its log.", path, error)
    return []
