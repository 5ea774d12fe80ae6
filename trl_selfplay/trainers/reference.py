"""The reference of a DPO loss over rounds: the policy as it enters a round.

In: a DPO trainer over rounds, and pairs of token ids. Out: `ReferenceMixin`, which builds the parent
without a reference model, stores with each pair the summed log-probs of both completions under the
policy as it enters the round, and checks at the first step of a round that the reference really is the
policy that is trained.

Source: SPIN, arXiv 2401.01335, equation 4.7: the reference is p_θt, which equals p_θ at the start
of round t, so every margin is 0 there.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, load_from_disk
from torch.nn import functional
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from trl_selfplay.disk import DamagedFileError, delete, naming_damage, refuse_changed
from trl_selfplay.generation.model_traits import sampling_state, without_checkpointing
from trl_selfplay.peers import gather, wait_for_all
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.rows import (
    LENGTH,
    Pair,
    build_on_main,
    build_pair_rows,
    count_values,
    pair_of,
    save_dataset,
    shuffled_order,
)
from trl_selfplay.rollouts.selection import Selection
from trl_selfplay.rollouts.sequence import Rollouts
from trl_selfplay.rounds.noise import switch_noise_off
from trl_selfplay.trainers.rounds import RoundsMixin

logger = logging.getLogger(__name__)

# Largest difference of rewards (beta times log-probs) that counts as rounding at the beta below. It
# grows in proportion to a larger beta.
TOLERANCE = 1e-4
_BETA_OF_TOLERANCE = 0.1
# In reduced precision, how many times the spread of re-scoring a difference may reach.
_SPREADS = 3.0

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
_MASKS = ("chosen_mask", "rejected_mask")


class WrongReferenceError(RuntimeError):
    """The stored log-probs are not those of the policy that enters the round."""


WrongOpponentError = WrongReferenceError  # what SPIN calls its reference


class ReferenceMixin(RoundsMixin, DPOTrainer):
    """Makes the policy, as it enters a round, the reference of the parent's loss.

    Comes first among the bases: `class MyTrainer(ReferenceMixin, RoundsMixin, DPOTrainer)`.
    `play_round` passes its pairs through `store_reference`. No second model is held.

    Rows have `prompt_ids`, `chosen_ids` and `rejected_ids`, and optionally `chosen_mask` and
    `rejected_mask`: 1 for each token of the completion that the policy wrote, 0 for one that it
    read, such as a tool's answer. Without a mask, it wrote all of them.
    """

    collated_columns = (*_MASKS, LENGTH)

    def __init__(self, model: Any, args: Any, *rest: Any, peft_config: Any, **named: Any) -> None:
        """Build the parent without a reference model, and the stages as `RoundsMixin` does.

        Args:
            model: As DPOTrainer takes it, like `peft_config`.
            args: The trainer's configuration, a `ReferenceConfig`.
            *rest: As `RoundsMixin` takes it.
            peft_config: For new adapters.
            **named: As `RoundsMixin` takes it.

        Raises:
            ValueError, TypeError: For arguments, rows or a model that can't work.
        """
        _refuse_uncopied_adapters(model)
        uses_peft = peft_config is not None or hasattr(model, "peft_config")
        had_ref_adapter = "ref" in getattr(model, "peft_config", {})
        # The parent loads no second model if it may precompute (plain model) or has adapters to
        # switch off; with adapters precomputing would only hash all weights.
        args.precompute_ref_log_probs = not uses_peft
        try:
            super().__init__(model, args, *rest, peft_config=peft_config, **named)
        finally:
            args.precompute_ref_log_probs = True
        self.precompute_ref_logps = True  # the loss reads the stored columns
        policy: Any = self.model
        if "ref" in getattr(policy, "peft_config", {}) and not had_ref_adapter:
            policy.delete_adapter("ref")  # the parent's copy: right in round 0 only
        self.data_collator = MaskCollator(self.data_collator)
        for column, value in ((LENGTH, 3), *((name, 0.0) for name in _LOGPS)):  # as rows have them
            self.placeholder = cast("Any", self.placeholder).add_column(column, [value])
        self._checked_round: int | None = None
        # Scored twice, a policy must give the same log-probs.
        if switched := switch_noise_off(policy):
            logger.warning(
                "Dropout and other noise is switched off in the whole model (%s): with it the "
                "policy would differ from its %s at the first step of each round.",
                ", ".join(switched),
                args._reference,
            )

    def placeholder_rows(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return one pair for the parent to be built on; no round ever trains on it."""
        return Dataset.from_list([{"prompt": "?", "chosen": " yes", "rejected": " no"}])

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Leave the parent's placeholder as it is.

        The parent would score it at construction and pass the scores through a file, which a second
        process would look for in another folder.
        """
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Return the reference's summed log-probs of both completions, called once per round.

        The reference is the policy as it enters the round. A subclass may return the log-probs of
        another model; margins then don't begin at 0 and aren't checked.
        """
        return self.compute_policy_log_probs(model, inputs)

    def compute_policy_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Return the summed log-probs of both completions under the model as it is now.

        The parent switches adapters off (or to "ref") unless it has a reference model. Here the
        model itself is the reference, with its weights at the time of the call.
        """
        self.ref_model: Any = self.model
        try:
            return super().compute_ref_log_probs(model, inputs)
        finally:
            self.ref_model = None

    def score_pairs(
        self, rows: Dataset, log_probs: Callable[[Any, dict[str, Any]], Any]
    ) -> list[tuple[float, float]]:
        """Return (log p(chosen), log p(rejected)) of each row.

        Sums over the completion's tokens, in nats, in eval mode, through the parent's own collator.
        With several processes, each scores its share, and all return all log-probs.

        Args:
            rows: Pairs of token ids, with the columns of the class docstring.
            log_probs: Scores a batch: `compute_policy_log_probs` or `compute_ref_log_probs`.
        """
        args, accelerator = self.args, self.accelerator
        policy: Any = self.model
        size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        masks = [column for column in _MASKS if column in rows.column_names]
        examples = rows.select_columns([*_IDS, *masks])
        # By length, so that little is computed on padding.
        lengths = sum(count_values(rows, column) for column in _IDS)
        order = np.argsort(lengths, kind="stable").tolist()
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        scored: list[tuple[int, float, float]] = []
        self.self_play.collector.sampler.release()  # an engine may hold the device's memory
        with sampling_state(policy, None):
            for indices in batches[accelerator.process_index :: accelerator.num_processes]:
                batch = self.data_collator(examples.select(indices).to_list())
                batch = send_to_device(dict(batch), accelerator.device)
                chosen, rejected = log_probs(policy, batch)
                scored += zip(indices, chosen.tolist(), rejected.tolist(), strict=True)
        scored = gather(accelerator, scored)
        return [(chosen, rejected) for _, chosen, rejected in sorted(scored)]

    def build_pair_round(
        self,
        round_index: int,
        selection: Selection,
        chosen: Sequence[Rollout],
        rejected: Sequence[Rollout],
        prompt_ids: Mapping[str, tuple[int, ...]],
        metrics: Mapping[str, float] = MappingProxyType({}),
    ) -> PlayedRound:
        """Write the selection and the reference's log-probs down; build the round's rows and numbers.

        Args:
            round_index: The round that trains on them.
            selection: The outcome of every rollout.
            chosen: The first completion of each pair.
            rejected: The second one, of the same prompt.
            prompt_ids: Prompts as trained on.
            metrics: What else to log of the round.
        """
        play, folder = self.self_play, self.run.folder(round_index)
        play.keep_selection(folder, selection)
        order = shuffled_order(len(chosen), self.args.seed + round_index)
        sides = (Rollouts.of(side).pick(order) for side in (chosen, rejected))
        pairs = (
            pair_of(one, other, prompt_ids[one.prompt_id], play.eos_token_id)
            for one, other in zip(*sides, strict=True)
        )
        rows = self.store_pairs(pairs, folder / "dataset")
        return play.describe_round(round_index, selection, rows, len(rows), metrics)

    def store_pairs(self, pairs: Iterable[Pair], folder: Path) -> Dataset:
        """Return pairs, in the order of the rows, with the reference's log-probs, as `store_reference`."""
        unscored = folder.with_name(f".{folder.name}-unscored")
        rows = build_on_main(
            self.accelerator, unscored, lambda where: build_pair_rows(pairs, where)
        )
        rows = self.store_reference(rows, folder)
        wait_for_all(self.accelerator)
        if self.is_world_process_zero():
            shutil.rmtree(unscored, ignore_errors=True)
        return rows

    def store_reference(self, rows: Dataset, folder: Path) -> Dataset:
        """Return rows with the reference's log-probs, computed and saved once.

        What an interrupted run has saved is read back; only if it is damaged is it computed again.

        Args:
            rows: Pairs of token ids, with the columns of the class docstring.
            folder: Where the dataset is kept.
        """
        if folder.exists():
            try:
                with naming_damage(folder, "Its pairs are scored again."):
                    refuse_changed(folder)
                    stored = load_from_disk(str(folder))
                    stored.data.validate(full=True)
                    return stored
            except DamagedFileError as error:  # the weights are still the reference's
                logger.warning("%s", error)
            wait_for_all(self.accelerator)  # all have looked before one deletes
            if self.is_world_process_zero():
                delete(folder)
        if len(rows) == 0:  # a dataset without rows can't be read back
            return rows
        logps = self.score_pairs(rows, self.compute_ref_log_probs)
        for column, values in zip(_LOGPS, zip(*logps, strict=True), strict=True):
            rows = rows.add_column(column, list(values))
        return build_on_main(self.accelerator, folder, lambda where: save_dataset(where, rows))

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the reference before the first step of a fresh round, then train as the parent."""
        round_index = None if self.progress is None else self.progress.round_index
        if round_index is not None and self._checked_round != round_index:
            own = type(self).compute_ref_log_probs is ReferenceMixin.compute_ref_log_probs
            if own and self.state.global_step == 0:  # else it goes on from a checkpoint
                self.check_reference(model, inputs, round_index)
            self._checked_round = round_index
        return super().training_step(model, inputs, *args, **kwargs)

    def check_reference(self, model: Any, inputs: Mapping[str, Any], round_index: int) -> None:
        """Raise unless the policy, before its first step, gives a batch the stored log-probs.

        They may differ by `TOLERANCE`. In lower precision, they may also differ by three times the
        spread of re-scoring the batch with wider padding, because sums of rounded numbers depend on
        the padding.

        Args:
            model: As the training step uses it, wrapped; it is left in train mode.
            inputs: The first batch of the round.
            round_index: For the error.

        Raises:
            WrongReferenceError: With the largest difference and what usually causes it.
        """
        model.train()  # as in the step that follows: noise of that mode counts too
        inputs = send_to_device(dict(inputs), self.accelerator.device)
        stored = torch.cat([inputs[column] for column in _LOGPS]).float()
        live = self._rescore(model, inputs)
        tolerance = TOLERANCE * max(1.0, self.beta / _BETA_OF_TOLERANCE)
        gap = self.beta * float((live - stored).abs().max())
        if gap <= tolerance:
            return
        if not self._is_float32():
            spread = max(
                float((self._rescore(model, other) - live).abs().max())
                for other in _other_paddings(inputs)
            )
            tolerance = max(tolerance, _SPREADS * self.beta * spread)
            if gap <= tolerance:
                return
        name = self.args._reference
        raise WrongReferenceError(
            f"round {round_index}: before the first step the policy's log-probs differ from the "
            f"stored ones of its {name} by {gap:.3g} (times beta={self.beta:g}), and at most "
            f"{tolerance:.3g} is rounding. The {name} must be the policy as it enters the round, so "
            "that every margin begins at 0. Usual causes: a callback or hook changed the "
            "weights between scoring and training, something is random in train mode, "
            "`data_collator` builds other batches in training, or the stored rows under `_rounds` "
            "come from other weights (then delete the round's `dataset` folder)."
        )

    def _rescore(self, model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        with without_checkpointing(model):
            return torch.cat(self.compute_policy_log_probs(model, dict(inputs))).float()

    def _is_float32(self) -> bool:
        if self.accelerator.mixed_precision != "no":
            return False
        model: Any = self.model
        return all(p.dtype == torch.float32 for p in model.parameters())


class MaskCollator:
    """Removes tokens that the policy read but didn't write from a collator's `completion_mask`."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Return the batch, chosen completions first: (2 * rows, tokens), padded on the right.

        Raises:
            ValueError: A mask isn't as long as its completion.
        """
        batch = self.collator(rows)
        for first, side in ((0, "chosen"), (len(rows), "rejected")):
            for place, row in enumerate(rows):
                if (mask := row.get(f"{side}_mask")) is None:
                    continue
                start, length = len(row["prompt_ids"]), len(row[f"{side}_ids"])
                if len(mask) != length:
                    raise ValueError(
                        f"`{side}_mask` has {len(mask)} values for the {length} tokens of "
                        f"`{side}_ids`. Give one per token: 1 where the policy wrote it, else 0."
                    )
                written = batch["completion_mask"][first + place, start : start + length]
                written *= torch.tensor(mask, dtype=written.dtype)[: len(written)]
        return batch


def _refuse_uncopied_adapters(model: Any) -> None:
    """Raise ValueError for adapters that the parent can't copy, as it does at construction."""
    adapters = getattr(model, "peft_config", {})
    if adapters and "default" not in adapters:
        raise ValueError(
            f"the model's adapters are named {list(adapters)}; TRL's DPOTrainer takes the one named "
            "'default'. Load it with PeftModel.from_pretrained(base, path, is_trainable=True)."
        )
    for config in adapters.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if getattr(config, "bias", "none") != "none":
            reason = f"bias={config.bias!r}, and PEFT allows one such adapter per model"
        elif getattr(config, "layer_replication", None):
            reason = "layer_replication, which PEFT would apply a second time"
        elif kind == "ADALORA":
            reason = "AdaLoRA, and PEFT allows one trainable such adapter per model"
        else:
            continue
        raise ValueError(
            f"the model comes with an adapter that uses {reason}; TRL's DPOTrainer adds a copy "
            "of it at construction. Merge the adapter into its base first, or pass the base model and "
            "`peft_config`."
        )


def _other_paddings(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the batch with wider padding, twice."""
    sequences = ("input_ids", "attention_mask", "completion_mask")
    return [
        {k: functional.pad(v, (0, width)) if k in sequences else v for k, v in inputs.items()}
        for width in (8, 64)
    ]
