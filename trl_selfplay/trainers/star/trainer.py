"""STaR: a model trains on its own rationales that reached the right answer.

In: prompts with solutions, reward functions. Out: the model after `num_rounds` rounds.
Source: STaR, arXiv 2203.14465, Algorithm 1. The outer loop is in rounds/loop.py, the
stages of a round are in rounds/stages.py.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from trl import SFTTrainer

from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.prompts import HintFormatter, load_prompt_rows
from trl_selfplay.rollouts.selection import (
    SelectionRules,
    default_normal_form,
    select,
    unsolved_prompts,
)
from trl_selfplay.rollouts.stored import load_history
from trl_selfplay.rounds.identity import name_function
from trl_selfplay.trainers import construction
from trl_selfplay.trainers.ported_scripts import explains_foreign_arguments
from trl_selfplay.trainers.rounds import RoundsMixin
from trl_selfplay.trainers.star.config import STaRConfig
from trl_selfplay.trainers.star.rationalization import add_hint, find_leak, leaks_of_rows
from trl_selfplay.trainers.student import TeachesStudent, read_student
from trl_selfplay.trainers.tool_setup import read_toolbox

_SHOWS_SOLUTIONS = (
    "rationalize=True, which shows the solution as a hint (set it to False otherwise),"
)


class STaRTrainer(TeachesStudent, RoundsMixin, SFTTrainer):
    """Trains a causal language model on its own correct rationales, round after round.

    Takes the arguments of `trl.SFTTrainer` in the same order, and the keyword-only parameters below.
    `train_dataset` has the columns `prompt` (text or chat messages) and `solution`; reward functions
    get all columns. `eval_dataset`, a dataset or a dict of datasets, has held-out prompts of the same
    form.

    Args:
        reward_funcs: As GRPOTrainer takes them: a callable
            `f(prompts, completions, **columns) -> list[float | None]`, an async one, a model id, a
            sequence classifier, or a list of these.
        reward_processing_classes: Tokenizers of reward models, one per entry of `reward_funcs`.
        eval_reward_funcs: Functions that grade held-out completions; None uses `reward_funcs`.
        few_shot_examples: Mappings with `prompt`, `completion` and `solution` that precede every
            prompt during sampling.
        normal_form: Completions of a prompt with equal normal form are duplicates; None compares
            them lower-cased with white space folded.
        hint_formatter: `f(prompt, solution) -> prompt` that shows the answer; None marks the right
            option of a multiple-choice prompt, or puts the answer in parentheses.
        leak_filter: `f(prompt, completion, solution) -> str | None`, the reason why a hinted
            completion quotes its hint instead of reasoning; None uses `find_leak`.
        student_model: Hub id or folder of a smaller model to train once the rounds are finished, like
            `student_args` and `student_peft_config` as in ReSTEMTrainer.
        tools: Functions that completions may call, as GRPOTrainer takes them (docs/tools.md).
        environment_factory: Makes the environment of each completion, as GRPOTrainer takes it. Its
            `get_reward` is one more reward function, beside which `reward_funcs` may be left out.

    Raises:
        ValueError, TypeError: For arguments or rows that can't work, before anything is sampled.

    Source: STaR, arXiv 2203.14465, Algorithm 1.
    """

    args: STaRConfig
    _tag_names = ["trl", "sft", "trl-selfplay", "star"]  # noqa: RUF012  # as in TRL
    _name = "STaR"
    _paper = {  # noqa: RUF012  # as in TRL
        "title": "STaR: Bootstrapping Reasoning With Reasoning",
        "id": "2203.14465",
        "citation": """\
@inproceedings{zelikman2022star,
    title        = {{STaR: Bootstrapping Reasoning With Reasoning}},
    author       = {Eric Zelikman and Yuhuai Wu and Jesse Mu and Noah D. Goodman},
    year         = 2022,
    booktitle    = {Advances in Neural Information Processing Systems 35},
    eprint       = {arXiv:2203.14465},
}""",
    }

    @explains_foreign_arguments
    def __init__(
        self, model: Any, args: STaRConfig | None = None, data_collator: Any = None,
        train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None, compute_metrics: None = None,
        callbacks: list[Any] | None = None, optimizers: tuple[None, None] = (None, None),
        optimizer_cls_and_kwargs: Any = None, preprocess_logits_for_metrics: None = None,
        quantization_config: Any = None, peft_config: Any = None, formatting_func: None = None, *,
        reward_funcs: Any = None, eval_reward_funcs: Any = None,
        reward_processing_classes: Any = None, tools: Sequence[Callable[..., Any]] | None = None,
        environment_factory: Any = None,
        few_shot_examples: Sequence[Mapping[str, Any]] | None = None,
        normal_form: Callable[[str], Hashable] | None = None,
        hint_formatter: HintFormatter | None = None,
        leak_filter: Callable[[Any, str, Any], str | None] | None = None,
        student_model: str | None = None, student_args: Any = None, student_peft_config: Any = None,
    ) -> None:  # fmt: skip
        args = construction.read_config(args, STaRConfig, model, "STaR")
        construction.refuse_arguments(
            compute_metrics=compute_metrics, optimizers=optimizers, formatting_func=formatting_func,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip
        toolbox = read_toolbox(args, tools, environment_factory)
        grading = construction.read_grading(
            args, reward_funcs, reward_processing_classes, eval_reward_funcs, toolbox
        )
        student = read_student(student_model, student_args, student_peft_config, args)
        rows = load_prompt_rows(
            train_dataset,
            "train_dataset",
            _SHOWS_SOLUTIONS if args.rationalize else None,
            reward_funcs,
            toolbox,
        )
        self.normal_form = normal_form or default_normal_form
        self.hint_formatter = hint_formatter or add_hint
        self.leak_filter = leak_filter or find_leak
        super().__init__(
            model, args, rows, eval_dataset=eval_dataset, processing_class=processing_class,
            peft_config=peft_config, quantization_config=quantization_config,
            data_collator=data_collator, callbacks=callbacks,
            compute_loss_func=compute_loss_func, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            grading=grading,
            student=student,
            examples=construction.read_examples(args, few_shot_examples, rows, args.rationalize),
            toolbox=toolbox,
            hint_formatter=self.hint_formatter if args.rationalize else None,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Return the names of the functions that show hints and select completions."""
        return {
            "normal_form": name_function(self.normal_form),
            "hint_formatter": name_function(self.hint_formatter),
            "leak_filter": name_function(self.leak_filter),
        }

    def play_round(self, round_index: int) -> PlayedRound:
        """Sample, grade, rationalize and select: lines 3 to 6 of Algorithm 1 and D of line 7."""
        play, args, folder = self.self_play, self.args, self.run.folder(round_index)
        rows = play.draw_prompts(round_index)
        rollouts = play.sample(rows, round_index, "train", folder)  # lines 3 and 5
        if args.rationalize:
            unsolved = unsolved_prompts(rollouts, args.reward_threshold)
            failed = [row for row in rows if row.prompt_id in unsolved]
            rollouts += play.sample(failed, round_index, "hint", folder)  # lines 4 and 6
        earlier = range(max(round_index - args.history_rounds, 0), round_index)
        prompt_ids = play.training_prompt_ids(play.rows if earlier else rows)
        rules = SelectionRules(
            is_correct=lambda rollout: rollout.passes(args.reward_threshold),
            seed=args.seed + round_index,
            leak_reason=leaks_of_rows(self.leak_filter, rows),
            fits=lambda rollout: play.fits(rollout, prompt_ids),
            normal_form=self.normal_form if args.deduplicate else None,
            max_per_prompt=args.max_per_prompt,
        )
        selection = select(rollouts, rules, history=load_history(map(self.run.folder, earlier)))
        return play.build_sft_round(round_index, selection, prompt_ids)  # line 7
