"""Parameters with vLLM's names; another name is an error."""

from dataclasses import dataclass
from enum import Enum


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop_token_ids: list[int]
    logprobs: int | None
    seed: int
    max_tokens: int
    logit_bias: dict[int, float] | None
    output_kind: RequestOutputKind
    ignore_eos: bool
    detokenize: bool

    def __post_init__(self) -> None:
        assert -(2**63) <= self.seed < 2**63
        assert self.seed != -1
        assert self.ignore_eos
