"""V-STaR's verifier: a model learns to prefer right completions of a finished run to wrong ones.

In: the model that was fine-tuned on right completions, and all samples of a run. Out: a verifier, whose
likelihood scores completions (rewards/verifier.py). rollouts/pairs.py decides which completions are
paired. To the rest of the package it is a run of one round that samples nothing.

Source: V-STaR, arXiv 2402.06457, Algorithm 1 and equation 2.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOTrainer

from trl_selfplay.disk import (
    DamagedFileError,
    naming_damage,
    refuse_changed,
    replace_folder,
    save_checksums,
)
from trl_selfplay.rollouts.pairs import pair_rollouts
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.prompts import PromptRow, load_prompt_rows
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.sequence import Rollouts
from trl_selfplay.rollouts.stored import load_all_samples
from trl_selfplay.rounds.identity import summarize_each
from trl_selfplay.trainers.construction import Grading, read_config, refuse_arguments
from trl_selfplay.trainers.ported_scripts import explains_foreign_arguments
from trl_selfplay.trainers.reference import ReferenceMixin
from trl_selfplay.trainers.rounds import RoundsMixin
from trl_selfplay.trainers.v_star.config import VSTaRConfig

logger = logging.getLogger(__name__)

_REMEDY = (
    "No prompt has both a right and a wrong completion that could be paired. Sample more of them in "
    "the run (num_generations), or at a higher temperature where all are right."
)


class VSTaRTrainer(ReferenceMixin, RoundsMixin, DPOTrainer):
    """Trains a verifier on the right and wrong completions of all rounds of a run.

    Takes the arguments of `trl.DPOTrainer` in the same order. `model` is the model that was
    fine-tuned on right completions (the paper's G_SFT): the verifier starts from it, and the loss
    compares with it. The folder of an adapter is merged into its base, which is then kept in
    `output_dir/merged` as the base of the verifier's own adapter. `train_dataset` has the prompts of
    the run, as the run's trainer got them.

    Args:
        samples: The `output_dir` of a finished run whose completions were graded, such as
            STaRTrainer's, or graded rollouts, each (prompt_id, sample_index) once. Completions that
            were sampled with a hint, or truncated, are left out.

    Raises:
        ValueError, TypeError: For arguments, rows or samples that can't work.

    Source: V-STaR, arXiv 2402.06457, Algorithm 1.
    """

    args: VSTaRConfig
    samples_prompts = False
    _tag_names = ["trl", "dpo", "trl-selfplay", "v-star"]  # noqa: RUF012  # as in TRL
    _name = "V-STaR"
    _paper = {  # noqa: RUF012  # as in TRL
        "title": "V-STaR: Training Verifiers for Self-Taught Reasoners",
        "id": "2402.06457",
        "citation": """\
@inproceedings{hosseini2024vstar,
    title        = {{V-STaR: Training Verifiers for Self-Taught Reasoners}},
    author       = {Arian Hosseini and Xingdi Yuan and Nikolay Malkin and Aaron Courville and Alessandro Sordoni and Rishabh Agarwal},
    year         = 2024,
    booktitle    = {First Conference on Language Modeling},
    eprint       = {arXiv:2402.06457},
}""",
    }

    @explains_foreign_arguments
    def __init__(
        self, model: Any, ref_model: None = None, args: VSTaRConfig | None = None,
        data_collator: Any = None, train_dataset: Any = None, eval_dataset: None = None,
        processing_class: Any = None, compute_metrics: None = None,
        callbacks: list[Any] | None = None, optimizers: tuple[None, None] = (None, None),
        quantization_config: Any = None, peft_config: Any = None, *,
        samples: str | Path | Sequence[Rollout],
    ) -> None:  # fmt: skip
        args = read_config(args, VSTaRConfig, model, "VSTaR")
        refuse_arguments(
            ref_model=ref_model, compute_metrics=compute_metrics, optimizers=optimizers
        )
        if eval_dataset is not None:
            raise ValueError(
                "`eval_dataset` was given, and a verifier is judged by the completions that it "
                "chooses: score held-out samples with VerifierReward, and see "
                "trl_selfplay.evaluation.estimates.best_of_k. Leave it out."
            )
        rows = load_prompt_rows(train_dataset, "train_dataset")
        self.samples = _read_samples(samples, rows)
        super().__init__(
            _with_merged_adapter(model, args), args, rows, eval_dataset=None,
            processing_class=processing_class, peft_config=peft_config,
            quantization_config=quantization_config, data_collator=data_collator,
            callbacks=callbacks, grading=Grading(),
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Return digests of the samples and of their rewards."""
        samples = ((r.prompt_id, r.completion_ids) for r in self.samples)
        (rewards,) = self.samples.columns("reward")
        return {"samples": summarize_each(samples), "sample_rewards": summarize_each(rewards)}

    def data_of(self, prompt_ids: Collection[str]) -> dict[str, Any]:
        """Return the samples of these prompts."""
        of_prompts = self.samples.columns("prompt_id")[0]
        return {
            "samples": self.samples.pick([i for i, p in enumerate(of_prompts) if p in prompt_ids])
        }

    def play_round(self, round_index: int) -> PlayedRound:
        """Pair right with wrong completions of all rounds, and score both under G_SFT."""
        play, args = self.self_play, self.args
        prompt_ids = play.training_prompt_ids(play.rows)
        pairing = pair_rollouts(
            self.samples,
            (),
            is_right=lambda rollout: rollout.passes(args.reward_threshold),
            fits=lambda rollout: play.fits(rollout, prompt_ids),
            deduplicate=args.deduplicate,
            max_pairs=args.max_per_prompt,
            seed=args.seed,
        )
        played = self.build_pair_round(
            round_index,
            pairing.selection,
            pairing.chosen,
            pairing.rejected,
            prompt_ids,
            pairing.metrics,
        )
        return replace(played, remedy=_REMEDY)


def _read_samples(samples: str | Path | Sequence[Rollout], rows: Sequence[PromptRow]) -> Rollouts:
    """Return graded samples of the prompts.

    Raises:
        FileNotFoundError: There is no run in the folder.
        ValueError: The samples aren't graded, called tools, or none is of these prompts.
    """
    where = "`samples`"
    if isinstance(samples, str | Path):
        where, root = repr(str(samples)), Path(samples) / "_rounds"
        found = load_all_samples(root)
        if not found:
            raise FileNotFoundError(
                f"samples={where}: there are no samples in {root}. Give the output_dir of a run "
                "over rounds, or rollouts."
            )
    else:
        found = Rollouts.of([rollout for rollout in samples if not rollout.hinted])
    prompt_ids, rewards = found.columns("prompt_id", "rewards")
    if not all(rewards):
        raise ValueError(
            f"{where} has completions without rewards, such as SPINTrainer's. Give a run whose "
            "completions were graded by reward functions."
        )
    if any(mask is not None for mask in found.columns("completion_mask")[0]):
        raise ValueError(
            f"{where} has completions with results of tools, which the prompts of a verifier don't show and "
            "whose tokens VerifierReward would count as the model's. Give samples of single turns."
        )
    known = {row.prompt_id for row in rows}
    of_prompts = [place for place, prompt_id in enumerate(prompt_ids) if prompt_id in known]
    sampled = set(prompt_ids)
    if not of_prompts:
        raise ValueError(
            f"none of the {len(sampled)} prompts that {where} has samples of is in "
            "`train_dataset`. Give the dataset of that run: prompts and solutions must be equal."
        )
    if unknown := len(sampled - known):
        logger.warning(
            "%d of the %d prompts that %s has samples of are not in `train_dataset` and are left out.",
            unknown,
            len(sampled),
            where,
        )
    return found.pick(of_prompts)


def _with_merged_adapter(model: Any, args: VSTaRConfig) -> Any:
    """Return the model; for an adapter's folder, the folder of its base with the adapter merged.

    A new adapter on the merged weights needs a base that can be loaded again with them.
    """
    source = Path(model) if isinstance(model, str) else None
    if source is None or not (source / "adapter_config.json").exists():
        return model
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"model={model!r} is the folder of an adapter, which can't be merged while ZeRO-3 divides what "
            "is loaded. Merge it in one process before, with PEFT's merge_and_unload, or train with ZeRO-2."
        )
    config: Any = args
    merged = Path(config.output_dir) / "merged"
    with config.main_process_first(local=False, desc="merging the adapter"):
        is_resumed = merged.with_name("_rounds").exists()
        if config.process_index == 0 and not (is_resumed and _is_whole(merged, source)):
            how: dict[str, Any] = {"dtype": torch.float32, **(config.model_init_kwargs or {})}
            how.pop("quantization_config", None)  # merging into rounded weights would round again
            adapted: Any = AutoPeftModelForCausalLM.from_pretrained(str(source), **how)
            temporary = merged.with_name(".merged")
            adapted.merge_and_unload().save_pretrained(temporary)
            AutoTokenizer.from_pretrained(str(source)).save_pretrained(temporary)
            save_checksums(temporary, (".safetensors", ".json"))
            replace_folder(temporary, merged)
    return str(merged)


def _is_whole(merged: Path, source: Path) -> bool:
    """Return whether the merged model is there as it was written, and say so if it is damaged."""
    if not merged.exists():
        return False
    try:
        with naming_damage(merged, f"The adapter in {source} is merged again."):
            refuse_changed(merged)
    except DamagedFileError as error:
        logger.warning("%s", error)
        return False
    return True
