"""SPIN's opponent: the policy as it enters a round, known by the log-probs that it gave.

In: a DPO trainer whose model still is the opponent, and pairs. Out: the summed log-prob of both
completions of each pair, stored with the rows, so that no second model is held; and the check, at
the first step of a round, that what is trained against really is the policy that is trained.

Source: SPIN, arXiv 2401.01335, equation 4.7: the reference is p_θt, which equals p_θ at the start
of round t, so every margin is 0 there.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, load_from_disk
from torch.nn import functional

from trl_selfplay.disk import DamagedFileError, naming_damage
from trl_selfplay.generation.model_traits import sampling_state
from trl_selfplay.rollouts.rows import save_rows

logger = logging.getLogger(__name__)

# Of rewards, that is beta times a difference of log-probs; at larger beta in proportion.
TOLERANCE = 1e-4
_BETA_OF_TOLERANCE = 0.1
# How much further than re-scoring noise a reduced-precision difference may be.
_SPREADS = 3.0

_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class WrongOpponentError(RuntimeError):
    """The stored log-probs are not those of the policy that enters the round."""


def score_pairs(
    trainer: Any, rows: Dataset, log_probs: Callable[[Any, dict[str, Any]], Any]
) -> list[tuple[float, float]]:
    """Return (log p(chosen), log p(rejected)) of each row.

    Sums over the completion's tokens, in nats, in eval mode, through the parent's own collator.
    Under several processes each scores its share and all return all.

    Args:
        trainer: A `SPINTrainer`; its model, modes and adapters stay as they are.
        rows: With `prompt_ids`, `chosen_ids` and `rejected_ids`.
        log_probs: Scores a batch: the trainer's `compute_policy_log_probs` or
            `compute_ref_log_probs`.
    """
    args, accelerator = trainer.args, trainer.accelerator
    size = args.precompute_ref_batch_size or args.per_device_train_batch_size
    examples = rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()
    # By length, so that little is computed on padding.
    order = sorted(
        range(len(examples)),
        key=lambda i: (sum(len(ids) for ids in examples[i].values()), i),
    )
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    scored: list[tuple[int, float, float]] = []
    with sampling_state(trainer.model, None):
        for indices in batches[accelerator.process_index :: accelerator.num_processes]:
            batch = trainer.data_collator([examples[i] for i in indices])
            batch = send_to_device(dict(batch), accelerator.device)
            chosen, rejected = log_probs(trainer.model, batch)
            scored += zip(indices, chosen.tolist(), rejected.tolist(), strict=True)
    if accelerator.num_processes > 1:
        scored = gather_object(scored)
    return [(chosen, rejected) for _, chosen, rejected in sorted(scored)]


def store_opponent(trainer: Any, rows: Dataset, folder: Path) -> Dataset:
    """Return rows with the opponent's log-probs, computed and written down once.

    What an interrupted run has written is read back, never computed again.

    Args:
        trainer: A `SPINTrainer` whose model is the opponent.
        rows: Of `build_pair_rows`.
        folder: Where the dataset is kept.
    """
    if folder.exists():
        try:
            with naming_damage(folder, "The opponent scores its pairs again."):
                stored = load_from_disk(str(folder))
                stored.data.validate(full=True)
                return stored
        except DamagedFileError as error:  # the weights are still the opponent's
            logger.warning("%s", error)
        trainer.accelerator.wait_for_everyone()  # all have looked before one deletes
        if trainer.is_world_process_zero():
            shutil.rmtree(folder)
    if len(rows) == 0:  # a dataset without rows can't be read back
        return rows
    logps = score_pairs(trainer, rows, trainer.compute_ref_log_probs)
    for column, values in zip(_COLUMNS, zip(*logps, strict=True), strict=True):
        rows = rows.add_column(column, list(values))
    trainer.accelerator.wait_for_everyone()  # all have looked before one writes
    if trainer.is_world_process_zero():
        save_rows(folder, rows)
    trainer.accelerator.wait_for_everyone()
    return rows


def check_opponent(trainer: Any, model: Any, inputs: Mapping[str, Any], round_index: int) -> None:
    """Raise unless the policy, about to be trained, gives a batch the stored log-probs.

    In float32 within `TOLERANCE`. In lower precision within three times the spread that re-scoring
    the batch at other paddings gives, because sums of rounded numbers depend on the padding.

    Args:
        trainer: A `SPINTrainer`.
        model: As the training step uses it, wrapped; it is left in train mode.
        inputs: The first batch of the round.
        round_index: For the error.

    Raises:
        WrongOpponentError: With the largest difference and what usually causes it.
    """
    model.train()  # as the step that follows: noise of that mode counts as well
    inputs = send_to_device(dict(inputs), trainer.accelerator.device)
    stored = torch.cat([inputs[column] for column in _COLUMNS]).float()
    live = _rescore(trainer, model, inputs)
    tolerance = TOLERANCE * max(1.0, trainer.beta / _BETA_OF_TOLERANCE)
    gap = trainer.beta * float((live - stored).abs().max())
    if gap <= tolerance:
        return
    if not _is_float32(trainer):
        spread = max(
            float((_rescore(trainer, model, other) - live).abs().max())
            for other in _other_paddings(inputs)
        )
        tolerance = max(tolerance, _SPREADS * trainer.beta * spread)
        if gap <= tolerance:
            return
    raise WrongOpponentError(
        f"round {round_index}: before the first step the policy's log-probs differ from the stored "
        f"ones of its opponent by {gap:.3g} (times beta={trainer.beta:g}), and at most "
        f"{tolerance:.3g} is rounding. The opponent must be the policy as it enters the round, so "
        "that every margin begins at 0. Usual reasons: a callback or hook changed the weights "
        "between scoring and training, something is random in train mode, `data_collator` builds "
        "other batches in training, or the stored rows under `_rounds` are of other weights (then delete the "
        "round's `dataset` folder)."
    )


def _rescore(trainer: Any, model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    return torch.cat(trainer.compute_policy_log_probs(model, inputs)).float()


def _is_float32(trainer: Any) -> bool:
    if trainer.accelerator.mixed_precision != "no":
        return False
    return all(p.dtype == torch.float32 for p in trainer.model.parameters())


def _other_paddings(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the batch with wider padding, twice."""
    sequences = ("input_ids", "attention_mask", "completion_mask")
    return [
        {k: functional.pad(v, (0, width)) if k in sequences else v for k, v in inputs.items()}
        for width in (8, 64)
    ]
