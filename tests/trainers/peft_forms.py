"""Every PEFT form that a tiny Llama takes, by name: what the sweep of test_peft_forms.py runs over.

The Llama is that of conftest.py: hidden size 32, 4 heads, keys and values of 16, 21 tokens.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
from packaging.version import Version
from peft.tuners.lora import config as lora_config

TARGETS = ["q_proj", "v_proj"]


def lora(**changes: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
        | {name: value() if callable(value) else value for name, value in changes.items()}
    )


def part(config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(lora_config, config)(**settings)


def form(config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, config)(**{"task_type": "CAUSAL_LM", **settings})


def known(make: Callable[[], Any]) -> Callable[[], Any]:
    """Skip a test of a form that this version of PEFT doesn't have yet."""

    def checked() -> Any:
        try:
            return make()
        except (AttributeError, TypeError, ValueError) as error:
            if Version(peft.__version__) >= Version("0.21"):
                raise
            pytest.skip(f"PEFT {peft.__version__}: {error}")

    return checked


LORA: dict[str, Callable[[], Any]] = {
    "lora": lora(),
    "lora all-linear": lora(target_modules="all-linear"),
    "lora dropout": lora(lora_dropout=0.3),
    "lora rslora": lora(use_rslora=True),
    "lora dora": lora(use_dora=True),
    "lora bias all": lora(bias="all"),
    "lora bias lora_only": lora(bias="lora_only"),
    "lora_bias": lora(lora_bias=True),
    "lora modules_to_save": lora(modules_to_save=["lm_head"]),
    "lora norms saved": lora(modules_to_save=["norm", "post_attention_layernorm"]),
    "lora embeddings saved": lora(modules_to_save=["embed_tokens"]),
    "lora on embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "lora on lm_head": lora(target_modules=["q_proj", "lm_head"]),
    "lora token indices": lora(trainable_token_indices=[3, 4, 5]),
    "lora token indices of both": lora(
        trainable_token_indices={"embed_tokens": [3, 4], "lm_head": [3, 4]}
    ),
    "lora rank_pattern": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 1}),
    "lora layers": lora(layers_to_transform=[1]),
    "lora exclude": lora(target_modules="all-linear", exclude_modules=["down_proj"]),
    "lora target_parameters": lora(
        target_modules=[], target_parameters=["q_proj.weight", "mlp.up_proj.weight"]
    ),
    "lora layer_replication": lora(layer_replication=[[0, 2], [1, 2]]),
    "lora gaussian": lora(init_lora_weights="gaussian"),
    "lora orthogonal": lora(init_lora_weights="orthogonal"),
    "lora random": lora(init_lora_weights=False),
    "lora mica": lora(init_lora_weights="mica"),
    "lora pissa": lora(init_lora_weights="pissa"),
    "lora pissa_niter": lora(init_lora_weights="pissa_niter_2"),
    "lora olora": lora(init_lora_weights="olora"),
    "lora eva": lora(init_lora_weights="eva"),
    "lora corda": lora(init_lora_weights="corda"),
    "lora loftq": lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig()),
    "lora lora_ga": lora(init_lora_weights="lora_ga"),
    "lora alora": lora(alora_invocation_tokens=[3]),
    "lora velora": lora(velora_config=part("VeloraConfig")),
    "lora bdlora": lora(
        use_bdlora=part(
            "BdLoraConfig",
            nblocks=2,
            target_modules_bd_a=["q_proj"],
            target_modules_bd_b=["v_proj"],
        )
    ),
    "lora kasa": lora(kasa_config=part("KasaConfig")),
    "lora monteclora": lora(monteclora_config=part("MontecloraConfig")),
    "lora arrow": lora(arrow_config=part("ArrowConfig")),
    "lora ephemeral": lora(runtime_config=part("LoraRuntimeConfig", ephemeral_gpu_offload=True)),
    "lora ensure tying": lora(ensure_weight_tying=True, modules_to_save=["embed_tokens"]),
}
TUNERS: dict[str, Callable[[], Any]] = {
    "adalora": form("AdaLoraConfig", init_r=4, target_r=2, total_step=100, target_modules=TARGETS),
    "adamss": form("AdamssConfig", target_modules=TARGETS),
    "adaption_prompt": form("AdaptionPromptConfig", adapter_len=2, adapter_layers=1),
    "beft": form("BeftConfig"),
    "boft": form("BOFTConfig", boft_block_size=8, target_modules=TARGETS),
    "c3a": form("C3AConfig", block_size=8, target_modules=TARGETS),
    "cartridge": form("CartridgeConfig", num_virtual_tokens=2),
    "cpt": form("CPTConfig", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
    "deft": form("DeftConfig", target_modules=TARGETS),
    "delora": form("DeloraConfig", r=4, target_modules=TARGETS),
    "fourierft": form("FourierFTConfig", n_frequency=40, target_modules=TARGETS),
    "frod": form("FrodConfig", target_modules=TARGETS, progressbar=False),
    "glora": form("GloraConfig", r=4, target_modules=TARGETS),
    "gralora": form("GraloraConfig", r=4, gralora_k=2, target_modules=TARGETS),
    "hira": form("HiraConfig", r=4, target_modules=TARGETS),
    "hra": form("HRAConfig", r=4, target_modules=TARGETS),
    "ia3": form("IA3Config"),
    "lily": form("LilyConfig", target_modules=TARGETS),
    "ln_tuning": form("LNTuningConfig"),
    "loha": form("LoHaConfig", r=4, target_modules=TARGETS),
    "loha rank dropout": form("LoHaConfig", r=4, rank_dropout=0.3, target_modules=TARGETS),
    "lokr": form("LoKrConfig", r=4, target_modules=TARGETS),
    "lokr rank dropout": form("LoKrConfig", r=4, rank_dropout=0.3, target_modules=TARGETS),
    "miss": form("MissConfig", r=4, target_modules=TARGETS),
    "miss bat": form("MissConfig", r=4, init_weights="bat", target_modules=TARGETS),
    "multitask prompt tuning": form(
        "MultitaskPromptTuningConfig", num_virtual_tokens=2, num_tasks=1
    ),
    "oft": form("OFTConfig", oft_block_size=8, target_modules=TARGETS),
    "osf": form("OSFConfig", target_modules=TARGETS),
    "p_tuning": form("PromptEncoderConfig", num_virtual_tokens=2, encoder_hidden_size=8),
    "peanut": form("PeanutConfig", target_modules=TARGETS),
    "poly": form("PolyConfig", r=4, n_tasks=1, n_skills=2, target_modules=TARGETS),
    "prefix_tuning": form("PrefixTuningConfig", num_virtual_tokens=2),
    "prompt_tuning": form("PromptTuningConfig", num_virtual_tokens=2),
    "psoft": form("PsoftConfig", r=4, target_modules=TARGETS),
    "pvera": form("PveraConfig", r=4, target_modules=TARGETS),
    "randlora": form("RandLoraConfig", r=4, target_modules=TARGETS),
    "road": form("RoadConfig", group_size=8, target_modules=TARGETS),
    "shadow": form("ShadowConfig"),
    "shira": form("ShiraConfig", r=4, target_modules=TARGETS),
    "supertuning": form("SupertuningConfig", target_modules=TARGETS),
    "tinylora": form("TinyLoraConfig", target_modules=TARGETS),
    "trainable_tokens": form("TrainableTokensConfig", token_indices=[3, 4, 5]),
    "unilora": form("UniLoraConfig", target_modules=TARGETS),
    "vblora": form("VBLoRAConfig", r=4, num_vectors=8, vector_length=8, topk=2,
                   target_modules=TARGETS),
    "vera": form("VeraConfig", r=4, target_modules=TARGETS),
    "waveft": form("WaveFTConfig", n_frequency=40, target_modules=TARGETS),
    "xlora": form("XLoraConfig", hidden_size=32, adapters={}),
}  # fmt: skip
FORMS = {name: known(make) for name, make in (LORA | TUNERS).items()}
