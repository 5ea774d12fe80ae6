"""Self-play trainers on TRL. Names are imported when they are first used.

In: nothing; `import trl_selfplay` loads neither torch nor TRL. Out: the public names of `__all__`.
What isn't in `__all__` may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_selfplay.empty_round import EmptyRoundError
    from trl_selfplay.opponent import WrongOpponentError
    from trl_selfplay.rollouts import Rollout
    from trl_selfplay.thoughts.model import QuietSTaRModel
    from trl_selfplay.trainer.quiet_star_config import QuietSTaRConfig
    from trl_selfplay.trainer.quiet_star_trainer import QuietSTaRTrainer
    from trl_selfplay.trainer.rest_em_config import ReSTEMConfig
    from trl_selfplay.trainer.rest_em_trainer import ReSTEMTrainer
    from trl_selfplay.trainer.spin_config import SPINConfig
    from trl_selfplay.trainer.spin_trainer import SPINTrainer
    from trl_selfplay.trainer.star_config import STaRConfig
    from trl_selfplay.trainer.star_trainer import STaRTrainer

__version__ = "0.1.0"
__all__ = [
    "EmptyRoundError",
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
    "WrongOpponentError",
    "__version__",
]

_MODULE_OF = {
    "EmptyRoundError": "trl_selfplay.empty_round",
    "QuietSTaRConfig": "trl_selfplay.trainer.quiet_star_config",
    "QuietSTaRModel": "trl_selfplay.thoughts.model",
    "QuietSTaRTrainer": "trl_selfplay.trainer.quiet_star_trainer",
    "ReSTEMConfig": "trl_selfplay.trainer.rest_em_config",
    "ReSTEMTrainer": "trl_selfplay.trainer.rest_em_trainer",
    "Rollout": "trl_selfplay.rollouts",
    "SPINConfig": "trl_selfplay.trainer.spin_config",
    "SPINTrainer": "trl_selfplay.trainer.spin_trainer",
    "STaRConfig": "trl_selfplay.trainer.star_config",
    "STaRTrainer": "trl_selfplay.trainer.star_trainer",
    "WrongOpponentError": "trl_selfplay.opponent",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
