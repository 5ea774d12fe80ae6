"""The trainers of the drop-in tests, with their configs and small settings, by method."""

from trl import DPOConfig, DPOTrainer, GRPOConfig, KTOConfig, SFTConfig, SFTTrainer

from trl_selfplay import (
    IRPOConfig,
    IRPOTrainer,
    QuietSTaRConfig,
    QuietSTaRTrainer,
    ReSTEMConfig,
    ReSTEMTrainer,
    SPINConfig,
    SPINTrainer,
    STaRConfig,
    STaRTrainer,
    VSTaRConfig,
    VSTaRTrainer,
)

CLASSES = {
    "STaR": (STaRTrainer, STaRConfig),
    "ReST^EM": (ReSTEMTrainer, ReSTEMConfig),
    "SPIN": (SPINTrainer, SPINConfig),
    "IRPO": (IRPOTrainer, IRPOConfig),
    "V-STaR": (VSTaRTrainer, VSTaRConfig),
    "Quiet-STaR": (QuietSTaRTrainer, QuietSTaRConfig),
    "SFT": (SFTTrainer, SFTConfig),
    "DPO": (DPOTrainer, DPOConfig),
}
SETTINGS = {
    "num_rounds": 1,
    "max_completion_length": 8,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
}
OWN_SETTINGS = {
    "STaR": {"rationalize": False, "num_generations": 2, "temperature": 1.0},
    "ReST^EM": {"num_generations": 2},
    "IRPO": {"num_generations": 2},
    "V-STaR": {"num_rounds": 1, "max_completion_length": 1},
    "Quiet-STaR": {"thought_length": 2, "num_ahead_tokens": 1, "max_length": 128},
}


# Of ours and of TRL's configs, so that a field that a config lacks is still passed to it.
ALL_FIELDS = {
    name
    for config in (*(config for _, config in CLASSES.values()), GRPOConfig, KTOConfig)
    for name in config.__dataclass_fields__
} | {"max_prompt_length"}
