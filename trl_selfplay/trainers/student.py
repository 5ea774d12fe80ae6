"""Self-distillation: train a smaller model on what a run selected for its policy.

In: the folder of a run whose rounds are finished, and a smaller model. Out: that model, trained on the
mixture of the last finished round, with its held-out scores before and after. Nothing is sampled for
training: the rows are those on disk. To the rest of the package the student is a run of one round.

Source: ReST meets ReAct, arXiv 2312.10003, section 3.6.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig, SFTTrainer

from trl_selfplay.disk import refuse_missing_path
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rewards.grading_model import GradingModel
from trl_selfplay.rollouts.funnel import describe_causes
from trl_selfplay.rollouts.gold import Gold
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.rendering import PromptFormatter
from trl_selfplay.rollouts.retokenized import retokenize
from trl_selfplay.rollouts.selection import Outcome, Selection
from trl_selfplay.rollouts.sequence import Rollouts
from trl_selfplay.rollouts.stored import read_history
from trl_selfplay.rounds.identity import summarize_each
from trl_selfplay.rounds.stages import SelfPlay
from trl_selfplay.trainers.construction import Grading, load_processing_class
from trl_selfplay.trainers.graded_config import GradedConfig
from trl_selfplay.trainers.rounds import RoundsMixin
from trl_selfplay.trainers.tool_setup import choose_form

logger = logging.getLogger(__name__)

# Fields of the policy's config that say how held-out prompts are asked and judged.
_AS_THE_POLICY = (
    "max_completion_length", "top_p", "top_k", "min_p", "repetition_penalty", "stop_strings",
    "generation_kwargs", "chat_template_kwargs", "sanitize_control_tokens", "num_generations_eval",
    "temperature_eval", "few_shot_in_training", "reward_threshold", "max_tool_calling_iterations",
    "tool_deadline", "tool_format",
)  # fmt: skip
# Fields of TRL's config that name the held-out metric, as the policy's are called.
_OF_BEST = ("metric_for_best_model", "greater_is_better")
# Fields of TRL's config that belong to one model, its folder and its repository.
_OF_ONE_MODEL = (
    "output_dir", "run_name", "push_to_hub", "hub_model_id", "chat_template_path", "eos_token",
    "pad_token", "resume_from_checkpoint",
)  # fmt: skip
_UNNAMED_FOLDER = "trainer_output"  # the `output_dir` of a config that was given none


@dataclass
class StudentConfig(GradedConfig, SFTConfig):
    """Configuration of a student: SFTConfig's fields, and how its held-out scores are taken."""


@dataclass(frozen=True, slots=True)
class Student:
    """A smaller model to train on a run's mixture, checked before the run begins.

    Attributes:
        model: Its Hub id or folder.
        args: How it is trained and scored.
        tokenizer: The policy's if both have the same vocabulary.
        peft_config: For new adapters, or None.
    """

    model: str
    args: StudentConfig
    tokenizer: PreTrainedTokenizerBase
    peft_config: Any = None


def read_student(
    model: Any, args: SFTConfig | Mapping[str, Any] | None, peft_config: Any, policy: Any
) -> tuple[str, StudentConfig, Any] | None:
    """Check the arguments of a student, before anything is loaded; None if there is none.

    Args:
        model: Its Hub id or folder.
        args: How it is trained: TRL's config; or fields that differ from the policy's; None: none does.
        peft_config: For new adapters.
        policy: The config of the trainer whose selections it is trained on.

    Raises:
        FileNotFoundError: `model` is the path of a folder that isn't there.
        TypeError: `model` is no id or folder, or `args` is a config of another kind.
        ValueError: An adapter's folder; settings that can't work, that are the policy's for both, or
            without a student.
    """
    if model is None:
        given = {"student_args": args, "student_peft_config": peft_config}
        for name in (name for name, value in given.items() if value is not None):
            raise ValueError(f"`{name}` was given without a `student_model`, which it is for.")
        return None
    if not isinstance(model, str | Path):
        raise TypeError(
            f"student_model is a {type(model).__name__}; give its Hub id or folder: it is loaded once the "
            "rounds are finished, so that the policy has the memory until then."
        )
    refuse_missing_path(str(model), "student_model")
    if (Path(model) / "adapter_config.json").exists():
        raise ValueError(
            f"student_model={str(model)!r} is the folder of an adapter. Merge it into its base (PEFT's "
            "merge_and_unload), save that with its tokenizer, and give its folder; or give the base and "
            "`student_peft_config` for a new adapter."
        )
    if getattr(policy, "loss_weighting", "filter") != "filter":
        raise ValueError(
            f"student_model with loss_weighting={policy.loss_weighting!r}: a student learns every example of "
            "the mixture with the same weight. Set loss_weighting='filter', or leave student_model out."
        )
    config = _student_config(args, policy)
    for name in ("bf16", "fp16"):
        if getattr(config, name) != getattr(policy, name):
            raise ValueError(
                f"student_args has {name}={getattr(config, name)} and the trainer's args have "
                f"{name}={getattr(policy, name)}: one process computes in one precision (accelerate). Set "
                "both alike."
            )
    return str(model), config, peft_config


def _student_config(args: SFTConfig | Mapping[str, Any] | None, policy: Any) -> StudentConfig:
    own: dict[str, Any] = {}
    if isinstance(args, SFTConfig) and not isinstance(args, GradedConfig):
        own = _fields_of(args)
        if own["output_dir"] == _UNNAMED_FOLDER:
            del own["output_dir"]
    elif args is None or isinstance(args, Mapping):
        _refuse_of_the_run(args or {}, policy)
        own = {n: v for n, v in _fields_of(policy).items() if n not in _OF_ONE_MODEL}
        loading = own["model_init_kwargs"] or {}
        own["model_init_kwargs"] = {n: v for n, v in loading.items() if n != "revision"}
        own |= args or {}
    else:
        raise TypeError(
            f"student_args is a {type(args).__name__}; give a trl.SFTConfig: the student is trained once, "
            "on what the rounds selected."
        )
    folder = str(Path(policy.output_dir) / "student")
    return StudentConfig(
        **{
            "output_dir": folder,
            **own,
            **{name: getattr(policy, name) for name in _AS_THE_POLICY},
            **{name: getattr(policy, name) for name in _OF_BEST},
            "num_rounds": 1,
            "load_best_round_at_end": False,  # the student is what was trained
        }
    )


def _refuse_of_the_run(given: Mapping[str, Any], policy: Any) -> None:
    """Raise ValueError if fields differ from the policy's that a student takes over, or doesn't have."""
    own = {f.name for f in fields(SFTConfig)}.difference(_OF_BEST)
    of_run = {f.name for f in fields(StudentConfig)} - own
    if wrong := [n for n in given if n in of_run and given[n] != getattr(policy, n)]:
        raise ValueError(
            f"student_args has {', '.join(f'{n}={given[n]!r}' for n in wrong)}: a student plays no rounds, and "
            "its held-out prompts are asked and judged as the policy's. Leave out what isn't a field of "
            "trl.SFTConfig, and the metric; or set them in the trainer's args, for both."
        )


def _fields_of(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(SFTConfig) if f.init}


def _render_like(play: SelfPlay, tokenizer: PreTrainedTokenizerBase, config: StudentConfig) -> None:
    """Render a prompt as the policy's was, with tools in the same form."""
    form = play.formatter.tool_form
    if form is not None:
        config.tool_format = "react" if form.in_words else "chat"
        conversational, ends = play.rows[0].is_conversational, [tokenizer.eos_token_id]
        form = choose_form(config, tokenizer, form.toolbox, conversational, ends)
    PromptFormatter(tokenizer, tool_form=form).token_ids(play.rows[0], few_shot=False)


class TeachesStudent(RoundsMixin):
    """Trains a smaller model, once all rounds are finished, on the mixture of the last one.

    Attributes:
        student: The smaller model; None: there is none.
        gold: The human completions that rounds train on as well.
    """

    student: Student | None = None
    gold: Gold = Gold((), {})

    def __init__(self, *args: Any, student: Any = None, **kwargs: Any) -> None:
        """Build the trainer of the policy, and read the student's tokenizer.

        Args:
            *args: As RoundsMixin takes them.
            student: From `read_student`.
            **kwargs: As RoundsMixin takes them.
        """
        super().__init__(*args, **kwargs)
        if student is None:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "student_model with FSDP or DeepSpeed: a second model can't be prepared beside the policy. "
                "Leave student_model out, and resume the finished run with it without either."
            )
        scorer = self.self_play.collector.heldout_scorer
        if self.self_play.heldout and scorer is not None and scorer.policy_judges:
            raise ValueError(
                "student_model with held-out prompts that the policy judges: a student would judge itself. Pass "
                "eval_reward_funcs that grade both alike, or leave out `eval_dataset`."
            )
        model, config, peft_config = student
        tokenizer = load_processing_class(model, None, config)
        play = self.self_play
        if tokenizer.get_vocab() == play.formatter.tokenizer.get_vocab():
            tokenizer = play.formatter.tokenizer
        else:  # raises if its chat template can't do what the policy's can
            _render_like(play, tokenizer, config)
        self.student = Student(model, config, tokenizer, peft_config)

    def train(
        self, resume_from_checkpoint: bool | str | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Run all rounds, then train the student; see `RoundsMixin.train`."""
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.student is not None and not self.args.dry_run:
            self.train_student()
        return output

    def train_student(self) -> TrainOutput:
        """Train the student on the last finished round of the run in `output_dir`, and play no round.

        `train` calls it once all rounds are finished. It goes on where an earlier call stopped.

        Raises:
            ValueError: There is no student or no finished round, or the student's folder holds one that was
                trained on something else.
        """
        if self.student is None:
            raise ValueError(
                "train_student() needs a `student_model`, which the trainer wasn't given."
            )
        mixture = self._mixture()
        with _set_aside(self):
            set_seed(self.student.args.seed)  # new adapters are alike, whatever came before
            trainer = StudentTrainer(self, self.student, mixture)
            folder = trainer.run.root
            if folder.is_dir():
                trained_on = RunFolder.open(folder).config.get("mixture")
                if trained_on not in (None, trainer.identity()["mixture"]):
                    raise ValueError(
                        f"{trainer.args.output_dir!r} holds a student that was trained on other examples: of "
                        "an earlier round, or of another run. Set another output_dir in student_args, or "
                        "delete that folder."
                    )
            return trainer.train(resume_from_checkpoint=folder.is_dir())

    def trained_prompts(self, round_index: int, play: SelfPlay) -> Mapping[str, tuple[int, ...]]:
        """Return the prompts that a finished round was trained on, by id, as other stages render them."""
        del round_index
        return play.training_prompt_ids([*self.self_play.rows, *self.gold.rows.values()])

    def _mixture(self) -> Rollouts:
        """Return what the last finished round was trained on, from its folder.

        Raises:
            ValueError: No round is finished, or its folder doesn't say all that it was trained on.
        """
        run = RunFolder.open(self.args.output_dir)
        last = len(run.lines) - 1
        if last < 0:
            raise ValueError(
                f"no round in {self.args.output_dir!r} is finished, so there is nothing to train the student "
                "on."
            )
        found = [rollout for rollout, outcome in run.rollouts(last) if outcome == "kept"]
        found += [rollout for rollout, _ in run.history(last)]
        path = run.folder(last) / "drawn_gold.parquet"
        drawn = {key[1:] for key in read_history(path)} if path.exists() else set()
        found += [r for r in self.gold.rollouts if (r.prompt_id, r.sample_index) in drawn]
        if len(found) != (expected := run.lines[last]["examples"]):
            raise ValueError(
                f"round {last} was trained on {expected} examples, and {run.folder(last)} tells {len(found)} "
                "of them: a version that didn't record the human completions made it. Train one more round "
                "(num_rounds) before the student."
            )
        return _renumbered(found)


class StudentTrainer(RoundsMixin, SFTTrainer):
    """Trains a student: one round, whose rows are those of a finished run.

    Args:
        teacher: The trainer of the run.
        student: What is trained, and how.
        mixture: What it is trained on, each (prompt_id, sample_index) once.
    """

    args: StudentConfig
    samples_prompts = False
    _tag_names = ["trl", "sft", "trl-selfplay", "self-distillation"]  # noqa: RUF012  # as in TRL
    _name = "Self-distillation"
    _paper = {  # noqa: RUF012  # as in TRL
        "title": "ReST meets ReAct: Self-Improvement for Multi-Step Reasoning LLM Agent",
        "id": "2312.10003",
        "citation": """\
@article{aksitov2023rest,
    title        = {{ReST meets ReAct: Self-Improvement for Multi-Step Reasoning LLM Agent}},
    author       = {Renat Aksitov and Sobhan Miryoosefi and Zonglin Li and others},
    year         = 2023,
    journal      = {arXiv preprint arXiv:2312.10003},
}""",
    }

    def __init__(self, teacher: TeachesStudent, student: Student, mixture: Rollouts) -> None:
        self._teacher = teacher
        self._mixture = mixture
        self.agent = teacher.agent
        play, form = teacher.self_play, teacher.self_play.formatter.tool_form
        super().__init__(
            student.model, student.args, play.rows, eval_dataset=teacher.eval_dataset,
            processing_class=student.tokenizer, peft_config=student.peft_config, grading=Grading(),
            examples=play.formatter.few_shot_examples,
            toolbox=None if form is None else form.toolbox,
        )  # fmt: skip

    def prepare_stages(self, play: SelfPlay) -> SelfPlay:
        """Return the stages with the verifier and the held-out prompts of the run."""
        taught = self._teacher.self_play
        self._fit_into_context(play, taught)
        own = replace(
            play,
            rows=self._fitting(play),
            heldout=taught.heldout,
            collector=replace(
                play.collector,
                eval_scorer=taught.collector.heldout_scorer,
                eval_threshold=taught.collector.eval_threshold,
                has_degrees=taught.collector.has_degrees,
            ),
        )
        return self._teacher.prepare_stages(own)

    def _fit_into_context(self, play: SelfPlay, taught: SelfPlay) -> None:
        """Lower the lengths that the student's context can't hold."""
        args, context = self.args, play.context_length
        if context is None:
            return
        args.max_length = context if args.max_length is None else min(args.max_length, context)
        rows = [row for heldout in taught.heldout.values() for row in heldout]
        longest = max(
            (len(play.formatter.token_ids(row, few_shot=True)) for row in rows), default=0
        )
        if longest < context < longest + args.max_completion_length:
            args.max_completion_length = context - longest
            logger.warning(
                "the student's context of %d tokens holds %d tokens after the longest held-out prompt: its "
                "held-out completions are at most that long.",
                context,
                args.max_completion_length,
            )

    def _fitting(self, play: SelfPlay) -> list[PromptRow]:
        """Return the prompts after which the student has room for a completion.

        Raises:
            ValueError: There is none.
        """
        args, context = self.args, play.context_length
        lengths = [len(ids) for ids in play.training_prompt_ids(play.rows).values()]
        most = math.inf if args.max_length is None else args.max_length - 1
        if context is not None:
            most = min(most, context - args.max_completion_length)
        if fitting := [r for r, n in zip(play.rows, lengths, strict=True) if n <= most]:
            return fitting
        raise ValueError(
            f"no prompt fits the student: the shortest has {min(lengths)} tokens, its context is {context}, "
            f"max_length={args.max_length} and max_completion_length={args.max_completion_length}. Choose a "
            "student with a longer context, or a larger max_length in student_args."
        )

    def identity(self) -> dict[str, Any]:
        """Return a digest of what it is trained on."""
        return {"mixture": summarize_each((r.prompt_id, r.completion_ids) for r in self._mixture)}

    def play_round(self, round_index: int) -> PlayedRound:
        """Return the rows of the mixture that fit."""
        play, taught = self.self_play, self._teacher
        prompt_ids = taught.trained_prompts(len(taught.run.lines) - 1, play)
        if unknown := {*self._mixture.columns("prompt_id")[0]} - prompt_ids.keys():
            raise ValueError(
                f"{len(unknown)} prompts that {taught.args.output_dir!r} has examples of are not in "
                "`train_dataset`. Give the dataset of that run: prompts and solutions must be equal."
            )
        mixture = self._in_own_tokens([*taught.self_play.rows, *taught.gold.rows.values()])

        def outcome_of(rollout: Rollout) -> Outcome:
            return "kept" if play.fits(rollout, prompt_ids) else "too_long"

        selection = Selection.of(mixture, outcome_of)
        if dropped := len(mixture) - len(selection.kept):
            logger.warning(
                "%d of %d examples are longer than max_length=%s with their prompts and are left out of the "
                "student's training.",
                dropped,
                len(mixture),
                self.args.max_length,
            )
        played = play.build_sft_round(round_index, selection, prompt_ids)
        return replace(
            played, remedy="No example fits the student: see max_length and its context."
        )

    def _in_own_tokens(self, rows: Sequence[PromptRow]) -> Sequence[Rollout]:
        """Return the mixture in the student's tokens: as it is, if they are the policy's.

        Raises:
            ValueError: No example can be told in them.
        """
        play, taught = self.self_play, self._teacher.self_play
        if play.formatter.tokenizer is taught.formatter.tokenizer:
            return self._mixture
        form = play.formatter.tool_form
        in_messages = form is not None and not form.in_words
        found, missing = retokenize(
            self._mixture,
            taught.formatter.tokenizer,
            play.formatter,
            (play.eos_token_id, *play.eos_token_ids),
            {row.prompt_id: row for row in rows} if in_messages else {},
        )
        if missing:
            what = (
                f"{missing.total()} of {len(self._mixture)} examples can't be told exactly in the student's "
                f"tokens ({describe_causes(missing.items())})"
            )
            if not found:
                raise ValueError(f"{what}: choose a student with the policy's tokenizer.")
            logger.warning("%s, and are left out.", what)
        return found


@contextmanager
def _set_aside(trainer: Any) -> Iterator[None]:
    """Keep the policy in the CPU's memory while the student is on the device."""
    model, was_training = trainer.model, trainer.model.training
    parked = GradingModel(model)
    parked.park()
    try:
        yield
    finally:
        parked.ready().train(was_training)


def _renumbered(found: Sequence[Rollout]) -> Rollouts:
    """Return rollouts by prompt, those of a prompt numbered from 0."""
    ordered = sorted(found, key=lambda r: r.prompt_id)  # stable: a prompt's stay in their order
    numbers = [
        number
        for _, same in groupby(ordered, key=lambda r: r.prompt_id)
        for number, _ in enumerate(same)
    ]
    return Rollouts.of(ordered).renumbered(np.array(numbers, np.int32))
