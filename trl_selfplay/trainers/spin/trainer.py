"""SPIN: a model learns to tell the data from its former self, until they can't be told apart.

In: prompts with the data's completions. Out: the model after `num_rounds` rounds.
Source: SPIN, arXiv 2401.01335, Algorithm 1 and equation 4.7. The opponent is the
reference of `ReferenceMixin`: the policy as it enters the round.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOTrainer

from trl_selfplay.evaluation.heldout import HeldOutScores, metric_prefixes
from trl_selfplay.evaluation.monitor import find_convergence
from trl_selfplay.evaluation.progress import say
from trl_selfplay.generation.sampler import build_sampling_options
from trl_selfplay.peers import wait_for_all
from trl_selfplay.rollouts.completions import (
    ChosenTokens,
    drop_long_rows,
    load_chosen_rows,
    tokenize_chosen,
)
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.rows import Pair, shuffled_order
from trl_selfplay.rollouts.stored import load_kept
from trl_selfplay.rounds.run import UNTRAINED
from trl_selfplay.rounds.stages import SelfPlay
from trl_selfplay.trainers.construction import Grading, read_config, refuse_arguments
from trl_selfplay.trainers.ported_scripts import explains_foreign_arguments
from trl_selfplay.trainers.reference import ReferenceMixin
from trl_selfplay.trainers.rounds import RoundsMixin
from trl_selfplay.trainers.spin.config import SPINConfig
from trl_selfplay.trainers.spin.discriminator import (
    build_heldout_rows,
    load_scores,
    measure_heldout,
    save_scores,
    warn_falling_likelihood,
)
from trl_selfplay.trainers.spin.pairs import (
    find_giveaways,
    pair_metrics,
    pair_up,
    select_pairs,
)

logger = logging.getLogger(__name__)

_REMEDY = (
    "If completions are truncated, raise max_completion_length, or start from a model that knows "
    "its EOS token, such as one that was fine-tuned on this data. If they are empty, the model ends "
    "at once: check that the chat template's generation prompt is the one it was trained with. If "
    "all equal the data's, there is nothing left to learn."
)


class SPINTrainer(ReferenceMixin, RoundsMixin, DPOTrainer):
    """Trains a causal language model against its own completions, round after round.

    Takes the arguments of `trl.DPOTrainer` in the same order. `train_dataset` has the columns `prompt`
    and `completion`, or `messages` (the last assistant turn is the completion), or `prompt` and
    `chosen`. The rejected completions are the model's own. `eval_dataset`, a dataset or a dict of
    datasets, has held-out rows of the same form.

    Args:
        eval_reward_funcs: Functions that grade the policy's completions of held-out prompts, as
            GRPOTrainer takes them. `eval_accuracy` then chooses the best round, unless
            `metric_for_best_model` names another metric; without such functions, the likelihood of
            the data does (`eval_logps`). They get every column of `eval_dataset`; without a column
            `solution`, they get the data's completion under that name.

    Raises:
        ValueError, TypeError: For arguments or rows that can't work, before anything is sampled.

    Source: SPIN, arXiv 2401.01335, Algorithm 1.
    """

    args: SPINConfig
    load_rows = staticmethod(load_chosen_rows)
    _tag_names = ["trl", "dpo", "trl-selfplay", "spin"]  # noqa: RUF012  # as in TRL
    _name = "SPIN"
    _paper = {  # noqa: RUF012  # as in TRL
        "title": "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models",
        "id": "2401.01335",
        "citation": """\
@inproceedings{chen2024selfplay,
    title        = {{Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models}},
    author       = {Zixiang Chen and Yihe Deng and Huizhuo Yuan and Kaixuan Ji and Quanquan Gu},
    year         = 2024,
    booktitle    = {Proceedings of the 41st International Conference on Machine Learning},
    eprint       = {arXiv:2401.01335},
}""",
    }

    @explains_foreign_arguments
    def __init__(
        self, model: Any, ref_model: None = None, args: SPINConfig | None = None,
        data_collator: Any = None, train_dataset: Any = None, eval_dataset: Any = None,
        processing_class: Any = None, compute_metrics: None = None,
        callbacks: list[Any] | None = None, optimizers: tuple[None, None] = (None, None),
        quantization_config: Any = None, peft_config: Any = None, *,
        eval_reward_funcs: Any = None,
    ) -> None:  # fmt: skip
        args = read_config(args, SPINConfig, model, "SPIN")
        refuse_arguments(
            ref_model=ref_model, compute_metrics=compute_metrics, optimizers=optimizers
        )
        rows = load_chosen_rows(train_dataset, "train_dataset")
        if eval_reward_funcs is not None:
            if not eval_dataset:
                raise ValueError("eval_reward_funcs needs an `eval_dataset` of held-out prompts.")
            args.choose_by_task_score()
        super().__init__(
            model, args, rows, eval_dataset=eval_dataset, processing_class=processing_class,
            peft_config=peft_config, quantization_config=quantization_config,
            data_collator=data_collator, callbacks=callbacks,
            grading=Grading(eval_reward_funcs=eval_reward_funcs),
        )  # fmt: skip
        self._heldout_pairs: dict[str, Dataset] = {}

    def prepare_stages(self, play: SelfPlay) -> SelfPlay:
        """Tokenize the data's completions, and leave out the rows that are too long."""
        self.chosen: dict[str, ChosenTokens] = {}
        rows = self._tokenize(play, play.rows, "train_dataset")
        return replace(play, rows=rows, heldout=self._tokenize_sets(play, play.heldout))

    def _tokenize(self, play: SelfPlay, rows: list[PromptRow], name: str) -> list[PromptRow]:
        args = self.args
        tokens = tokenize_chosen(play.formatter, rows, play.eos_token_ids, play.eos_token_id)
        self.chosen |= tokens
        most = build_sampling_options(args, ()).max_completion_length
        return drop_long_rows(rows, tokens, args.max_length, most, name)

    def _tokenize_sets(
        self, play: SelfPlay, sets: Mapping[str, list[PromptRow]]
    ) -> dict[str, list[PromptRow]]:
        return {
            name: self._tokenize(play, rows, f"eval_dataset {name}".strip())
            for name, rows in sets.items()
        }

    def play_round(self, round_index: int) -> PlayedRound:
        """Sample y' from `p_θt(·|x)`, pair it with the data's y, and score both under `p_θt`."""
        play, args, folder = self.self_play, self.args, self.run.folder(round_index)
        self.beta = args.beta  # the round's own, see `round_betas`
        rollouts = play.sample(play.draw_prompts(round_index), round_index, "train", folder)
        selection = select_pairs(rollouts, self.chosen, args.max_length)
        earlier = range(max(round_index - args.history_rounds, 0), round_index)
        rejected = selection.kept
        for t in earlier:
            rejected += load_kept(self.run.folder(t))
        play.keep_selection(folder, selection)
        self._warn_giveaways(pair_up(rejected, self.chosen), round_index)
        order = shuffled_order(len(rejected), args.seed + round_index)
        pairs = pair_up(rejected.pick(order), self.chosen)
        training_rows = self.store_pairs(pairs, folder / "dataset")  # log p_θt(y), log p_θt(y')
        self._play_heldout(round_index, folder)
        return PlayedRound(
            training_rows,
            len(training_rows) if selection.kept else 0,  # earlier rounds' pairs alone are no round
            selection.funnel,
            selection.rollouts,
            pair_metrics(selection, self.chosen, len(training_rows)),
            {},
            _REMEDY,
            selection.outcomes,
        )

    def _play_heldout(self, round_index: int, folder: Path) -> None:
        """Sample the opponent's completions of the held-out prompts, and score both sides under it."""
        for name, rows in self.self_play.heldout.items():
            where = folder / "evaluation" / name
            rollouts = self.self_play.sample(rows, round_index, "eval", where)
            pairs = build_heldout_rows(rows, self.chosen, rollouts)
            with self._whole_completions():
                self._heldout_pairs[name] = self.store_reference(pairs, where / "pairs")

    @contextmanager
    def _whole_completions(self) -> Iterator[None]:
        """Sum log-probs over whole completions even with `ld_alpha`, which gives tails less weight.

        Where a tail begins depends on the other completion, and held-out scores of the data's
        completions must not depend on the opponent's.
        """
        ld_alpha, self.ld_alpha = self.ld_alpha, None
        try:
            yield
        finally:
            self.ld_alpha = ld_alpha

    def _warn_giveaways(self, pairs: Iterable[Pair], round_index: int) -> None:
        tokenizer: Any = self.self_play.formatter.tokenizer  # its stubs know lists of texts only
        found = find_giveaways(
            ((pair.chosen_ids, pair.rejected_ids) for pair in pairs),
            lambda token: tokenizer.decode([token]),
            self.self_play.eos_token_ids,
        )
        if found:
            logger.warning(
                "round %d: the opponent's completions can be told apart without reading them: %s. "
                "If this is format and not style, the round learns the format: look at the data's "
                "first and last tokens, the chat template and max_completion_length.",
                round_index,
                "; ".join(found),
            )

    def score_heldout(self, round_index: int, folder: Path | None) -> HeldOutScores | None:
        """Score the policy on held-out prompts, against the opponent of the round that it ended.

        Scores in `folder` are read back: a resumed run no longer has the weights of before round 0.
        """
        if not self.self_play.heldout:
            return None
        path = None if folder is None else folder / "scores.json"
        if path is not None and (scored := load_scores(path)) is not None:
            return scored
        scores = self.score_sets(self.self_play.heldout, folder=folder)
        wait_for_all(self.accelerator)  # all have looked before one writes
        if path is not None and self.is_world_process_zero():
            save_scores(path, scores)
        for prefix in metric_prefixes(list(self.self_play.heldout), "eval").values():
            if self.is_world_process_zero() and (text := find_convergence(scores.metrics, prefix)):
                say(f"round {round_index}: {text}")
        self._warn_choice(round_index, scores)
        return scores

    def _warn_choice(self, round_index: int, scores: HeldOutScores) -> None:
        """Warn if likelihood, which often falls although SPIN works, chooses the best round."""
        chosen = self.run.chosen_metric or ""
        if round_index == UNTRAINED or not chosen.endswith("_logps"):
            return
        untrained = load_scores(self.run.folder(UNTRAINED) / "evaluation" / "scores.json")
        if untrained is None or not (self.run.loads_best_round and self.is_world_process_zero()):
            return
        before, prefix = untrained.metrics, chosen.removesuffix("_logps")
        if warning := warn_falling_likelihood(before, scores.metrics, round_index, prefix):
            logger.warning("%s", warning)

    def load_sets(self, eval_dataset: Any) -> dict[str, list[PromptRow]]:
        """Return the held-out sets that `evaluate` was given, with the data's completions."""
        return self._tokenize_sets(self.self_play, super().load_sets(eval_dataset))

    def score_sets(
        self, sets: Mapping[str, list[PromptRow]], prefix: str = "eval",
        folder: Path | None = None, with_few_shot: bool = False,
    ) -> HeldOutScores:  # fmt: skip
        """Score the data's completions, and how well the policy tells them from its opponent's.

        The opponent's completions are those that the last round sampled for the trainer's own sets.
        """
        started = time.monotonic()
        metrics: dict[str, float] = {}
        first: dict[str, float] | None = None
        num_tokens = 0
        for name, set_prefix in metric_prefixes(list(sets), prefix).items():
            pairs = self._pairs_of(sets[name])
            with self._whole_completions():
                logps = self.score_pairs(pairs, self.compute_policy_log_probs)
            measured, per_prompt = measure_heldout(pairs, logps, self.beta, set_prefix)
            metrics |= measured
            first = per_prompt if first is None else first
        if self.self_play.collector.heldout_scorer is not None:
            graded = super().score_sets(sets, prefix, folder)
            metrics, first = {**metrics, **graded.metrics}, dict(graded.by_prompt)
            num_tokens = graded.num_tokens
        return HeldOutScores(metrics, first or {}, time.monotonic() - started, num_tokens)

    def _pairs_of(self, rows: list[PromptRow]) -> Dataset:
        """Return held-out rows, with the opponent's completions if it was sampled for them."""
        sets = self.self_play.heldout
        name = next((name for name, own in sets.items() if own is rows), None)
        if name is None or name not in self._heldout_pairs:
            return build_heldout_rows(rows, self.chosen, ())
        return self._heldout_pairs[name]
