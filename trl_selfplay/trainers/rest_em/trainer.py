"""ReST^EM, ReST and RFT: expectation maximization with a model's own graded samples.

In: prompts with solutions, reward functions, optionally human completions. Out: the model after
`num_rounds` rounds. The outer loop is in rounds/loop.py, the stages of a round are in rounds/stages.py.

Sources: ReST^EM, arXiv 2312.06585, Algorithm 1; ReST, arXiv 2308.08998, Algorithm 1; RFT, arXiv
2308.01825, section 3.3.
"""

import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from trl import SFTTrainer

from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.prompts import PromptRow, load_prompt_rows
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.rows import WEIGHT, build_training_rows
from trl_selfplay.rollouts.selection import SelectionRules, default_normal_form, select
from trl_selfplay.rollouts.sequence import Rollouts
from trl_selfplay.rollouts.stored import load_history, load_samples
from trl_selfplay.rounds.identity import name_function, summarize
from trl_selfplay.rounds.stages import SelfPlay
from trl_selfplay.rounds.steps import StepPrompts, load_steps
from trl_selfplay.rounds.stepwise import StepwisePlay
from trl_selfplay.tools.agent import Agent
from trl_selfplay.tools.tool_set import ToolSet
from trl_selfplay.trainers import construction
from trl_selfplay.trainers.ported_scripts import explains_foreign_arguments
from trl_selfplay.trainers.rest_em.agent_checks import read_agent_grading
from trl_selfplay.trainers.rest_em.config import ReSTEMConfig
from trl_selfplay.trainers.rest_em.gold import draw_gold
from trl_selfplay.trainers.rest_em.row_weights import (
    WeightCollator,
    relative_weights,
    weigh_log_probs,
)
from trl_selfplay.trainers.rest_em.thresholds import above_threshold
from trl_selfplay.trainers.rounds import RoundsMixin
from trl_selfplay.trainers.student import TeachesStudent, read_student
from trl_selfplay.trainers.tool_setup import read_toolbox

logger = logging.getLogger(__name__)

_NO_STEPS = (
    "No step can be learned: in none could the agent read the sample that would go on, or no answer passed "
    "agent_rewards='answers' (play/parse_failures and play/trajectories_… tell which). Show the form of an "
    "action with the agent's examples, such as SearchAgent(examples=…), raise max_completion_length if actions "
    "are cut, lower the temperature, or draw more samples per step."
)


class ReSTEMTrainer(TeachesStudent, RoundsMixin, SFTTrainer):
    """Trains a causal language model on its own rewarded samples, round after round.

    Takes the arguments of `trl.SFTTrainer` in the same order, and the keyword-only parameters below.
    The datasets have the columns `prompt` (text or chat messages) and `solution`, as for STaRTrainer;
    all columns reach the reward functions.

    Args:
        reward_funcs: As GRPOTrainer takes them: a callable, an async one, a model id, a sequence
            classifier, or a list of these.
        reward_processing_classes: Tokenizers of reward models, one per entry of `reward_funcs`.
        few_shot_examples: Mappings with `prompt` and `completion` that precede every prompt.
        normal_form: Completions of a prompt with equal normal form are duplicates; None compares
            them in lower case with white space folded. RFT's is `trl_selfplay.reasoning_path`.
        agent: A state machine whose steps are sampled one by one, each a training example (arXiv
            2312.10003), such as `trl_selfplay.tools.search_agent.SearchAgent`. `reward_funcs` then
            rank the samples of each step, or are left out; `agent_rewards="answers"` grades answers.
        gold_dataset: Human completions to mix in: `prompt` and `completion`, or `messages`. With
            `improve_thresholds` they are graded and filtered like the model's own.
        eval_reward_funcs: Functions that grade held-out completions instead of `reward_funcs`: the
            true scorer if `reward_funcs` is a reward model, whose own score also rises when it is
            exploited. None uses `reward_funcs`.
        student_model: Hub id or folder of a smaller model. Once the rounds are finished it is trained on
            the mixture of the last one, which nothing samples anew, into `output_dir/student`.
        student_args: How: an SFTConfig, or a mapping of its fields that differ from `args`; None: as
            in `args`.
        student_peft_config: For new adapters of the student.
        tools: Functions that completions may call, as GRPOTrainer takes them (docs/tools.md).
        environment_factory: Makes the environment of each completion, as GRPOTrainer takes it. Its
            `get_reward` is one more reward function, beside which `reward_funcs` may be left out.

    Raises:
        ValueError, TypeError: For arguments or rows that can't work, before anything is sampled.

    Source: ReST^EM, arXiv 2312.06585, Algorithm 1.
    """

    args: ReSTEMConfig
    collated_columns = (WEIGHT,)
    _tag_names = ["trl", "sft", "trl-selfplay", "rest-em"]  # noqa: RUF012  # as in TRL
    _name = "ReST^EM"
    _paper = {  # noqa: RUF012  # as in TRL
        "title": (
            "Beyond Human Data: Scaling Self-Training for Problem-Solving with Language Models"
        ),
        "id": "2312.06585",
        "citation": """\
@article{singh2024beyond,
    title        = {{Beyond Human Data: Scaling Self-Training for Problem-Solving with Language Models}},
    author       = {Avi Singh and John D. Co-Reyes and Rishabh Agarwal and others},
    year         = 2024,
    journal      = {Transactions on Machine Learning Research},
    eprint       = {arXiv:2312.06585},
}""",
    }

    @explains_foreign_arguments
    def __init__(
        self, model: Any, args: ReSTEMConfig | None = None, data_collator: Any = None,
        train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None, compute_metrics: None = None,
        callbacks: list[Any] | None = None, optimizers: tuple[None, None] = (None, None),
        optimizer_cls_and_kwargs: Any = None, preprocess_logits_for_metrics: None = None,
        quantization_config: Any = None, peft_config: Any = None, formatting_func: None = None, *,
        reward_funcs: Any = None, eval_reward_funcs: Any = None,
        reward_processing_classes: Any = None, tools: Sequence[Callable[..., Any]] | None = None,
        environment_factory: Any = None,
        few_shot_examples: Sequence[Mapping[str, Any]] | None = None,
        normal_form: Callable[[str], Hashable] | None = None, gold_dataset: Any = None,
        student_model: str | None = None, student_args: Any = None, student_peft_config: Any = None,
        agent: Agent | None = None,
    ) -> None:  # fmt: skip
        args = construction.read_config(args, ReSTEMConfig, model, "ReSTEM")
        construction.refuse_arguments(
            compute_metrics=compute_metrics, optimizers=optimizers, formatting_func=formatting_func,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip
        if gold_dataset is None:
            _refuse_without_gold(args)
        weighs = args.loss_weighting == "reward"
        if weighs and compute_loss_func is not None:
            raise ValueError(
                "loss_weighting='reward' with a `compute_loss_func`: the weights would not reach "
                "it. Leave one out."
            )
        args.ranks_steps = agent is not None and args.agent_rewards == "steps"
        toolbox = read_toolbox(args, tools, environment_factory)
        grading = construction.read_grading(
            args, reward_funcs, reward_processing_classes, eval_reward_funcs, toolbox
        )
        grading = read_agent_grading(
            agent, args, grading, eval_dataset, tools=tools, environment_factory=environment_factory,
            gold_dataset=gold_dataset, few_shot_examples=few_shot_examples, normal_form=normal_form,
        )  # fmt: skip
        self.agent = agent
        rows = load_prompt_rows(
            train_dataset, "train_dataset", reward_funcs=reward_funcs, toolbox=toolbox
        )
        student = read_student(student_model, student_args, student_peft_config, args)
        self.normal_form = normal_form or default_normal_form
        super().__init__(
            model, args, rows, eval_dataset=eval_dataset, processing_class=processing_class,
            peft_config=peft_config, quantization_config=quantization_config,
            data_collator=data_collator, callbacks=callbacks,
            compute_loss_func=compute_loss_func, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            grading=replace(grading, refuses_negative=weighs),
            student=student,
            examples=construction.read_examples(args, few_shot_examples, rows, agent=agent), toolbox=toolbox,
        )  # fmt: skip
        if weighs:
            self.data_collator = WeightCollator(self.data_collator)
        self.gold = self.self_play.load_gold(
            gold_dataset, needs_solutions=args.improve_thresholds is not None
        )

    def identity(self) -> dict[str, Any]:
        """Return the name of the normal form, and a digest of the gold completions."""
        found: dict[str, Any] = {
            "normal_form": name_function(self.normal_form),
            "gold_dataset": summarize(self.gold.pairs),
        }
        if self.agent is not None:
            found["agent"] = [name_function(self.agent), summarize([self.agent.identity])]
        return found

    def data_of(self, prompt_ids: Collection[str]) -> dict[str, Any]:
        """Return the gold completions of these prompts."""
        return {"gold": self.gold.of_prompts(prompt_ids)}

    def warm_up_rows(self) -> Dataset | None:
        """Return the gold completions if `warm_up_on_gold` is set."""
        if not self.args.warm_up_on_gold:
            return None
        return build_training_rows(
            self._fitting(self.gold.rollouts),
            self._prompt_ids(self.self_play.rows),
            self.self_play.eos_token_id,
            seed=self.args.seed,
            completion_only=self.args.completion_only_loss is not False,
        )

    def prepare_stages(self, play: SelfPlay) -> SelfPlay:
        """Return stages that play the agent's steps, if there is an agent."""
        if self.agent is None:
            return play
        tools = read_toolbox(self.args, list(self.agent.tools), None)
        return StepwisePlay.of(play, self.agent, tools or ToolSet([], self.args.tool_deadline))

    def trained_prompts(self, round_index: int, play: SelfPlay) -> Mapping[str, tuple[int, ...]]:
        """Return the prompts of a finished round; those of an agent's steps are on disk."""
        if not isinstance(self.self_play, StepwisePlay):
            return super().trained_prompts(round_index, play)
        path = self.run.folder(round_index) / "steps.parquet"
        return StepPrompts(load_steps(path), play.formatter)

    def play_round(self, round_index: int) -> PlayedRound:
        """Grow (the E-step): sample and grade; Improve: select what the M-step trains on."""
        if isinstance(self.self_play, StepwisePlay):
            return self._play_steps(self.self_play, round_index)
        play, args, folder = self.self_play, self.args, self.run.folder(round_index)
        improve = round_index % args.num_improve_steps
        grow = round_index - improve  # the round that samples
        rows = play.draw_prompts(grow)
        if improve == 0:
            rollouts = play.sample(rows, round_index, "train", folder)
        else:  # an Improve step on the same samples and scores
            rollouts = load_samples(self.run.folder(grow))
        step = args.num_improve_steps
        earlier = range(max(grow - args.history_rounds * step, 0), grow, step)
        history, gold = load_history(map(self.run.folder, earlier)), self._score_gold()
        prompt_ids = self._prompt_ids(play.rows if earlier else rows)
        is_selected = self._selection_rule(improve, rollouts + history + gold)
        if args.improve_thresholds is not None:
            gold = [rollout for rollout in gold if is_selected(rollout)]
        rules = SelectionRules(
            is_correct=is_selected,
            seed=args.seed + grow,
            fits=lambda rollout: play.fits(rollout, prompt_ids),
            normal_form=self.normal_form if args.deduplicate else None,
            max_per_prompt=args.max_per_prompt,
            best_first=args.improve_thresholds is not None,
        )
        beside = gold if args.deduplicate_against_gold else ()
        selection = select(rollouts, rules, history=history, beside=beside)
        num_own = len(selection.kept) + len(selection.history)
        gold = draw_gold(self._fitting(gold), args.gold_ratio, num_own, args.seed + grow)
        played = play.build_sft_round(
            round_index,
            replace(selection, gold=tuple(gold)),
            prompt_ids,
            weigh=relative_weights if args.loss_weighting == "reward" else None,
        )
        self._warn_repeated(played, improve, round_index)
        return played

    def _play_steps(self, play: StepwisePlay, round_index: int) -> PlayedRound:
        """Grow: play trajectories; Improve: train on the best sample of each step.

        Source: arXiv 2312.10003, section 3.6.
        """
        folder = self.run.folder(round_index)
        plays = play.play_steps(play.draw_prompts(round_index), round_index, folder)
        failed = () if play.ranks else play.failed_steps(plays, round_index, folder)
        rows = [step.row for step in plays.steps]
        prompt_ids = StepPrompts(rows, play.formatter)
        selection = plays.select(lambda rollout: play.fits(rollout, prompt_ids), failed)
        played = play.build_sft_round(
            round_index, selection, prompt_ids, metrics=plays.metrics(selection)
        )
        is_explained = played.num_examples > 0 or played.funnel.unhinted.too_long > 0
        return played if is_explained else replace(played, remedy=_NO_STEPS)

    def _selection_rule(self, improve: int, rollouts: Rollouts) -> Callable[[Rollout], bool]:
        """Return F(x, y; τ): the threshold of this Improve step, or that of the reward."""
        args = self.args
        if args.improve_thresholds is not None:
            level = args.improve_thresholds[improve]
            is_above = above_threshold(rollouts, args.threshold_kind, level)
        elif args.loss_weighting == "reward":
            is_above = above_threshold((), "value", 0.0)
        else:
            return lambda rollout: rollout.passes(args.reward_threshold)
        return lambda rollout: rollout.is_finished and is_above(rollout)

    def _warn_repeated(self, played: PlayedRound, improve: int, round_index: int) -> None:
        """Warn of an Improve step that selects the same completions as the one before.

        A higher threshold selects a subset, so equal counts mean equal selections.
        """
        if improve == 0 or played.num_examples == 0 or self.progress is None:
            return
        if played.num_examples == self.progress.lines[round_index - 1]["examples"]:
            logger.warning(
                "round %d: this Improve step selects the same %d completions as the one before, so "
                "it only repeats that step. Use thresholds that are further apart, a finer-grained "
                "reward, or a higher max_per_prompt.",
                round_index,
                played.num_examples,
            )

    def _score_gold(self) -> list[Rollout]:
        """Return the gold completions, graded once per run if thresholds filter them.

        Source: ReST, arXiv 2308.08998, Algorithm 1: all of D_g is scored, the original data too.
        """
        if self.args.improve_thresholds is None:
            return list(self.gold.rollouts)
        return self.self_play.grade_gold(self.gold, self.run.root / "gold.parquet")

    def _prompt_ids(self, rows: Sequence[PromptRow]) -> dict[str, tuple[int, ...]]:
        """Return the prompts as trained on, those of gold completions as well."""
        return self.self_play.training_prompt_ids([*rows, *self.gold.rows.values()])

    def _fitting(self, gold: Sequence[Rollout]) -> list[Rollout]:
        return self.self_play.drop_long_gold(gold, self._prompt_ids(()))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the parent's loss, with each row's log-likelihood multiplied by its weight."""
        if (weights := inputs.pop(WEIGHT, None)) is not None:
            model = weigh_log_probs(model, weights)
        return super().compute_loss(model, inputs, *args, **kwargs)


def _refuse_without_gold(args: Any) -> None:
    """Raise ValueError for settings of gold completions if there are none."""
    for name, neutral in (
        ("warm_up_on_gold", False),
        ("gold_ratio", None),
        ("deduplicate_against_gold", False),
    ):
        if (value := getattr(args, name, neutral)) != neutral:
            raise ValueError(
                f"{name}={value!r} needs a `gold_dataset` of human completions; there is none."
            )
