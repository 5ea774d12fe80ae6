"""Follow the detectors of collapse through a run, and carry out what the user wants of their alarms.

In: a round's samples, its steps and its held-out scores, as they come. Out: warnings, metrics of the samples,
what rounds.jsonl records (`detectors`, `alarms`), and whether the run ends or loads its best round. What a
resumed run no longer has in memory is read from disk.
"""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from glob import escape
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trl_selfplay.disk import BRING_BACK, RESUME, DamagedFileError
from trl_selfplay.evaluation.detectors import (
    DETECTOR_OF,
    Action,
    alarm_record,
    take_readings,
    warning_text,
)
from trl_selfplay.evaluation.diversity import (
    NormalForm,
    RoundSamples,
    Samples,
    digest_kept,
    diversity_metrics,
    pass_rates,
    summarize_samples,
)
from trl_selfplay.evaluation.evidence import Evidence, Reading, Scores
from trl_selfplay.evaluation.heldout import greedy_scores
from trl_selfplay.generation.sampler import build_sampling_options
from trl_selfplay.peers import from_main
from trl_selfplay.rewards.vote import answer_form
from trl_selfplay.rollouts.facts import digest_form
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.record import Rollout, load_rollouts
from trl_selfplay.rollouts.sequence import Rollouts
from trl_selfplay.rollouts.shards import read_plan
from trl_selfplay.rollouts.stored import load_kept, load_samples
from trl_selfplay.rounds.plan import RoundPlan
from trl_selfplay.rounds.run import UNTRAINED, RoundProgress, Run, find_best_round, name_of_weights

logger = logging.getLogger(__name__)

_MOST_CHECKED = 100  # kept completions that other reward functions grade as well
_MOST_SCORED = 32  # completions that are scored under the weights from before round 0


def action_of(name: str, actions: Mapping[str, str] | None) -> Action:
    """Return what an alarm of this name does: what the user chose, else its default."""
    chosen = (actions or {}).get(name)
    return Action(chosen) if chosen is not None else DETECTOR_OF[name].action


def alarms_with(
    lines: Sequence[Mapping[str, Any]], actions: Mapping[str, str] | None, *wanted: Action
) -> list[str]:
    """Return the names of the last round's alarms that have one of these actions now."""
    alarms = lines[-1].get("alarms", ()) if lines else ()
    names = [alarm["name"] for alarm in alarms if alarm["name"] in DETECTOR_OF]
    return [name for name in names if action_of(name, actions) in wanted]


def round_at_end(
    run: Run, lines: Sequence[Mapping[str, Any]], actions: Mapping[str, str] | None
) -> int:
    """Return the round whose weights a run ends with: the last, or the best if that is to be loaded.

    Args:
        run: The run.
        lines: Records of the finished rounds, at least one.
        actions: What alarms do; one of the last round may ask for the best round.
    """
    asked = run.loads_best_round or alarms_with(lines, actions, Action.BEST_ROUND)
    return find_best_round(run, lines) if asked else len(lines) - 1


def ends_by_alarm(lines: Sequence[Mapping[str, Any]], actions: Mapping[str, str] | None) -> bool:
    """Return whether an alarm of the last round ends the run, and log which."""
    names = alarms_with(lines, actions, Action.STOP, Action.BEST_ROUND)
    for name in names:
        logger.warning(
            "stopping: alarm %r of round %d, by alarm_actions[%r]=%r. To go on, set it to 'warn' and "
            "%s.",
            name,
            lines[-1]["round"],
            name,
            str(action_of(name, actions)),
            RESUME,
        )
    return bool(names)


def check_drift(actions: Mapping[str, str] | None, is_sharded: bool) -> None:
    """Raise ValueError if drift is asked for where the initial weights can't be put in place."""
    if is_sharded and action_of("drift-from-base", actions) != Action.IGNORE:
        raise ValueError(
            "alarm_actions['drift-from-base'] scores completions with the initial weights, and weights "
            "that are divided over processes (FSDP, DeepSpeed ZeRO-3) can't be exchanged. Leave it out."
        )


class Watch:
    """The detectors of one run.

    Args:
        trainer: A trainer over rounds.
        progress: How far the run has got.
    """

    def __init__(self, trainer: Any, progress: RoundProgress) -> None:
        self._trainer, self._progress = trainer, progress
        self._evidence = Evidence(UNTRAINED)
        self._readings: dict[str, Reading] = {}
        self._first: RoundSamples | None = None  # of round 0
        self._solved: dict[str, bool] = {}  # in the round before
        self._solved_in: int | None = None
        self._kept: np.ndarray | None = None  # digests of what the rounds before kept
        self._scores: dict[int, dict[str, Scores]] = {}
        self._heldout: dict[int, dict[str, Samples]] = {}

    def begin(self, plan: RoundPlan) -> None:
        """Begin a round."""
        play = self._trainer.self_play
        scorer = play.collector.scorer
        self._plan, self._readings = plan, {}
        self._evidence = Evidence(
            plan.round_index,
            is_graded=scorer is not None,
            votes=scorer is not None and bool(scorer.comparing),
            has_other_check=play.collector.eval_scorer is not None and scorer is not None,
        )

    def see_samples(self, played: PlayedRound) -> PlayedRound:
        """Take the readings of a round's samples and selection; return it with metrics of them."""
        index, run = self._plan.round_index, self._trainer.run
        self._evidence.funnel = played.funnel
        metrics: dict[str, float] = {}
        if (run.folder(index) / "samples").exists():  # else it trains on those of another
            metrics = self._summarize(played)
        self._take()
        return replace(played, metrics={**metrics, **played.metrics})

    def see_steps(self, steps: int, warmup_steps: int) -> None:
        """Take the reading of a training's length as it begins."""
        self._evidence.steps, self._evidence.warmup_steps = steps, warmup_steps
        self._take()

    def see_scores(self) -> dict[str, Any]:
        """Take the readings of the held-out scores on disk; return what rounds.jsonl records."""
        e, lines = self._evidence, self._progress.lines
        best = find_best_round(self._trainer.run, lines) if lines else UNTRAINED
        before, now = self._scores_of(UNTRAINED), self._scores_of(e.round_index)
        names = list(self._trainer.self_play.heldout)
        if names and now:
            e.untrained, e.scores = before.get(names[0]), now.get(names[0])
            e.best = self._scores_of(best).get(names[0])
            e.best_name = "before training" if best == UNTRAINED else name_of_weights(best)
            pairs = {name: (before.get(name), now.get(name)) for name in names[1:]}
            e.other_sets = {n: (a, b) for n, (a, b) in pairs.items() if a and b}
            e.untrained_samples = self._all_heldout(UNTRAINED)
            e.scored_samples = self._all_heldout(e.round_index)
        self._take()
        actions = self._trainer.args.alarm_actions
        return {
            "detectors": {name: round(r.value, 6) for name, r in self._readings.items()},
            "alarms": [
                alarm_record(DETECTOR_OF[name], reading, e.round_index, action)
                for name, reading in self._readings.items()
                if DETECTOR_OF[name].fires(reading)
                and (action := action_of(name, actions)) != Action.IGNORE
            ],
        }

    def _take(self) -> None:
        """Take the readings whose evidence has come, and log their alarms."""
        readings = take_readings(self._evidence, self._readings)
        self._readings |= readings
        if not self._trainer.is_world_process_zero():
            return
        for name, reading in readings.items():
            detector = DETECTOR_OF[name]
            ignored = action_of(name, self._trainer.args.alarm_actions) == Action.IGNORE
            if detector.fires(reading) and not ignored:
                logger.warning("%s", warning_text(detector, reading, self._evidence.round_index))

    # --- samples ---------------------------------------------------------------------------------

    def _summarize(self, played: PlayedRound) -> dict[str, float]:
        e, index = self._evidence, self._plan.round_index
        e.now = self._summary(played.rollouts, played.outcomes)
        first = self._first_samples(e.now)
        ways = [self._way_of_sampling(plan) for plan in (self._progress.plans[0], self._plan)]
        e.first = first if ways[0] == ways[1] else None
        if index > 0:
            e.earlier_kept = self._earlier_kept()
            sampler = self._scores_of(index - 1), self._scores_of(UNTRAINED)
            for name in list(self._trainer.self_play.heldout)[:1]:
                e.sampler_scores, e.untrained = (scores.get(name) for scores in sampler)
                e.sampler_heldout = self._heldout_of(index - 1).get(name)
                e.untrained_samples = self._heldout_of(UNTRAINED).get(name)
        e.rejected = self._second_opinion(played)
        e.log_probs = self._log_probs(played)
        metrics: dict[str, float] = {}
        has_degrees = self._trainer.args.rewards_have_degrees
        if e.is_graded and e.now.prompts:
            metrics = diversity_metrics((first or e.now).prompts, e.now.prompts, has_degrees)
            metrics |= self._compare_solved(e.now.prompts)
        e.newly_solved = self._newly_solved(metrics)
        kept = [] if self._kept is None else [self._kept]
        self._kept = np.unique(np.concatenate([*kept, e.now.kept_forms]))
        return metrics

    def _summary(self, rollouts: Sequence[Rollout], outcomes: Sequence[str] = ()) -> RoundSamples:
        play = self._trainer.self_play
        scorer = play.collector.scorer or play.collector.heldout_scorer
        functions = [] if scorer is None else scorer.callables
        forms = [f.answer_form for f in functions if hasattr(f, "answer_form")]
        return summarize_samples(
            rollouts,
            self._normal_form,
            play.collector.reward_threshold,
            forms[0] if forms else answer_form,
            outcomes,
            build_sampling_options(self._trainer.args, ()).max_completion_length,
        )

    @property
    def _normal_form(self) -> NormalForm:
        form: NormalForm = self._trainer.normal_form
        return form

    def _way_of_sampling(self, plan: RoundPlan) -> tuple[Any, ...]:
        """Return what must be equal where two rounds are compared: temperature, few-shot examples."""
        limit = getattr(self._trainer.args, "few_shot_rounds", None)
        return plan.settings.get("temperature"), limit is None or plan.round_index < limit

    def _first_samples(self, now: RoundSamples) -> RoundSamples | None:
        """Return the samples of round 0, read from disk if they aren't in memory."""
        if self._plan.round_index == 0:
            self._first = now
        elif self._first is None:
            try:
                self._first = self._summary(load_samples(self._trainer.run.folder(0)))
            except (DamagedFileError, FileNotFoundError) as error:
                logger.warning("diversity isn't compared with round 0's: %s", error)
        return self._first

    def _earlier_rounds(self) -> list[int]:
        """Return the earlier rounds that sampled, in order."""
        index = self._plan.round_index
        return [
            p.round_index for p in self._progress.plans[:index] if p.sampling_round == p.round_index
        ]

    def _earlier_kept(self) -> np.ndarray | None:
        """Return digests of what the earlier rounds kept."""
        if self._kept is None:
            digests: list[int] = []
            try:
                for index in self._earlier_rounds():
                    for _, rollout in load_kept(self._trainer.run.folder(index)).scan():
                        form = digest_form(self._normal_form(rollout.completion))
                        digests.append(digest_kept(rollout.prompt_id, form))
            except (DamagedFileError, FileNotFoundError) as error:
                logger.warning("duplicates of earlier rounds aren't counted: %s", error)
                return None
            self._kept = np.unique(np.array(digests, np.uint64))
        return self._kept

    def _compare_solved(self, now: Samples) -> dict[str, float]:
        """Return the shares of prompts that are newly solved and lost since the last sampling round."""
        solved = {i: rate > 0.0 for i, rate in pass_rates(now).items()}
        earlier = self._earlier_rounds()
        before: dict[str, bool] = {}
        if earlier and self._solved_in == earlier[-1]:
            before = self._solved
        elif earlier:
            try:
                samples = self._summary(load_samples(self._trainer.run.folder(earlier[-1])))
                before = {i: rate > 0.0 for i, rate in pass_rates(samples.prompts).items()}
            except (DamagedFileError, FileNotFoundError):
                before = {}
        self._solved, self._solved_in = solved, self._plan.round_index
        common = before.keys() & solved.keys()
        if not common or 2 * len(common) < len(solved):
            return {}
        return {
            "play/newly_solved": sum(solved[i] and not before[i] for i in common) / len(common),
            "play/lost": sum(before[i] and not solved[i] for i in common) / len(common),
        }

    def _newly_solved(self, metrics: Mapping[str, float]) -> list[tuple[float, float, float]]:
        """Return the shares of this round and of those before, as far as they have them in a row."""
        if self._trainer.args.rewards_have_degrees:
            return []  # what is trained on needn't be correct
        found: list[tuple[float, float, float]] = []
        earlier = [self._progress.lines[index]["metrics"] for index in self._earlier_rounds()]
        for of_round in (metrics, *reversed(earlier)):
            if "play/newly_solved" not in of_round:
                break
            unsolved = 1.0 - of_round["play/coverage"]
            found.append((of_round["play/newly_solved"], of_round["play/lost"], unsolved))
        return found[::-1]

    def _second_opinion(self, played: PlayedRound) -> tuple[int, int] | None:
        """Return how many of some kept completions the held-out graders reject, and how many there are.

        Up to 100 at random under the seed. The held-out graders must differ from the others.
        """
        play, args = self._trainer.self_play, self._trainer.args
        collector = play.collector
        ignored = action_of("false-positives", args.alarm_actions) == Action.IGNORE
        threshold = collector.eval_threshold
        if not self._evidence.has_other_check or ignored or threshold is None:
            return None
        graded: tuple[int, int] | None = None
        if collector.accelerator.is_main_process:
            kept = [place for place, outcome in enumerate(played.outcomes) if outcome == "kept"]
            generator = random.Random(f"{args.seed}/{self._plan.round_index}")
            chosen = sorted(generator.sample(kept, min(_MOST_CHECKED, len(kept))))
            graded = self._reject(Rollouts.of(played.rollouts).pick(chosen), threshold)
        return from_main(collector.accelerator, graded)

    def _reject(self, rollouts: Rollouts, threshold: float) -> tuple[int, int] | None:
        play = self._trainer.self_play
        scorer = play.collector.eval_scorer
        collector = replace(play.collector, scorer=scorer, eval_scorer=None)
        rows = {row.prompt_id: row for row in play.rows}
        kept = [
            r for r in rollouts if r.prompt_id in rows and r.passes(play.collector.reward_threshold)
        ]
        if not kept:
            return None
        try:
            found = [r for r in collector.grade(kept, rows) if r.reward is not None]
        except (RuntimeError, TypeError, ValueError) as error:
            logger.warning(
                "eval_reward_funcs can't grade training completions, so false positives aren't "
                "measured: %s",
                error,
            )
            return None
        scorer.take_metrics()  # they are not those of a held-out set
        return sum(not r.passes(threshold) for r in found), len(found)

    def _log_probs(self, played: PlayedRound) -> list[tuple[float, float]]:
        """Return log-probs of some completions now and before round 0, if they are asked for."""
        play, args, index = self._trainer.self_play, self._trainer.args, self._plan.round_index
        ignored = action_of("drift-from-base", args.alarm_actions) == Action.IGNORE
        if ignored or index == 0 or play.log_probs is None:
            return []
        rollouts = Rollouts.of(played.rollouts)
        count = min(_MOST_SCORED, len(rollouts))
        chosen = sorted(
            random.Random(f"{args.seed}/{index}/drift").sample(range(len(rollouts)), count)
        )
        scored = [
            list(own_turns(r)) for r in rollouts.pick(chosen) if r.completion_ids and not r.hinted
        ]
        turns = [turn for of_rollout in scored for turn in of_rollout]
        options = build_sampling_options(args, play.eos_token_ids)
        now = iter(play.log_probs(turns, options))
        with play.initial_weights():
            before = iter(play.log_probs(turns, options))
        return [(sum(islice(now, len(t))), sum(islice(before, len(t)))) for t in scored]

    # --- held-out scores -------------------------------------------------------------------------

    def _scores_of(self, round_index: int) -> dict[str, Scores]:
        """Return the scores by prompt of each held-out set after a round."""
        if round_index not in self._scores:
            threshold = self._trainer.self_play.collector.eval_threshold
            self._scores[round_index] = {
                name: scores
                for name in self._trainer.self_play.heldout
                if (scores := greedy_scores(self._stored(round_index, name, "greedy"), threshold))
            }
        return self._scores[round_index]

    def _heldout_of(self, round_index: int) -> dict[str, Samples]:
        """Return the samples of each held-out set after a round."""
        if round_index not in self._heldout:
            play = self._trainer.self_play
            threshold = play.collector.eval_threshold
            found: dict[str, Samples] = {}
            # With rewards of degrees no sample is simply right.
            for name in () if threshold is None else play.heldout:
                rollouts = list(self._stored(round_index, name, "sampled"))
                if rollouts:
                    found[name] = summarize_samples(rollouts, self._normal_form, threshold).prompts
            self._heldout[round_index] = found
        return self._heldout[round_index]

    def _all_heldout(self, round_index: int) -> Samples | None:
        """Return the samples of all held-out sets after a round; None without any."""
        found: dict[str, Any] = {}
        for samples in self._heldout_of(round_index).values():
            found |= samples
        return found or None

    def _stored(self, round_index: int, name: str, kind: str) -> list[Rollout]:
        """Return a held-out set's completions of one kind, in the form of the prompt trained on.

        None, with a warning, if a file of theirs is damaged or gone.
        """
        folder: Path = self._trainer.run.folder(round_index) / "evaluation"
        prefix = f"{escape(name)}-{kind}" if name else kind
        try:
            planned = enumerate(read_plan(folder / f"{prefix}-plan.json") or ())
            paths = {
                folder / f"{prefix}-{i:05d}.parquet" for i, shard in planned if shard.prompt_ids
            }
            paths |= set(folder.glob(f"{prefix}-*.parquet"))  # all there are, if the plan is gone
            return [rollout for path in sorted(paths) for rollout in load_rollouts(path)]
        except DamagedFileError as error:
            logger.warning(
                "held-out scores aren't compared with those in %s: %s",
                folder,
                str(error).removesuffix(BRING_BACK).rstrip(),
            )
            return []


def own_turns(rollout: Rollout) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the tokens before each turn of the policy, and those of the turn."""
    ids, mask = rollout.completion_ids, rollout.completion_mask
    ends = [0, *(i for i in range(1, len(ids)) if mask and mask[i] != mask[i - 1]), len(ids)]
    for start, end in pairwise(ends):
        if mask is None or mask[start]:
            yield (*rollout.prompt_ids, *ids[:start]), ids[start:end]
