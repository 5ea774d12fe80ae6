"""A STaR run small enough for a second: a tiny model, a dozen sums, a reward it often meets."""

from functools import partial

import pytest
from datasets import Dataset
from tiny_rewards import contains_solution, digit_share
from tiny_trainers import SMALL, build_trainer
from transformers import TrainerCallback

from trl_selfplay.rounds.weights import trainable_parameters

GRADED = {"num_generations": 4, "temperature": 1.0}


class Recorder(TrainerCallback):
    """Keeps what only exists at one moment: weights and optimizer as a round's training begins."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int | None]] = []
        self.weights_at_train_begin = []
        self.weights_at_train_end = []
        self.optimizer_states = []
        self.logs = []

    @staticmethod
    def copy(model):
        return {n: p.detach().clone() for n, p in trainable_parameters(model).items()}

    def on_round_begin(self, args, state, control, round_index, **kwargs):
        self.events.append(("round_begin", round_index))

    def on_round_end(self, args, state, control, round_index, **kwargs):
        self.events.append(("round_end", round_index))

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.events.append(("train_begin", None))
        self.weights_at_train_begin.append(self.copy(model))
        self.optimizer_states.append(len(optimizer.state))

    def on_train_end(self, args, state, control, model, **kwargs):
        self.events.append(("train_end", None))
        self.weights_at_train_end.append(self.copy(model))

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


@pytest.fixture
def build_method(tmp_path, tiny_model, word_tokenizer, sums):
    """Return a function that builds a trainer; keywords that are fields go to the config."""

    def build(method, own, folder="run", *, model=None, **changes):
        given = {"processing_class": word_tokenizer, **own, **changes}
        if method != "SPIN":
            given = {"reward_funcs": contains_solution, "train_dataset": sums(12), **given}
        model = tiny_model(word_tokenizer) if model is None else model
        return build_trainer(method, model, tmp_path / folder, SMALL, **given)

    return build


@pytest.fixture
def build_star(build_method):
    """Return a function that builds a STaRTrainer; keywords that are fields go to the config."""
    return partial(build_method, "STaR", {"num_rounds": 2, **GRADED, "max_completion_length": 8})


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def answers():
    """Build rows whose completions a random model doesn't write: columns prompt, completion."""

    def build(num_rows=12, first=0):
        pairs = [divmod(i, 10) for i in range(first, first + num_rows)]
        return Dataset.from_list(
            [
                {"prompt": f"Q {b} + {a} = ?", "completion": f" so {b} + {a} = {(a + b) % 10}"}
                for a, b in pairs
            ]
        )

    return build


class PairRecorder(TrainerCallback):
    """Keeps the log lines of training steps by round."""

    def __init__(self) -> None:
        self.steps = {}
        self.learning_rates = {}

    def on_log(self, args, state, control, logs, **kwargs):
        if "rewards/margins" in logs and "loss" in logs:
            self.steps.setdefault(logs["round"], []).append(dict(logs))


@pytest.fixture
def pair_recorder():
    return PairRecorder()


@pytest.fixture
def build_spin(build_method, answers):
    """Return a function that builds a SPINTrainer; keywords that are fields go to the config."""
    own = {"num_rounds": 3, "max_completion_length": 64, "train_dataset": answers(12)}
    return partial(build_method, "SPIN", own)


@pytest.fixture
def build_irpo(build_method):
    """Return a function that builds an IRPOTrainer; keywords that are fields go to the config."""
    own = {"num_rounds": 3, **GRADED, "max_per_prompt": 2, "max_completion_length": 64}
    return partial(build_method, "IRPO", own)


@pytest.fixture
def build_rest_em(build_method):
    """Return a function that builds a ReSTEMTrainer; keywords that are fields go to the config."""
    return partial(build_method, "ReST^EM", {"num_rounds": 2, **GRADED, "max_completion_length": 8})


@pytest.fixture
def build_rest(build_rest_em):
    """The same with ReST's Improve steps and a reward that has degrees."""

    def build(folder="run", **changes):
        return build_rest_em(
            folder,
            **{
                "improve_thresholds": [0.3, 0.6],
                "start_from": "previous",
                "reward_funcs": digit_share,
                "max_per_prompt": None,
                "few_shot_in_training": False,
                **changes,
            },
        )

    return build


@pytest.fixture
def gold_answers():
    """Build human completions for the prompts of `sums`: columns prompt, completion, solution."""

    def build(num_rows=4, first=0):
        pairs = [divmod(i, 10) for i in range(first, first + num_rows)]
        return Dataset.from_list(
            [
                {
                    "prompt": f"Q {b} + {a} = ?",
                    "completion": f" {a} + {b} = {(a + b) % 10}",
                    "solution": str((a + b) % 10),
                }
                for a, b in pairs
            ]
        )

    return build
