"""Reward functions, which grade completions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_selfplay.rewards.answer import exact_reward as exact_reward
    from trl_selfplay.rewards.answer import extract_answer as extract_answer
    from trl_selfplay.rewards.answer import final_answer as final_answer
    from trl_selfplay.rewards.audit import Audit as Audit
    from trl_selfplay.rewards.audit import audit_reward as audit_reward
    from trl_selfplay.rewards.checker import checker_reward as checker_reward
    from trl_selfplay.rewards.choice import choice_reward as choice_reward
    from trl_selfplay.rewards.code import CodeReward as CodeReward
    from trl_selfplay.rewards.code import code_fraction_reward as code_fraction_reward
    from trl_selfplay.rewards.code import code_reward as code_reward
    from trl_selfplay.rewards.equations import equations_reward as equations_reward
    from trl_selfplay.rewards.judge import JudgeReward as JudgeReward
    from trl_selfplay.rewards.judge import judge_reward as judge_reward
    from trl_selfplay.rewards.maths import math_reward as math_reward
    from trl_selfplay.rewards.puzzles import puzzle_reward as puzzle_reward
    from trl_selfplay.rewards.ray_reward import on_ray as on_ray
    from trl_selfplay.rewards.reward_model import RewardModel as RewardModel
    from trl_selfplay.rewards.verifier import VerifierReward as VerifierReward
    from trl_selfplay.rewards.vote import VoteReward as VoteReward
    from trl_selfplay.rewards.vote import vote_reward as vote_reward

_MODULE_OF = {
    "Audit": "audit",
    "CodeReward": "code",
    "JudgeReward": "judge",
    "RewardModel": "reward_model",
    "VerifierReward": "verifier",
    "VoteReward": "vote",
    "audit_reward": "audit",
    "checker_reward": "checker",
    "choice_reward": "choice",
    "code_fraction_reward": "code",
    "code_reward": "code",
    "equations_reward": "equations",
    "exact_reward": "answer",
    "extract_answer": "answer",
    "final_answer": "answer",
    "judge_reward": "judge",
    "math_reward": "maths",
    "on_ray": "ray_reward",
    "puzzle_reward": "puzzles",
    "vote_reward": "vote",
}
__all__ = [
    "Audit",
    "CodeReward",
    "JudgeReward",
    "RewardModel",
    "VerifierReward",
    "VoteReward",
    "audit_reward",
    "checker_reward",
    "choice_reward",
    "code_fraction_reward",
    "code_reward",
    "equations_reward",
    "exact_reward",
    "extract_answer",
    "final_answer",
    "judge_reward",
    "math_reward",
    "on_ray",
    "puzzle_reward",
    "vote_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
