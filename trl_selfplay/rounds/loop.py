"""The outer loop: play a round, train on it with the unchanged parent, score it and record it.

In: a trainer that can play a round and score held-out prompts, and its parent's `train`. Out: the model
after all rounds, and `_rounds/` in the output directory. Every phase leaves its complete result on disk
before the next begins, and isn't repeated if its result is there:

    samples/, selection.parquet, dataset/ → checkpoint-*/ → model/ → evaluation/ → rounds.jsonl
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers.trainer_utils import TrainOutput
from trl import BEMACallback

from trl_selfplay.disk import (
    BRING_BACK,
    RESUME,
    DamagedFileError,
    delete,
    held_by_this_process,
    is_found,
    saying_what_is_kept,
)
from trl_selfplay.evaluation.estimates import paired_difference
from trl_selfplay.evaluation.heldout import HeldOutScores
from trl_selfplay.evaluation.monitor import warn_baseline, warn_failed_calls, warn_long
from trl_selfplay.evaluation.progress import format_duration, say
from trl_selfplay.evaluation.report import print_round_table
from trl_selfplay.memory import fast_collections
from trl_selfplay.peers import together, wait_for_all
from trl_selfplay.rollouts.funnel import describe_funnel
from trl_selfplay.rollouts.kept_prompts import keep_prompts
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.rendering import keep_rendering
from trl_selfplay.rollouts.shards import load_engines
from trl_selfplay.rounds.checkpoints import list_checkpoints, pass_over_checkpoints
from trl_selfplay.rounds.dry_run import try_step
from trl_selfplay.rounds.early_stopping import ends_run
from trl_selfplay.rounds.empty_round import handle_empty_round
from trl_selfplay.rounds.gathered import whole_parameters, whole_weights_in_place
from trl_selfplay.rounds.identity import check_identity, describe_trainer, digest_weights
from trl_selfplay.rounds.log import (
    RoundCallback,
    call_round_event,
    load_log_history,
    place_of,
    say_where_interrupted,
)
from trl_selfplay.rounds.memory_check import tell_memory
from trl_selfplay.rounds.mirror import kept_in_store
from trl_selfplay.rounds.plan import RoundPlan
from trl_selfplay.rounds.preflight import run_preflight, warn_before_run
from trl_selfplay.rounds.regrading import refuse_half_regraded
from trl_selfplay.rounds.run import (
    UNTRAINED,
    RoundProgress,
    Run,
    append_line,
    find_best_round,
    has_stalled,
)
from trl_selfplay.rounds.tokens import tokens_by_phase
from trl_selfplay.rounds.trackers import TrackerRun, log_table
from trl_selfplay.rounds.training import (
    changed_settings,
    free_optimizer,
    load_outcome,
    save_state,
    train_on,
)
from trl_selfplay.rounds.watch import Watch, ends_by_alarm, round_at_end
from trl_selfplay.rounds.weights import (
    load_saved_model,
    load_trainable,
    reload_initial_weights,
    save_trainable,
)
from trl_selfplay.termination import ends_at_sigterm

logger = logging.getLogger(__name__)


def run_rounds(
    trainer: Any,
    train_parent: Callable[..., TrainOutput],
    resume_from_checkpoint: bool | str | None,
    trial: Any = None,
    ignore_keys_for_eval: list[str] | None = None,
) -> TrainOutput:
    """Run every round that isn't on disk yet and return the parent's output over all of them.

    Args:
        trainer: A trainer over rounds that is a `transformers.Trainer`.
        train_parent: The parent class's bound `train`.
        resume_from_checkpoint: True continues where the rounds in the output directory stop, at
            the first unfinished shard or checkpoint; with an empty directory it starts round 0.
        trial: Must be None, since hyperparameter search over rounds isn't supported.
        ignore_keys_for_eval: Has no effect, since evaluation returns no logits.

    Raises:
        EmptyRoundError: A round kept nothing and `on_empty_round` is "raise".
        PreflightError: With `dry_run=True`, which trains nothing: a run can't work.
        FileExistsError: The output directory holds rounds, and `resume_from_checkpoint` is not set.
        ValueError: It holds rounds of another configuration (the error names each field), or
            `trial` was given.
        RuntimeError: Another run trains into the output directory, or `rounds_dir` fails.
        PeerError: Another process of this run has ended.
        Terminated: SIGTERM arrived.
    """
    if trial is not None:
        raise ValueError("hyperparameter search over rounds is not supported: pass no `trial`.")
    folder, is_main = Path(trainer.args.output_dir), trainer.is_world_process_zero()
    resume = _read_resume(resume_from_checkpoint, folder)
    with (
        ends_at_sigterm(),
        together(trainer.accelerator),
        saying_what_is_kept(folder),
        held_by_this_process(folder, is_main),
        fast_collections(),
        kept_in_store(trainer, resume),
    ):
        return _run_rounds(trainer, train_parent, resume)


def _read_resume(resume: bool | str | None, output_dir: Path) -> bool:
    """Return whether the run in `output_dir` is to go on.

    Raises:
        ValueError: Another folder was given.
    """
    if isinstance(resume, str) and resume.lower() in ("true", "false"):  # as a flag's value
        return resume.lower() == "true"
    if isinstance(resume, str) and Path(resume).resolve() != output_dir.resolve():
        raise ValueError(
            f"resume_from_checkpoint={resume!r}: a run over rounds is resumed as a whole, from "
            f"its output_dir ({str(output_dir)!r}). Pass True; the first unfinished round goes "
            "on from its own newest checkpoint."
        )
    return bool(resume)


def _run_rounds(
    trainer: Any, train_parent: Callable[..., TrainOutput], resume: bool
) -> TrainOutput:
    args, run = trainer.args, trainer.run
    progress = RoundProgress(args.plan_rounds(), trainer.warm_up_rows())
    _refuse_callbacks(trainer, progress)
    if not args.dry_run:
        warn_before_run(trainer)
        tell_memory(trainer)
    try_step(trainer, trainer.placeholder)
    if args.dry_run:
        return run_preflight(trainer)
    _open_run(trainer, progress, resume)
    watch = Watch(trainer, progress)
    callback = RoundCallback(trainer, progress, watch)
    trainer.add_callback(callback)
    trackers = TrackerRun(trainer)
    output: TrainOutput | None = None
    history = load_log_history(run, len(progress.lines))
    ended = False  # by a callback
    trainer.progress = progress
    with say_where_interrupted(partial(place_of, progress)):
        try:
            if len(progress.lines) < len(progress.plans):
                trackers.begin()
            with whole_weights_in_place(trainer):
                before = trainer.score_heldout(UNTRAINED, run.folder(UNTRAINED) / "evaluation")
            _report_baseline(progress, before, args.rewards_have_degrees)
            _load_newest_weights(trainer, progress)
            if progress.warm_up_rows is not None and not progress.lines:
                ended = _warm_up(trainer, train_parent, progress.warm_up_rows)
                history += trainer.state.log_history
            progress.warm_up_steps = max(
                (h.get("step", 0) for h in history if "round" not in h), default=0
            )
            if len(progress.lines) == len(progress.plans):
                say(f"all {len(progress.lines)} rounds in {args.output_dir} were finished before")
            for plan in progress.plans[len(progress.lines) :]:
                patience = args.stop_after_rounds_without_gain
                if ended or has_stalled(run, progress.lines, patience):
                    break
                if ends_by_alarm(progress.lines, args.alarm_actions):
                    break
                progress.begin(plan.round_index)
                watch.begin(plan)
                with changed_settings(args, plan.settings):
                    if call_round_event(trainer, "on_round_begin", progress):
                        break
                    started, is_fresh = time.monotonic(), not run.folder(plan.round_index).exists()
                    with whole_weights_in_place(trainer):
                        played = watch.see_samples(trainer.play_round(plan.round_index))
                    progress.seconds = {"sample": time.monotonic() - started, "train": 0.0}
                    if warning := warn_failed_calls(played.metrics, plan.round_index):
                        logger.warning("%s", warning)
                    if played.num_examples == 0 and not plan.may_be_skipped:
                        handle_empty_round(args, plan.round_index, played)
                        break
                    if warning := warn_long(played.funnel, plan.round_index, args.max_length):
                        logger.warning("%s", warning)
                    output = _train_round(trainer, train_parent, plan, played) or output
                    folder = run.folder(plan.round_index)
                    with whole_weights_in_place(trainer):
                        scores = trainer.score_heldout(plan.round_index, folder / "evaluation")
                    ended = _finish_round(trainer, plan, played, before, scores, watch)
                    history += trainer.state.log_history
                    if is_fresh and not ended:
                        _tell_time_left(progress, time.monotonic() - started)
                    if call_round_event(trainer, "on_round_end", progress):
                        break
        finally:
            trainer.progress = None
            trainer.remove_callback(callback)
            trackers.release()
            trainer.self_play.collector.sampler.release()
            free_optimizer(trainer)
        _load_chosen_weights(trainer, progress.lines)
        if history:
            trainer.state.log_history = history
        if trainer.is_world_process_zero():
            # PEFT reads an older card as it saves, also a damaged one; it is written anew below.
            (Path(args.output_dir) / "README.md").unlink(missing_ok=True)
        with changed_settings(args, {"push_to_hub": False}):  # as after the parent's training
            trainer.save_model(args.output_dir)
        trainer.create_model_card(model_name=Path(args.output_dir).name)
        trackers.end()  # last, since services may fail
    trainer.state.global_step = progress.total_steps
    if output is None:
        return TrainOutput(progress.total_steps, 0.0, {})
    return output._replace(global_step=progress.total_steps)


def _tell_time_left(progress: RoundProgress, seconds: float) -> None:
    """Print how long a whole round took, and what the remaining ones take if they take as long."""
    if left := len(progress.plans) - len(progress.lines):
        say(
            f"that round took {format_duration(seconds)}; rounds left: {left}, about "
            f"{format_duration(left * seconds)} if each takes as long"
        )


def _refuse_callbacks(trainer: Any, progress: RoundProgress) -> None:
    """Raise ValueError for callbacks that fail only once a round's training has begun."""
    trainings = len(progress.plans) + (progress.warm_up_rows is not None)
    if trainings == 1 and not isinstance(trainer.model, PeftModel):
        return
    if any(isinstance(c, BEMACallback) for c in trainer.callback_handler.callbacks):
        raise ValueError(
            "BEMACallback averages the weights of one training of a whole model: it fails with "
            "adapters, and in the second training of a run. Leave it out, or set num_rounds=1 and "
            "train without `peft_config`."
        )


def _open_run(trainer: Any, progress: RoundProgress, resume: bool) -> None:
    """Read what is on disk, refuse what doesn't fit, and put the initial weights in place."""
    args, run = trainer.args, trainer.run
    source = Path(trainer.model.config.name_or_path)
    if source.is_dir() and source.resolve() == Path(args.output_dir).resolve():
        raise ValueError(
            f"the model was loaded from output_dir ({args.output_dir!r}), where the trained one would "
            "replace it, but rounds go back to its weights. Choose another output_dir."
        )
    if run.root.is_dir() and any(run.root.iterdir()) and not resume:
        raise FileExistsError(
            f"{args.output_dir!r} already holds rounds. To go on with them, {RESUME}; or choose another "
            "output_dir (or delete this one)."
        )
    refuse_half_regraded(run.root)
    progress.lines = run.lines
    if resume and not run.root.is_dir() and trainer.is_world_process_zero():
        say(f"there is nothing to resume in {args.output_dir}: the run begins")
    has_initial_weights = run.initial_weights.exists()
    if run.keeps_initial_weights and not has_initial_weights and run.folder(0).exists():
        raise DamagedFileError(
            f"{run.initial_weights} is gone, and rounds begin with the weights in it. {BRING_BACK}"
        )
    if not trainer.has_begun:  # before this process changes them
        with whole_parameters(trainer.model, trainable=False):
            trainer.weights_digest = digest_weights(trainer.model, run.keeps_initial_weights)
    wait_for_all(trainer.accelerator)  # all have looked before one writes
    if trainer.is_world_process_zero():
        # Rounds that share their samples also share one value of each list.
        sampling = {plan.sampling_round for plan in progress.plans}
        changed = check_identity(
            describe_trainer(trainer),
            run.root / "config.json",
            num_finished=sum(index < len(progress.lines) for index in sampling),
            is_trained=bool(progress.lines) or any(run.root.glob("*/model")),
            num_sampled=sum((run.folder(index) / "samples").exists() for index in sampling),
        )
        if changed:
            say(f"the samples on disk are kept; {', '.join(changed)} changed since")
            _drop_what_samples_became(run)
        play = trainer.self_play
        keep_rendering(play.formatter.rendering(play.rows[0].is_conversational), run.rendering_path)
        keep_prompts(run.prompts_path, play.rows, play.formatter.tools_shown)
    wait_for_all(trainer.accelerator)
    if not is_found(run.root / "config.json"):
        raise FileNotFoundError(
            f"process {trainer.accelerator.process_index} doesn't find {run.root / 'config.json'}, "
            "which the main process wrote: all processes need the same disk. Choose an output_dir "
            "on a shared one."
        )
    if has_initial_weights or trainer.has_begun:  # training, here or elsewhere, has changed them
        reload_initial_weights(trainer.model, args, run.initial_weights)
    elif run.keeps_initial_weights:
        save_trainable(trainer.model, run.initial_weights, trainer.is_world_process_zero())
    trainer.has_begun = True
    wait_for_all(trainer.accelerator)
    is_new = not has_initial_weights and run.initial_weights.exists()
    if trainer.accelerator.num_processes > 1 and is_new:
        # Each process drew a new adapter of its own; DDP would make them equal only in training.
        load_trainable(trainer.model, run.initial_weights)


def _drop_what_samples_became(run: Run) -> None:
    """Delete what round 0 made from its samples, so that it selects and trains anew."""
    for folder in (run.folder(UNTRAINED), run.folder(0)):
        for made in ("dataset", "selection.parquet", "evaluation/*/pairs"):
            for path in folder.glob(made):
                delete(path)
        delete(folder / "evaluation" / "scores.json")
        # Which prompts are unsolved may differ: planned anew around what is sampled.
        for plan in (
            *folder.glob("samples/hint-plan.json"),
            *folder.glob("judgements/hint-*plan.json"),
        ):
            delete(plan)
        pass_over_checkpoints(folder)


def _load_newest_weights(trainer: Any, progress: RoundProgress) -> None:
    """Put the weights of the last finished round in place.

    Raises:
        FileNotFoundError: They are gone, and the next round needs them.
    """
    run = trainer.run
    if not progress.lines:
        return
    newest = len(progress.lines) - 1
    folder = run.folder(newest) / "model"
    if folder.exists():
        load_saved_model(trainer.model, folder)
    elif not (run.folder(newest + 1) / "model").exists():  # the next one has been trained
        raise FileNotFoundError(
            f"{folder} is gone, and round {newest + 1} begins with the weights in it. Bring it back, "
            "or start anew in another output_dir."
        )


def _report_baseline(
    progress: RoundProgress, before: HeldOutScores | None, has_degrees: bool
) -> None:
    if before is None or progress.lines:
        return
    progress.seconds_before["evaluate_before"] = before.seconds
    progress.pending_logs.append(dict(before.metrics))
    if warning := warn_baseline(before.metrics, has_degrees):
        logger.warning("before round 0: %s", warning)


def _warm_up(trainer: Any, train_parent: Callable[..., TrainOutput], rows: Dataset) -> bool:
    """Train before anything is sampled; return whether a callback ended the run."""
    folder = trainer.run.warm_up_folder
    if load_outcome(trainer, folder):
        return False
    started = time.monotonic()
    output = train_on(trainer, train_parent, rows, folder, trainer.args.seed)
    trainer.progress.seconds_before["warm_up"] = time.monotonic() - started
    return output is not None and ends_run(trainer.state)


def _train_round(
    trainer: Any, train_parent: Callable[..., TrainOutput], plan: RoundPlan, played: PlayedRound
) -> TrainOutput | None:
    """Train on the round's rows and save the result; return None if an earlier process has."""
    round_index = plan.round_index
    args, run, progress = trainer.args, trainer.run, trainer.progress
    folder = run.folder(round_index)
    if load_outcome(trainer, folder):
        progress.pending_logs.clear()  # logged before the kill
        return None
    if args.start_from == "base" and (round_index > 0 or progress.warm_up_rows is not None):
        reload_initial_weights(trainer.model, args, run.initial_weights)
    progress.pending_logs.append(played.metrics)
    if list_checkpoints(folder):
        progress.pending_logs.clear()  # logged before the kill
    else:
        log_table(trainer, folder, played, progress.steps_before)
    progress.num_examples = played.num_examples
    rows = played.training_rows
    if played.num_examples == 0:
        logger.warning(
            "round %d selected nothing (%s) and leaves the weights as they are.",
            round_index,
            describe_funnel(played.funnel),
        )
        rows = None
    started = time.monotonic()
    output = train_on(trainer, train_parent, rows, folder, args.seed + round_index)
    progress.seconds["train"] = time.monotonic() - started
    return output


def _finish_round(
    trainer: Any,
    plan: RoundPlan,
    played: PlayedRound,
    before: HeldOutScores | None,
    scores: HeldOutScores | None,
    watch: Watch,
) -> bool:
    """Log and record a finished round, delete what isn't needed; return whether the run ends."""
    args, run, progress, state = trainer.args, trainer.run, trainer.progress, trainer.state
    round_index = plan.round_index
    gain = standard_error = None
    if before is not None and scores is not None:
        gain, standard_error = paired_difference(before.by_prompt, scores.by_prompt)
    if scores is not None:
        trainer.log(dict(scores.metrics))
    if played.num_examples:  # unless it was told before: an earlier process may have trained
        watch.see_steps(state.max_steps, args.get_warmup_steps(state.max_steps))
    line: dict[str, Any] = {
        "round": round_index,
        **plan.details,
        "sampled_from": progress.weights_before(plan.sampling_round),
        "trained_from": "base"
        if args.start_from == "base"
        else progress.weights_before(round_index),
        "funnel": played.funnel.to_dict(),
        "rewards": played.rewards,
        "metrics": {
            n: v for n, v in played.metrics.items() if n.startswith(("play/", "select/", "tools/"))
        },
        "eval": {} if scores is None else scores.metrics,
        "gain": gain,
        "gain_standard_error": standard_error,
        "seconds": {
            **({} if round_index else _rounded(progress.seconds_before)),
            **_rounded(progress.seconds),
            "evaluate": 0.0 if scores is None else round(scores.seconds, 1),
        },
        "tokens": {
            **({} if round_index or before is None else {"evaluate_before": before.num_tokens}),
            **tokens_by_phase(plan, played, state.epoch, scores),
        },
        "examples": played.num_examples,
        "steps": state.global_step,
        "learning_rate": args.learning_rate,
        **watch.see_scores(),
    }
    engines = load_engines(run.folder(plan.sampling_round) / "samples" / "engines.json")
    if engines:
        line["engine"] = engines[max(engines)]
    if round_index == 0 and before is not None:
        line["eval_before"] = before.metrics
    if trainer.is_world_process_zero():
        append_line(run.lines_path, line, progress.lines)
        # With the held-out scores, for the log_history of a run that goes on.
        save_state(state, run.folder(round_index))
    progress.lines.append(line)
    wait_for_all(trainer.accelerator)
    if trainer.is_world_process_zero():
        _delete_what_is_done(run, progress.lines)
        print_round_table(progress.lines, run.chosen_metric)
    return ends_run(state)  # also where a kill came after it was trained


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {phase: round(value, 1) for phase, value in seconds.items()}


def _delete_what_is_done(run: Run, lines: Sequence[Mapping[str, Any]]) -> None:
    """Delete finished rounds' checkpoints and, with full fine-tuning, models no longer needed."""
    round_index = len(lines) - 1
    for index in range(round_index + 1):  # earlier ones too: a kill may have come in between
        for checkpoint in list_checkpoints(run.folder(index)):
            delete(checkpoint)
    if not run.keeps_every_model:
        needed = {round_index, find_best_round(run, lines)}
        for index in range(round_index):
            if index not in needed:
                delete(run.folder(index) / "model")


def _load_chosen_weights(trainer: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """Load the best round's weights if configured, or if an alarm of the last round asks for it."""
    args, run = trainer.args, trainer.run
    last = len(lines) - 1
    if not lines or (chosen := round_at_end(run, lines, args.alarm_actions)) == last:
        return
    if chosen == UNTRAINED:
        reload_initial_weights(trainer.model, args, run.initial_weights)
    else:
        load_saved_model(trainer.model, run.folder(chosen) / "model")
    logger.warning(
        "loaded the weights of %s, which have the best held-out score; the last round was %d.",
        "the untrained model" if chosen == UNTRAINED else f"round {chosen}",
        last,
    )
