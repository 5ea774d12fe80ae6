"""Self-play trainers on TRL. Names are imported when they are first used.

In: nothing; `import trl_selfplay` loads neither torch nor TRL. Out: the public names of `__all__`.
What isn't in `__all__` may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_selfplay.estimation.forecast import estimate
    from trl_selfplay.estimation.plan import CannotEstimateError
    from trl_selfplay.estimation.record import Estimate
    from trl_selfplay.rollouts.record import Rollout
    from trl_selfplay.rollouts.selection import default_normal_form, reasoning_path
    from trl_selfplay.rounds.empty_round import EmptyRoundError
    from trl_selfplay.trainers.irpo.config import IRPOConfig
    from trl_selfplay.trainers.irpo.trainer import IRPOTrainer
    from trl_selfplay.trainers.quiet_star.config import QuietSTaRConfig
    from trl_selfplay.trainers.quiet_star.model import QuietSTaRModel
    from trl_selfplay.trainers.quiet_star.trainer import QuietSTaRTrainer
    from trl_selfplay.trainers.reference import WrongOpponentError, WrongReferenceError
    from trl_selfplay.trainers.rest_em.config import ReSTEMConfig
    from trl_selfplay.trainers.rest_em.trainer import ReSTEMTrainer
    from trl_selfplay.trainers.spin.config import SPINConfig
    from trl_selfplay.trainers.spin.trainer import SPINTrainer
    from trl_selfplay.trainers.star.config import STaRConfig
    from trl_selfplay.trainers.star.rationalization import add_hint, find_leak
    from trl_selfplay.trainers.star.trainer import STaRTrainer
    from trl_selfplay.trainers.v_star.config import VSTaRConfig
    from trl_selfplay.trainers.v_star.trainer import VSTaRTrainer

__version__ = "0.1.0"
__all__ = [
    "CannotEstimateError",
    "EmptyRoundError",
    "Estimate",
    "IRPOConfig",
    "IRPOTrainer",
    "QuietSTaRConfig",
    "QuietSTaRModel",
    "QuietSTaRTrainer",
    "ReSTEMConfig",
    "ReSTEMTrainer",
    "Rollout",
    "SPINConfig",
    "SPINTrainer",
    "STaRConfig",
    "STaRTrainer",
    "VSTaRConfig",
    "VSTaRTrainer",
    "WrongOpponentError",
    "WrongReferenceError",
    "__version__",
    "add_hint",
    "default_normal_form",
    "estimate",
    "find_leak",
    "reasoning_path",
]

_MODULE_OF = {
    "CannotEstimateError": "trl_selfplay.estimation.plan",
    "EmptyRoundError": "trl_selfplay.rounds.empty_round",
    "Estimate": "trl_selfplay.estimation.record",
    "IRPOConfig": "trl_selfplay.trainers.irpo.config",
    "IRPOTrainer": "trl_selfplay.trainers.irpo.trainer",
    "QuietSTaRConfig": "trl_selfplay.trainers.quiet_star.config",
    "QuietSTaRModel": "trl_selfplay.trainers.quiet_star.model",
    "QuietSTaRTrainer": "trl_selfplay.trainers.quiet_star.trainer",
    "ReSTEMConfig": "trl_selfplay.trainers.rest_em.config",
    "ReSTEMTrainer": "trl_selfplay.trainers.rest_em.trainer",
    "Rollout": "trl_selfplay.rollouts.record",
    "SPINConfig": "trl_selfplay.trainers.spin.config",
    "SPINTrainer": "trl_selfplay.trainers.spin.trainer",
    "STaRConfig": "trl_selfplay.trainers.star.config",
    "STaRTrainer": "trl_selfplay.trainers.star.trainer",
    "VSTaRConfig": "trl_selfplay.trainers.v_star.config",
    "VSTaRTrainer": "trl_selfplay.trainers.v_star.trainer",
    "WrongOpponentError": "trl_selfplay.trainers.reference",
    "WrongReferenceError": "trl_selfplay.trainers.reference",
    "add_hint": "trl_selfplay.trainers.star.rationalization",
    "default_normal_form": "trl_selfplay.rollouts.selection",
    "estimate": "trl_selfplay.estimation.forecast",
    "find_leak": "trl_selfplay.trainers.star.rationalization",
    "reasoning_path": "trl_selfplay.rollouts.selection",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
