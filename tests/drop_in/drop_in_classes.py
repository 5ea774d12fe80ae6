"""The trainers of the drop-in tests, with their configs and small settings, by method."""

from tiny_trainers import METHODS, SMALL
from trl import DPOConfig, DPOTrainer, GRPOConfig, KTOConfig, SFTConfig, SFTTrainer

CLASSES = {**METHODS, "SFT": (SFTTrainer, SFTConfig), "DPO": (DPOTrainer, DPOConfig)}
SETTINGS = {
    **SMALL, "num_rounds": 1, "max_completion_length": 8, "max_steps": 2, "save_strategy": "no",
    "bf16": False,
}  # fmt: skip
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
