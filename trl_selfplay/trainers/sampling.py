"""Build the sampler of a trainer over rounds: in its own process, over a vLLM engine or a Ray cluster.

In: the trainer's config and its built model. Out: a `Sampler`. The heavy parts of an engine are imported
only where it is used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from trl_selfplay.evaluation.progress import say
from trl_selfplay.generation.checked_sampler import CheckedSampler, EngineSampler
from trl_selfplay.generation.completion_scores import score_completions
from trl_selfplay.generation.engine_agreement import (
    LIMIT_FLOAT32,
    LIMIT_QUANTIZED,
    LIMIT_REDUCED,
)
from trl_selfplay.generation.model_traits import ModelTraits
from trl_selfplay.generation.sampler import Sampler
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.rounds.base_source import find_source
from trl_selfplay.rounds.hand_over import HandOver, why_copied
from trl_selfplay.trainers.engine_config import engine_settings, forward_dtype


def build_sampler(
    config: Any,
    given: Any,
    model: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    traits: ModelTraits,
) -> Sampler:
    """Return what samples, by `use_vllm`, `vllm_mode` and `use_ray`.

    Args:
        config: The trainer's arguments.
        given: The model as the trainer's constructor got it.
        model: Returns the model as the trainer holds it now; training wraps it anew.
        tokenizer: Its tokenizer.
        accelerator: The trainer's.
        traits: The model's.

    Raises:
        ConnectionError: No vLLM server answers.
        ValueError: The server can't load what is trained.
    """
    if not config.use_vllm and not config.use_ray:
        return TransformersSampler(model, tokenizer, accelerator=accelerator, traits=traits)
    unwrapped = accelerator.unwrap_model(model())
    settings = engine_settings(config, unwrapped, accelerator)
    revision = (config.model_init_kwargs or {}).get("revision")
    folder = Path(config.output_dir) / ("_ray" if config.use_ray else "_vllm")
    hand_over = HandOver(
        lambda: accelerator.unwrap_model(model()),
        folder / "weights",
        find_source(
            unwrapped,
            given,
            revision,
            config.vllm_quantization,
            trust_remote_code=config.trust_remote_code,
        ),
        getattr(torch, settings.dtype),
    )
    engine: EngineSampler
    if config.use_ray:
        from trl_selfplay.generation.ray_cluster import RayCluster
        from trl_selfplay.generation.ray_sampler import PoolSettings, RaySampler
        from trl_selfplay.generation.ray_worker import WorkerPlan

        plan = WorkerPlan(
            tokenizer,
            traits,
            "cuda" if config.ray_gpus_per_worker else "cpu",
            settings,
            uses_vllm=config.use_vllm,
            attention=getattr(unwrapped.config, "_attn_implementation", None),
        )
        pool = PoolSettings(
            config.ray_num_workers, config.ray_cpus_per_worker, config.ray_gpus_per_worker
        )
        engine = RaySampler(RayCluster(config.ray_address), plan, pool, hand_over, announce=say)
    elif config.vllm_mode == "server":
        from trl_selfplay.generation.vllm_server import VLLMServerSampler

        if (reason := why_copied(unwrapped)) is not None:
            raise ValueError(
                f"vllm_mode='server' loads adapters into the server, and {reason}. Train a LoRA "
                "adapter without that, or use vllm_mode='phase', which takes whole copies too."
            )
        engine = VLLMServerSampler(
            config.server_url, hand_over, tokenizer, traits, timeout_s=config.vllm_server_timeout
        )
    else:
        from trl_selfplay.generation.vllm_sampler import VLLMSampler

        engine = VLLMSampler(
            settings, hand_over, tokenizer, traits, accelerator.device, announce=say
        )
    token_ids = frozenset(tokenizer.get_vocab().values())
    return CheckedSampler(
        engine,
        hand_over,
        lambda completions, options: score_completions(
            model(), accelerator, traits, completions, options, token_ids
        ),
        _limit(config, unwrapped, accelerator, settings.dtype),
        folder / "engine.json",
        config.allow_engine_change,
    )


def _limit(config: Any, model: Any, accelerator: Accelerator, dtype: str) -> float:
    """Return the largest difference of log-probs that is accepted, by the precision of both sides."""
    if config.vllm_quantization or getattr(model.config, "quantization_config", None) is not None:
        return LIMIT_QUANTIZED
    is_exact = forward_dtype(model, accelerator) is torch.float32 and dtype == "float32"
    return LIMIT_FLOAT32 if is_exact and config.vllm_mode == "phase" else LIMIT_REDUCED
