"""IRPO: a model learns to prefer its right answers to its wrong ones, round after round.

In: prompts with solutions, reward functions, optionally human completions. Out: the model after
`num_rounds` rounds. rollouts/pairs.py decides which completions are paired; loss.py has the loss's second term.

Source: IRPO, arXiv 2404.19733, section 2.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trl import DPOTrainer

from trl_selfplay.rollouts.gold import Gold
from trl_selfplay.rollouts.pairs import pair_rollouts
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.prompts import PromptRow, load_prompt_rows
from trl_selfplay.rounds.identity import summarize
from trl_selfplay.trainers import construction
from trl_selfplay.trainers.irpo.config import IRPOConfig
from trl_selfplay.trainers.irpo.loss import KeptLogProbs, chosen_nll
from trl_selfplay.trainers.ported_scripts import explains_foreign_arguments
from trl_selfplay.trainers.reference import ReferenceMixin
from trl_selfplay.trainers.rounds import RoundsMixin
from trl_selfplay.trainers.tool_setup import read_toolbox

_REMEDY = (
    "No prompt has both a right and a wrong completion that could be paired. Sample more of them "
    "(num_generations), at a higher temperature where all are right, or take other prompts."
)


class IRPOTrainer(ReferenceMixin, RoundsMixin, DPOTrainer):
    """Trains a causal language model on pairs of its own right and wrong completions.

    Takes the arguments of `trl.DPOTrainer` in the same order, and the keyword-only parameters below.
    The datasets have the columns `prompt` (text or chat messages) and `solution`, as for STaRTrainer;
    all columns reach the reward functions. The loss is DPO's against the policy as it enters the
    round, plus `nll_coef` times the chosen completions' negative log-likelihood per token.

    Args:
        reward_funcs: As GRPOTrainer takes them. A completion with a reward of at least
            `reward_threshold` is right, one below it wrong. Truncated completions and those without
            a reward are neither.
        eval_reward_funcs: Functions that grade held-out completions; None uses `reward_funcs`.
        reward_processing_classes: Tokenizers of reward models, one per entry of `reward_funcs`.
        few_shot_examples: Mappings with `prompt` and `completion` that precede every prompt.
        gold_dataset: Human completions of training prompts: `prompt` and `completion`, or
            `messages`. They are graded like the model's own, and right ones may be chosen.
        tools: Functions that completions may call, as GRPOTrainer takes them (docs/tools.md).
        environment_factory: Makes the environment of each completion, as GRPOTrainer takes it. Its
            `get_reward` is one more reward function, beside which `reward_funcs` may be left out.

    Raises:
        ValueError, TypeError: For arguments or rows that can't work, before anything is sampled.

    Source: IRPO, arXiv 2404.19733, section 2.
    """

    args: IRPOConfig
    _tag_names = ["trl", "dpo", "trl-selfplay", "irpo"]  # noqa: RUF012  # as in TRL
    _name = "IRPO"
    _paper = {  # noqa: RUF012  # as in TRL
        "title": "Iterative Reasoning Preference Optimization",
        "id": "2404.19733",
        "citation": """\
@inproceedings{pang2024iterative,
    title        = {{Iterative Reasoning Preference Optimization}},
    author       = {Richard Yuanzhe Pang and Weizhe Yuan and Kyunghyun Cho and He He and Sainbayar Sukhbaatar and Jason Weston},
    year         = 2024,
    booktitle    = {Advances in Neural Information Processing Systems 37},
    eprint       = {arXiv:2404.19733},
}""",
    }

    @explains_foreign_arguments
    def __init__(
        self, model: Any, ref_model: None = None, args: IRPOConfig | None = None,
        data_collator: Any = None, train_dataset: Any = None, eval_dataset: Any = None,
        processing_class: Any = None, compute_metrics: None = None,
        callbacks: list[Any] | None = None, optimizers: tuple[None, None] = (None, None),
        quantization_config: Any = None, peft_config: Any = None, *,
        reward_funcs: Any = None, eval_reward_funcs: Any = None,
        reward_processing_classes: Any = None, tools: Sequence[Callable[..., Any]] | None = None,
        environment_factory: Any = None,
        few_shot_examples: Sequence[Mapping[str, Any]] | None = None, gold_dataset: Any = None,
    ) -> None:  # fmt: skip
        args = construction.read_config(args, IRPOConfig, model, "IRPO")
        construction.refuse_arguments(
            ref_model=ref_model, compute_metrics=compute_metrics, optimizers=optimizers
        )
        _refuse_single_samples(args, gold_dataset)
        toolbox = read_toolbox(args, tools, environment_factory)
        grading = construction.read_grading(
            args, reward_funcs, reward_processing_classes, eval_reward_funcs, toolbox
        )
        rows = load_prompt_rows(
            train_dataset, "train_dataset", reward_funcs=reward_funcs, toolbox=toolbox
        )
        super().__init__(
            model, args, rows, eval_dataset=eval_dataset, processing_class=processing_class,
            peft_config=peft_config, quantization_config=quantization_config,
            data_collator=data_collator, callbacks=callbacks,
            examples=construction.read_examples(args, few_shot_examples, rows), grading=grading,
            toolbox=toolbox,
        )  # fmt: skip
        self.gold = self.self_play.load_gold(gold_dataset, needs_solutions=True)
        _refuse_unpaired(self.gold, rows)

    def identity(self) -> dict[str, Any]:
        """Return a digest of the gold completions."""
        return {"gold_dataset": summarize(self.gold.pairs)}

    def data_of(self, prompt_ids: Collection[str]) -> dict[str, Any]:
        """Return the gold completions of these prompts."""
        return {"gold": self.gold.of_prompts(prompt_ids)}

    def play_round(self, round_index: int) -> PlayedRound:
        """Sample and grade under M_t, pair right with wrong, and score the pairs under M_t."""
        play, args, folder = self.self_play, self.args, self.run.folder(round_index)
        rows, seed = play.draw_prompts(round_index), args.seed + round_index
        rollouts = play.sample(rows, round_index, "train", folder)
        prompt_ids = play.training_prompt_ids(rows)
        gold = play.grade_gold(self.gold, self.run.root / "gold.parquet")
        gold = [rollout for rollout in gold if rollout.prompt_id in prompt_ids]
        pairing = pair_rollouts(
            rollouts,
            play.drop_long_gold(gold, prompt_ids),
            is_right=lambda rollout: rollout.passes(args.reward_threshold),
            fits=lambda rollout: play.fits(rollout, prompt_ids),
            deduplicate=args.deduplicate,
            max_pairs=args.max_per_prompt,
            seed=seed,
        )
        played = self.build_pair_round(  # with the log-probs of both under M_t
            round_index,
            pairing.selection,
            pairing.chosen,
            pairing.rejected,
            prompt_ids,
            pairing.metrics,
        )
        return replace(played, remedy=_REMEDY) if played.funnel.correct else played

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return DPO's loss plus `nll_coef` times the chosen completions' loss per token."""
        forward = KeptLogProbs(model)
        loss = super().compute_loss(forward, inputs, *args, **kwargs)
        loss, *outputs = loss if isinstance(loss, tuple) else (loss,)
        nll = chosen_nll(forward.log_probs, inputs["completion_mask"])
        mode = "train" if model.training else "eval"
        self._metrics[mode]["nll"].append(self.accelerator.gather(nll.detach()).mean().item())
        loss = loss + self.args.nll_coef * nll
        return (loss, *outputs) if outputs else loss


def _refuse_single_samples(args: IRPOConfig, gold_dataset: Any) -> None:
    """Raise ValueError if no prompt could ever have both a right and a wrong completion."""
    if args.num_generations == 1 and gold_dataset is None:
        raise ValueError(
            "num_generations=1 without a `gold_dataset`: a pair needs a right and a wrong completion "
            "of the same prompt. Sample at least 2 per prompt."
        )


def _refuse_unpaired(gold: Gold, rows: Sequence[PromptRow]) -> None:
    """Raise ValueError for human completions of prompts that are never sampled."""
    unknown = gold.rows.keys() - {row.prompt_id for row in rows}
    if unknown:
        example = next(row for name, row in gold.rows.items() if name in unknown)
        raise ValueError(
            f"`gold_dataset` has {len(unknown)} prompts that are not in `train_dataset`, such as row "
            f"{example.row_index}: no wrong completion of theirs is sampled, so they would never be "
            "in a pair. Leave them out."
        )
