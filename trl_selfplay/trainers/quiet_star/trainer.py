"""Quiet-STaR: a model learns to think before each token of ordinary text.

In: text, no rewards. Out: the model with a mixing head and vectors that begin and end a thought.
There are no rounds: the parent's training runs unchanged, with another loss.
Source: Quiet-STaR, arXiv 2403.09629, Algorithm 1.
"""

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from trl_selfplay.disk import held_by_this_process, saying_what_is_kept
from trl_selfplay.evaluation.progress import say
from trl_selfplay.generation.model_traits import sampling_state
from trl_selfplay.generation.quantized_layers import prepare_quantized_layers
from trl_selfplay.peers import together
from trl_selfplay.rounds.card import name_base
from trl_selfplay.rounds.checkpoints import SumsCheckpoints, last_whole_checkpoint, refuse_broken
from trl_selfplay.rounds.gathered import check_sharding
from trl_selfplay.rounds.log import say_where_interrupted
from trl_selfplay.rounds.memory_check import tell_memory
from trl_selfplay.rounds.named_settings import naming_settings
from trl_selfplay.rounds.noise import switch_noise_off
from trl_selfplay.rounds.training import SameOrderOnResume, saying_what_saves_memory
from trl_selfplay.rounds.weights import (
    adapters_keep_dtypes,
    nonfinite_weights,
    undo_rounding,
    unrounded_weights,
)
from trl_selfplay.termination import ends_at_sigterm
from trl_selfplay.trainers.construction import (
    check_saveable,
    load_processing_class,
    read_config,
)
from trl_selfplay.trainers.ported_scripts import explains_foreign_arguments
from trl_selfplay.trainers.quiet_star.config import QuietSTaRConfig
from trl_selfplay.trainers.quiet_star.construction import (
    add_thoughts_to_forward,
    attach_thoughts,
    check_batch,
    check_rows,
    load_model,
    longest_row,
    naming_bad_rows,
    plain,
    refuse_adapters,
    refuse_added_tokens,
    refuse_no_rows_left,
    refuse_optimizer_without_thoughts,
    refuse_replicas,
    refuse_rows_without_room,
    refuse_thoughts,
    refuse_unknown_tokens,
    refuse_unused,
    save_thoughts_too,
    switch_router_loss_off,
)
from trl_selfplay.trainers.quiet_star.mixing import (
    ATTRIBUTE,
    barred_token_ids,
    trained_module,
    unwrap_causal_lm,
)
from trl_selfplay.trainers.quiet_star.objective import (
    ObjectiveSums,
    advantages,
    base_ahead,
    objective_sums,
)
from trl_selfplay.trainers.quiet_star.observation import (
    HelpfulThought,
    ThoughtScores,
    describe_thoughts,
    most_helpful,
    thought_sums,
)
from trl_selfplay.trainers.quiet_star.replaced_attention import thoughts_attend
from trl_selfplay.trainers.quiet_star.sampling import (
    SampledThoughts,
    ThinkingColumns,
    can_think,
    choose_columns,
    num_thinking,
    predicted_tokens,
    sample_thoughts,
    thought_keys,
)
from trl_selfplay.trainers.quiet_star.storage import (
    ThoughtSettings,
    save_module,
    save_settings,
    strip_model_files,
)
from trl_selfplay.trainers.quiet_star.support import check_lengths, check_model
from trl_selfplay.trainers.quiet_star.unrolled import ThoughtBatch

logger = logging.getLogger(__name__)


class QuietSTaRTrainer(SFTTrainer):
    """Trains a causal language model to think before each token.

    Takes the arguments of `trl.SFTTrainer` in the same order, with text or tokenized rows.

    To continue from a model that already thinks, on the same or another text, pass as `model` the
    folder of a run, of a checkpoint or of `QuietSTaRModel.save_pretrained`, a Hub repository of one
    of these, or a QuietSTaRModel. Its mixing head, thought vectors and adapters continue training,
    and its first logits are those it was saved with. The vectors don't depend on the length of a
    thought, so `thought_length` may differ.

    Raises:
        ValueError, TypeError: At construction, for a model or arguments that can't work.

    Source: Quiet-STaR, arXiv 2403.09629, Algorithm 1.
    """

    args: QuietSTaRConfig
    _tag_names = ["trl", "sft", "trl-selfplay", "quiet-star"]  # noqa: RUF012  # as in TRL
    _name = "Quiet-STaR"
    _paper = {  # noqa: RUF012  # as in TRL
        "title": "Quiet-STaR: Language Models Can Teach Themselves to Think Before Speaking",
        "id": "2403.09629",
        "citation": """\
@inproceedings{zelikman2024quietstar,
    title        = {{Quiet-STaR: Language Models Can Teach Themselves to Think Before Speaking}},
    author       = {Eric Zelikman and Georges Harik and Yijia Shao and Varuna Jayasiri and Nick Haber and Noah D. Goodman},
    year         = 2024,
    booktitle    = {First Conference on Language Modeling},
    eprint       = {arXiv:2403.09629},
}""",
    }

    @explains_foreign_arguments
    def __init__(
        self,
        model: Any,
        args: QuietSTaRConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[..., Any] | None = None,
    ) -> None:
        args = read_config(args, QuietSTaRConfig, model, "QuietSTaR")
        dataset_kwargs: Any = args.dataset_kwargs or {}
        formats = formatting_func is not None or dataset_kwargs.get("skip_prepare_dataset", False)
        if not formats:
            train_dataset, eval_dataset = plain(train_dataset), plain(eval_dataset)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_rows(dataset, name, args, formats)
        unrounded: dict[str, torch.Tensor] = {}
        if args.num_thoughts:
            refuse_replicas(args)
            refuse_unused(compute_metrics, compute_loss_func, preprocess_logits_for_metrics)
            processing_class = load_processing_class(model, processing_class, args)
            model, quantization_config = load_model(model, args, quantization_config)
            refuse_adapters(model, peft_config)
            prepare_quantized_layers(model)
            check_model(model)
            switch_router_loss_off(model, args)
            attach_thoughts(model, processing_class, args)
            peft_config = save_thoughts_too(peft_config)
            num_embeddings = model.get_input_embeddings().weight.shape[0]
            unrounded = unrounded_weights(model)
        else:
            refuse_thoughts(model)
        sets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        with naming_bad_rows(sets, args, formats):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
        check_sharding(
            self, refused="its thoughts are sampled within each step" if args.num_thoughts else None
        )
        refuse_no_rows_left(self.train_dataset, args)
        self.add_callback(SameOrderOnResume)
        self.add_callback(SumsCheckpoints)
        self._barred = tuple(barred_token_ids(self.processing_class))
        self._step_counts = torch.zeros(2, dtype=torch.long)  # predicted tokens, thinking columns
        self._batch_index = {"train": 0, "eval": 0}
        self._helpful: list[HelpfulThought] = []
        self._warned_nonfinite = False
        if args.num_thoughts:
            refuse_added_tokens(self.model, num_embeddings)
            check_saveable(self.model)
            refuse_optimizer_without_thoughts(optimizers[0], trained_module(self.causal_lm))
            undo_rounding(self.model, unrounded)
            self._prepare_model_and_lengths()

    @property
    def causal_lm(self) -> Any:
        """The causal language model without wrappers; its `quiet_star` is the thought module."""
        return unwrap_causal_lm(self.accelerator.unwrap_model(self.model))

    def _prepare_model_and_lengths(self) -> None:
        args, causal_lm = self.args, self.causal_lm
        model: Any = self.model
        if switched := switch_noise_off(model):
            logger.warning(
                "Dropout and other noise is switched off in the whole model (%s): thoughts are "
                "sampled in one forward and scored in another, which would be two policies.",
                ", ".join(switched),
            )
        add_thoughts_to_forward(causal_lm)
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        sets = list(sets.values()) if isinstance(sets, dict) else sets
        for dataset in [self.train_dataset, *sets]:
            if dataset is not None:
                refuse_unknown_tokens(dataset, self.processing_class, self.model)
                longest = longest_row(dataset, args.max_length)
                check_lengths(causal_lm, longest, args.thought_length, args.num_ahead_tokens)
        train: Any = self.train_dataset
        columns = getattr(train, "column_names", None) or ()
        if args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            columns = self._signature_columns
        refuse_rows_without_room(train, columns, self.data_collator, args.num_ahead_tokens)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train like the parent.

        Args:
            resume_from_checkpoint: Folder of a complete checkpoint. True resumes from the newest
                complete checkpoint in `output_dir`, or starts anew if there is none.
            trial: Passed to the parent.
            ignore_keys_for_eval: Passed to the parent.

        Raises:
            RuntimeError: Another process is training into `output_dir`.
            ValueError: The checkpoint is incomplete, such as without the optimizer's state.
            Terminated: SIGTERM arrived.
            PeerError: Another process of this run has ended.
        """
        resume: Any = resume_from_checkpoint
        if isinstance(resume, str) and resume.lower() in ("true", "false"):
            resume = resume.lower() == "true"
        if resume is True:
            if self.args.save_only_model:
                raise ValueError(
                    "resume_from_checkpoint=True with save_only_model=True: such checkpoints hold "
                    "no optimizer state, so training can't resume exactly. Set save_only_model=False, "
                    "or pass the checkpoint as `model` to start a run from its weights."
                )
            resume = last_whole_checkpoint(Path(str(self.args.output_dir)), self.accelerator)
            if resume is None and self.is_world_process_zero():
                say(f"{self.args.output_dir} holds no checkpoint to resume from: training begins")
        elif resume:
            refuse_broken(Path(resume), self.accelerator)
        if self.args.num_thoughts:
            tell_memory(self, longest_row(self.train_dataset, self.args.max_length))
        folder = Path(str(self.args.output_dir))
        is_main = self.is_world_process_zero()
        with (
            ends_at_sigterm(),
            together(self.accelerator),
            say_where_interrupted(lambda: f"after step {self.state.global_step}"),
            saying_what_saves_memory(),
            saying_what_is_kept(folder),
            held_by_this_process(folder, is_main),
            adapters_keep_dtypes(self.model),
        ):
            try:
                return super().train(resume or None, trial, ignore_keys_for_eval)
            except Exception:
                if self.state.global_step > 0:
                    raise
                with naming_settings(self.args, "This came up before the first step."):
                    raise

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step, and count the columns that think in them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batch_index["train"] = 0
        if self.args.num_thoughts and num_items is not None:
            self._count_step(batches, device)
        return batches, num_items

    def _count_step(self, batches: list[Any], device: torch.device) -> None:
        """Count the predicted tokens and thinking columns of a step, over all processes."""
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            mask = batch["attention_mask"]
            allowed = can_think(batch["labels"], mask, self.args.num_ahead_tokens)
            thinking = num_thinking(allowed, self.args.thought_fraction)
            labelled = predicted_tokens(batch["labels"], mask)
            counts += torch.stack([labelled.sum(), thinking.sum()]).to(device)
        if self.args.average_tokens_across_devices:
            counts = self.accelerator.gather(counts).view(-1, 2).sum(0)
        self._step_counts = counts

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train like the parent, with attention that supports thoughts in forward and backward pass."""
        if not self.args.num_thoughts:
            return super().training_step(*args, **kwargs)
        with thoughts_attend(self.causal_lm):
            return super().training_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate like the parent, and print the most helpful thoughts of the first batch.

        The same rows get the same thought noise in every evaluation.
        """
        self._batch_index["eval"], self._helpful = 0, []
        metrics = super().evaluate(*args, **kwargs)
        if self._helpful and self.is_world_process_zero():
            tokenizer = self.processing_class
            say(f"thoughts that helped most:\n{describe_thoughts(self._helpful, tokenizer)}")
        return metrics

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Think at each chosen column, and return the loss of text and thoughts.

        L = α·NLL_base + (1 − α)/n_true·Σ_t NLL_talk,t + λ·L_policy, with the last term only in
        training. NLL_base is a mean over labelled tokens, the other terms are means over thinking
        columns and thoughts, all of the whole step, with accumulated batches and processes.

        Source: Quiet-STaR, arXiv 2403.09629, equations 6 to 8.
        """
        args = self.args
        if not args.num_thoughts:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise ValueError(
                "outputs with thoughts are not kept. Read the logged metrics, or load the saved "
                "model with QuietSTaRModel for its logits."
            )
        check_batch(inputs)
        thinking, thoughts = self.think(inputs)
        batch = self._thought_batch(thinking, thoughts)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            thought_batch=batch,
        )
        labelled = predicted_tokens(inputs["labels"], inputs["attention_mask"])
        scores = self._score(outputs, thinking)
        sums = objective_sums(
            outputs["base_log_probs"], labelled, scores.talk, scores.thought, scores.advantage
        )
        self._record(inputs, outputs, thinking, thoughts, scores, sums, labelled.sum())
        counts = torch.stack([labelled.sum(), thinking.is_real.sum()])
        if num_items_in_batch is not None:
            counts = self._step_counts
        num_tokens, num_columns = counts.clamp(min=1)
        alpha = args.base_loss_weight
        loss = alpha * sums.base / num_tokens + (1.0 - alpha) * sums.talk / num_columns
        if batch.scores_thoughts:
            loss = loss + args.reinforce_weight * sums.policy / num_columns
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _score(self, outputs: dict[str, torch.Tensor], thinking: ThinkingColumns) -> ThoughtScores:
        """Arrange the forward's log-probs by column, and compute the advantage of each thought."""
        args, width = self.args, thinking.columns.shape[1]
        base = base_ahead(outputs["base_log_probs"], thinking.columns, args.num_ahead_tokens)
        base = base * thinking.is_real[:, :, None]
        talk = outputs["talk_log_probs"].unflatten(1, (width, -1))  # (B, U, K, n_true)
        advantage = advantages(talk.sum(-1), base.sum(-1, keepdim=True), args.reinforce_baseline)
        return ThoughtScores(
            base=base,
            talk=talk,
            thought=outputs["thought_log_probs"].unflatten(1, (width, -1)),
            advantage=advantage,
            weights=outputs["weights"].unflatten(1, (width, -1)),
        )

    @torch.no_grad()
    def _record(
        self,
        inputs: dict[str, Any],
        outputs: dict[str, torch.Tensor],
        thinking: ThinkingColumns,
        thoughts: SampledThoughts,
        scores: ThoughtScores,
        sums: ObjectiveSums,
        num_labelled: torch.Tensor,
    ) -> None:
        """Record the batch's metrics, summed over processes, including those that the parent logs."""
        mode, mask = self._mode(), inputs["attention_mask"]
        rows = thought_sums(scores, sums, num_labelled, thinking, thoughts)
        labelled = predicted_tokens(inputs["labels"], mask)
        for name, key in (("entropy", "entropies"), ("mean_token_accuracy", "top1")):
            rows[name] = torch.stack([(outputs[key] * labelled).sum(), num_labelled.float()])
        rows["num_tokens"] = torch.stack([mask.sum(), mask.sum()]).float()
        names = list(rows)
        totals = self.accelerator.reduce(torch.stack([rows[n] for n in names]), "sum").tolist()
        if (
            not all(math.isfinite(x) for pair in totals for x in pair)
            and not self._warned_nonfinite
        ):
            self._warned_nonfinite = True
            logger.warning(
                "step %d: a loss is not finite. If this continues, the weights are lost: lower "
                "learning_rate or reinforce_weight, or set max_grad_norm.",
                self.state.global_step,
            )
        for name, (numerator, denominator) in zip(names, totals, strict=True):
            if name == "num_tokens":
                self._total_train_tokens += int(numerator) if mode == "train" else 0
                self._metrics[mode][name] = [self._total_train_tokens]
            elif denominator:
                self._metrics[mode][name].append(numerator / denominator)
        if mode == "eval" and self._batch_index["eval"] == 1:
            self._helpful = most_helpful(
                inputs["input_ids"], mask, thinking, thoughts, scores.gains(),
                self.args.num_ahead_tokens,
            )  # fmt: skip

    def think(self, inputs: dict[str, Any]) -> tuple[ThinkingColumns, SampledThoughts]:
        """Choose the batch's thinking columns and sample their thoughts, without gradients.

        Columns and noise depend on the seed, the step, the row's index in the step, the position
        in the row and the thought's index, but not on padding, accumulation or the number of
        processes.
        """
        args = self.args
        mode = self._mode()
        step = self.state.global_step if mode == "train" else 0
        mask, rows = inputs["attention_mask"], self._row_indices(mode, len(inputs["input_ids"]))
        allowed = can_think(inputs["labels"], mask, args.num_ahead_tokens)
        thinking = choose_columns(allowed, mask, args.thought_fraction, args.seed, step, mode, rows)
        keys = thought_keys(thinking, args.num_thoughts, args.seed, step, mode, rows)
        with sampling_state(self.model_wrapped, self.accelerator) as model, torch.no_grad():
            causal_lm = unwrap_causal_lm(model)
            with self.accelerator.autocast():
                thoughts = sample_thoughts(
                    causal_lm,
                    getattr(causal_lm, ATTRIBUTE).start_and_end()[0],
                    inputs["input_ids"],
                    mask,
                    thinking.columns.repeat_interleave(args.num_thoughts, dim=1),
                    args.thought_length,
                    keys,
                    temperature=args.thought_temperature,
                    barred=self._barred,
                )
        return thinking, thoughts

    def _mode(self) -> Literal["train", "eval"]:
        model: Any = self.model
        return "train" if model.training else "eval"

    def _row_indices(self, mode: Literal["train", "eval"], num_rows: int) -> range:
        """Return the indices of the rows within the step (or the evaluation), over all processes."""
        args, accelerator = self.args, self.accelerator
        size = args.per_device_train_batch_size
        if mode == "eval":
            size = args.per_device_eval_batch_size
        index = self._batch_index[mode]
        self._batch_index[mode] = index + 1
        first = (index * accelerator.num_processes + accelerator.process_index) * size
        return range(first, first + num_rows)

    def _thought_batch(self, thinking: ThinkingColumns, thoughts: SampledThoughts) -> ThoughtBatch:
        args = self.args
        return ThoughtBatch(
            anchors=thinking.columns.repeat_interleave(args.num_thoughts, dim=1),
            tokens=thoughts.tokens,
            is_real=thinking.is_real.repeat_interleave(args.num_thoughts, dim=1),
            num_ahead_tokens=args.num_ahead_tokens,
            temperature=args.thought_temperature,
            barred=self._barred,
            scores_thoughts=self._mode() == "train"
            and args.reinforce_weight > 0.0
            and args.thought_length > 0,
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card, which names a base model in a local folder too."""
        super().create_model_card(*args, **kwargs)
        name_base(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that `QuietSTaRModel.from_pretrained` can load it.

        The model or adapter files hold no thoughts and load without this package. Those of
        checkpoints do, so that training can resume.

        Raises:
            FloatingPointError: A weight is NaN or infinite.
        """
        broken = nonfinite_weights(self.model_wrapped) if self.args.num_thoughts else []
        if broken:
            raise FloatingPointError(
                f"after step {self.state.global_step}, {len(broken)} trained weights hold NaN or "
                f"infinity, such as {broken[0]}, so they are not saved. Earlier checkpoints are "
                "unchanged. Lower learning_rate or reinforce_weight, or set max_grad_norm."
            )
        super().save_model(output_dir, _internal_call)
        if not self.args.num_thoughts or not self.args.should_save:
            return
        args, folder = self.args, Path(output_dir or str(self.args.output_dir))
        settings = ThoughtSettings(args.thought_length, args.thought_temperature, self._barred)
        extra = {
            "num_thoughts": args.num_thoughts,
            "num_ahead_tokens": args.num_ahead_tokens,
            "steps": self.state.global_step,
        }
        save_module(self.causal_lm, folder)
        save_settings(folder, settings, self.causal_lm, extra)
        if not re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name):
            strip_model_files(folder)
