"""What every trainer over rounds has in common: stages, training, evaluation, log, model card.

In: a trainer that can play a round. Out: `RoundsMixin`, which precedes a TRL trainer among the
bases. What a round is, from sampling to selection, is in each trainer's `play_round`.
"""

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from trl_selfplay.evaluation.heldout import HeldOutScores
from trl_selfplay.generation.completion_scores import score_completions
from trl_selfplay.generation.model_traits import ModelTraits
from trl_selfplay.generation.transformers_sampler import collect_eos_token_ids
from trl_selfplay.rollouts.collection import Collector
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.prompts import (
    HintFormatter,
    PromptRow,
    load_heldout_sets,
    load_prompt_rows,
)
from trl_selfplay.rollouts.rendering import FewShotExample, PromptFormatter
from trl_selfplay.rollouts.selection import default_normal_form
from trl_selfplay.rounds.card import add_rounds_to_card
from trl_selfplay.rounds.checkpoints import SumsCheckpoints
from trl_selfplay.rounds.gathered import (
    check_sharding,
    shards_weights,
    whole_weights_in_place,
)
from trl_selfplay.rounds.judging import check_judges
from trl_selfplay.rounds.log import log_with_round
from trl_selfplay.rounds.loop import run_rounds
from trl_selfplay.rounds.mirror import open_store
from trl_selfplay.rounds.run import UNTRAINED, RoundProgress, Run
from trl_selfplay.rounds.stages import SelfPlay
from trl_selfplay.rounds.store import RoundsStore
from trl_selfplay.rounds.training import SameOrderOnResume
from trl_selfplay.rounds.watch import check_drift
from trl_selfplay.rounds.weights import (
    initial_weights_in_place,
    undo_rounding,
    unrounded_weights,
)
from trl_selfplay.tools.agent import Agent
from trl_selfplay.trainers.construction import (
    Grading,
    build_run,
    build_scorers,
    check_adapters,
    check_built_model,
    check_comparing,
    check_heldout_graders,
    check_rows_apart,
    heldout_threshold,
    load_processing_class,
    start_of_run,
)
from trl_selfplay.trainers.engine_config import check_engine_is_there
from trl_selfplay.trainers.publishing import PublishesSamples
from trl_selfplay.trainers.sampling import build_sampler
from trl_selfplay.trainers.tool_setup import build_trajectories, check_examples, choose_form
from trl_selfplay.trainers.unused_fields import warn_unused_fields


class RoundsMixin(PublishesSamples):
    """Adds rounds of sampling and training to a TRL trainer: `class MyTrainer(RoundsMixin, SFTTrainer)`.

    A trainer defines `play_round`. It may override `load_rows`, `placeholder_rows`, `prepare_stages`,
    `identity`, `data_of`, `warm_up_rows`, `load_sets`, `score_sets` and `score_heldout`.

    Attributes:
        run: The rounds on disk.
        store: Where they are kept as well, with `rounds_dir`.
        self_play: The stages of a round: sampling, grading, scoring.
        placeholder: The row that the parent was built on, as the parent prepared it.
        progress: How far `train` has got; None outside it.
        weights_digest: Digest of the weights at the start of the first `train` in this process.
        has_begun: Whether `train` was called in this process and may have changed the weights.
        normal_form: Maps equal completions of a prompt to the same form.
        load_rows: Checks a dataset and returns its rows. Called with the dataset, its name for
            errors, and `reward_funcs`.
        collated_columns: Columns of a round's rows that the collator gets besides the parent's.
        samples_prompts: Whether rounds sample completions of the prompts.
        agent: Asks the steps of a trajectory in place of the prompt; None: the prompt is asked.
    """

    args: Any
    run: Run
    store: RoundsStore | None = None
    self_play: SelfPlay
    placeholder: Dataset
    progress: RoundProgress | None = None
    weights_digest: str | None = None
    has_begun: bool = False
    normal_form: Callable[[str], Hashable] = staticmethod(default_normal_form)
    load_rows: Callable[..., list[PromptRow]] = staticmethod(load_prompt_rows)
    collated_columns: tuple[str, ...] = ()
    samples_prompts: bool = True
    agent: Agent | None = None

    def __init__(
        self,
        model: Any,
        args: Any,
        rows: list[PromptRow],
        *,
        eval_dataset: Any,
        processing_class: Any,
        peft_config: Any,
        grading: Grading,
        examples: tuple[FewShotExample, ...] = (),
        hint_formatter: HintFormatter | None = None,
        toolbox: Any = None,
        **parent: Any,
    ) -> None:
        """Build the parent on a placeholder row, since each round makes its own rows; then the stages.

        Args:
            model: As the parent takes it.
            args: From `read_config`.
            rows: The training prompts.
            eval_dataset: Held-out prompts, one set or a dict of sets.
            processing_class: A tokenizer; None loads the model's.
            peft_config: For new adapters.
            grading: Reward functions, and which rewards count as right.
            examples: Few-shot examples.
            hint_formatter: Shows the solution in a prompt; None: no prompt has a hint.
            toolbox: From `read_toolbox`; None: completions are one turn.
            **parent: The parent's other arguments.

        Raises:
            ValueError, TypeError: For arguments, rows or a model that can't work.
        """
        check_engine_is_there(args, args.world_size)
        check_adapters(model, peft_config)
        if toolbox is not None:
            self.load_rows = partial(self.load_rows, toolbox=toolbox)
        heldout = load_heldout_sets(eval_dataset, rows, self.load_rows, grading.heldout_funcs)
        warn_unused_fields(
            args,
            has_heldout=bool(heldout),
            has_examples=bool(examples) or (self.agent is not None and self.agent.has_examples),
            has_tools=toolbox is not None or self.agent is not None,
            num_prompts=len(rows),
        )
        check_comparing(grading, args.num_generations, hint_formatter is not None)
        if heldout:
            check_heldout_graders(grading.heldout_funcs)
        tokenizer = load_processing_class(model, processing_class, args)
        self.run = build_run(args, model, peft_config, list(heldout))
        placeholder = self.placeholder_rows(tokenizer)
        unrounded = unrounded_weights(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=placeholder,
            eval_dataset=placeholder if heldout else None,
            processing_class=tokenizer,
            peft_config=peft_config,  # type: ignore[call-arg]  # of TRL's trainers
            # Named only if given, so that a parameter that TRL drops, as TRL 2.0 will drop
            # `compute_loss_func`, is missed by those alone who pass it.
            **{name: value for name, value in parent.items() if value is not None},
        )
        check_sharding(self)
        undo_rounding(self.model, unrounded)
        self.store = open_store(self.args, self.accelerator)
        self.add_callback(SameOrderOnResume)
        self.add_callback(SumsCheckpoints)
        self.placeholder = cast("Dataset", self.train_dataset)
        self.eval_dataset = eval_dataset
        with whole_weights_in_place(self):
            self.self_play = self.prepare_stages(
                self._build_self_play(
                    model, rows, heldout, grading, examples, hint_formatter, toolbox
                )
            )
        is_sharded = shards_weights(self)
        check_judges(self.self_play, is_sharded)
        check_drift(self.args.alarm_actions, is_sharded)
        self.self_play.check_prompts(hinted=hint_formatter is not None)
        self.self_play.warn_data_errors()

    def _build_self_play(
        self,
        given: Any,
        rows: list[PromptRow],
        heldout: Mapping[str, list[PromptRow]],
        grading: Grading,
        examples: tuple[FewShotExample, ...],
        hint_formatter: HintFormatter | None,
        toolbox: Any,
    ) -> SelfPlay:
        """Build the stages of a round, once the parent has been built."""
        args, model, accelerator = self.args, cast("Any", self.model), self.accelerator
        tokenizer = cast("PreTrainedTokenizerBase", self.processing_class)
        balanced = cast("Any", self).aux_loss_enabled  # of TRL's trainers
        traits = check_built_model(model, accelerator, tokenizer, balanced)
        if getattr(self, "padding_free", False):  # of SFTTrainer
            check_rows_apart(model, accelerator, self.data_collator)
        token_ids = frozenset(tokenizer.get_vocab().values())
        # Read when used: training replaces the wrapped model and the state.
        sampler = build_sampler(
            args, given, lambda: self.model_wrapped, tokenizer, accelerator, traits
        )
        scorer, eval_scorer = build_scorers(grading, args, accelerator.device, lambda: self.state)
        calibrated = scorer.calibration.names if scorer is not None else ()
        if heldout and eval_scorer is None and calibrated:
            raise ValueError(
                f"{calibrated[0]} is calibrated by round 0's samples, and held-out prompts are "
                "scored before there are any. Pass `eval_reward_funcs`, or RewardModel(..., "
                "calibrate=False)."
            )
        eos_token_ids = collect_eos_token_ids(model, tokenizer)
        context = _context(args, traits)
        form = trajectories = None
        if toolbox is not None:
            form = choose_form(args, tokenizer, toolbox, rows[0].is_conversational, eos_token_ids)
            check_examples(examples, form)
            trajectories = build_trajectories(
                args, form, tokenizer, eos_token_ids, context["context_length"]
            )
        return SelfPlay(
            config=args,
            rows=rows,
            heldout=heldout,
            formatter=PromptFormatter(
                tokenizer,
                examples,
                hint_formatter,
                args.chat_template_kwargs,
                sanitize_control_tokens=args.sanitize_control_tokens,
                start=start_of_run(self.run, self.store, accelerator),
                num_embeddings=model.get_input_embeddings().weight.shape[0],
                tool_form=form,
            ),
            collector=Collector(
                sampler=sampler,
                scorer=scorer,
                eval_scorer=eval_scorer,
                tokenizer=tokenizer,
                accelerator=accelerator,
                seed=args.seed,
                reward_threshold=grading.threshold,
                has_degrees=args.rewards_have_degrees,
                eval_threshold=heldout_threshold(grading, args),
                refuses_negative_rewards=grading.refuses_negative,
                trajectories=trajectories,
            ),
            eos_token_ids=eos_token_ids,
            eos_token_id=tokenizer.eos_token_id,
            **context,
            run=self.run,
            initial_weights=self.initial_weights,
            log_probs=lambda completions, options: score_completions(
                self.model_wrapped, accelerator, traits, completions, options, token_ids
            ),
        )

    def placeholder_rows(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return one row for the parent to be built on; no round ever trains on it."""
        eos = tokenizer.eos_token_id
        return Dataset.from_dict({"input_ids": [[eos, eos]], "labels": [[-100, eos]]})

    def prepare_stages(self, play: SelfPlay) -> SelfPlay:
        """Return the stages as the rounds use them, before their prompts are checked."""
        return play

    def play_round(self, round_index: int) -> PlayedRound:
        """Return what a round trains on; called with the weights that the round begins with."""
        raise NotImplementedError(f"{type(self).__name__} must define play_round(round_index).")

    def initial_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights from before round 0."""
        if not self.has_begun:  # they are in place
            return nullcontext()
        return initial_weights_in_place(self.model, self.args, self.run.initial_weights)

    def identity(self) -> dict[str, Any]:
        """Return, by name, values of the method that must not change when a run is resumed."""
        return {}

    def data_of(self, prompt_ids: Collection[str]) -> dict[str, Any]:
        """Return, by attribute, what a round on only these prompts reads besides the prompts."""
        return {}

    def warm_up_rows(self) -> Dataset | None:
        """Return what to train on before anything is sampled for training; None for nothing."""
        return None

    def train(
        self, resume_from_checkpoint: bool | str | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Run all rounds; `resume_from_checkpoint=True` continues a run in `output_dir`.

        With `dry_run=True` in the config nothing is trained: the run is checked on a few prompts.

        Raises:
            PreflightError: With `dry_run=True`: a run with these settings can't work.
            EmptyRoundError: A round kept nothing and `on_empty_round` is "raise".
            FileExistsError: `output_dir` holds rounds, and `resume_from_checkpoint` is not set.
            ValueError: It holds rounds of another configuration, or `trial` was given.
        """
        return run_rounds(self, super().train, resume_from_checkpoint, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict the parent's tokenized rows, such as those that a round trained on.

        Raises:
            NotImplementedError: `test_dataset` has prompts, which have no labels to predict.
        """
        if "prompt" in (test_dataset.column_names or ()):
            raise NotImplementedError(
                "predict() returns logits of labelled rows, and test_dataset has prompts: score them "
                "with `evaluate(dataset)`, or sample with "
                "`AutoModelForCausalLM.from_pretrained(output_dir)`."
            )
        return super().predict(test_dataset, *args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError: a trial would have to begin with rounds of its own."""
        raise NotImplementedError(
            "hyperparameter search over rounds is not supported: start a run with another output_dir "
            "for each trial, and compare their `eval_` metrics."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save like the parent, also where DeepSpeed's engine is gone since a training ended."""
        is_engine_gone = self.is_deepspeed_enabled and self.model_wrapped is self.model
        with whole_weights_in_place(self) if is_engine_gone else nullcontext():
            self.is_deepspeed_enabled &= not is_engine_gone
            try:
                super().save_model(output_dir, _internal_call)
            finally:
                self.is_deepspeed_enabled |= is_engine_gone

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the round, and with steps counted across rounds."""
        log_with_round(self, super().log, logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card, with the result of each round."""
        super().create_model_card(*args, **kwargs)
        add_rounds_to_card(self)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        self._signature_columns: Any = list(dict.fromkeys([*columns, *self.collated_columns]))

    def load_sets(self, eval_dataset: Any) -> dict[str, list[PromptRow]]:
        """Return the held-out sets that `evaluate` was given, by name; a single one is named "".

        Raises:
            ValueError, TypeError: For rows that can't be scored.
        """
        play = self.self_play
        check_heldout_graders(play.heldout_graders)
        sets = load_heldout_sets(eval_dataset, play.rows, self.load_rows, play.heldout_graders)
        for name, rows in sets.items():
            self.self_play.check_columns(rows, name or "eval_dataset")
        return sets

    def score_sets(
        self,
        sets: Mapping[str, list[PromptRow]],
        prefix: str = "eval",
        folder: Path | None = None,
        with_few_shot: bool = False,
    ) -> HeldOutScores:
        """Score held-out sets with the current weights.

        Args:
            sets: Held-out sets by name, which follows `prefix` in the metrics' names.
            prefix: First part of the metrics' names.
            folder: Keeps what is sampled; what it already holds is not sampled again.
            with_few_shot: Score them with the few-shot examples in the prompt as well.
        """
        return self.self_play.score(sets, folder=folder, prefix=prefix, with_few_shot=with_few_shot)

    def score_heldout(self, round_index: int, folder: Path | None) -> HeldOutScores | None:
        """Score the trainer's held-out sets after a round, or before the first (`UNTRAINED`).

        Returns:
            None without held-out sets.
        """
        sets = self.self_play.heldout
        if not sets:
            return None
        return self.score_sets(sets, folder=folder, with_few_shot=round_index == UNTRAINED)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Score held-out prompts with the current weights, log the metrics and return them.

        Args:
            eval_dataset: A dataset in the form of the trainer's own, a dict of such sets, or the
                name of one of the trainer's sets, whose metrics are then named without it, as in
                the parent. None scores all of the trainer's sets.
            ignore_keys: Has no effect, since evaluation returns no logits.
            metric_key_prefix: First part of the metrics' names.

        Raises:
            ValueError: There is no held-out set, or none of that name.
        """
        own = self.self_play.heldout
        if eval_dataset is None:
            sets = own
        elif isinstance(eval_dataset, str):
            if eval_dataset not in own:
                names = "one set without a name" if [*own] == [""] else sorted(own)
                raise ValueError(f"no held-out set {eval_dataset!r}; eval_dataset has {names}.")
            sets = {"": own[eval_dataset]}
        else:
            sets = self.load_sets(eval_dataset)
        if not sets:
            raise ValueError(
                "evaluate() needs an `eval_dataset` of held-out rows in the form of `train_dataset`."
            )
        with whole_weights_in_place(self):
            scores = self.score_sets(sets, prefix=metric_key_prefix)
        if self.progress is None:  # within a run, the next round samples with the same weights
            self.self_play.collector.sampler.release()
        metrics = {**scores.metrics, f"{metric_key_prefix}_runtime": round(scores.seconds, 4)}
        chosen = self.run.chosen_metric
        if eval_dataset is None and metric_key_prefix == "eval" and chosen is not None:
            metrics.setdefault(chosen, math.nan)  # nothing could be graded; the parent looks it up
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _context(args: Any, traits: ModelTraits) -> dict[str, Any]:
    """Return the most tokens of a prompt with its completion, and whether model or engine says so."""
    length, most = traits.context_length, args.vllm_max_model_length if args.use_vllm else None
    if most is None or (length is not None and length <= most):
        return {"context_length": length}
    return {"context_length": most, "whose_context": "the engine's `vllm_max_model_length`"}
