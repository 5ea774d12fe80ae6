"""What trainers over rounds have in common, and what each says itself."""

import inspect

import pytest
from trl import SFTTrainer

import trl_selfplay
from trl_selfplay.trainers.rounds import RoundsMixin

TRAINERS = [
    trainer
    for name in trl_selfplay.__all__
    if inspect.isclass(trainer := getattr(trl_selfplay, name)) and issubclass(trainer, RoundsMixin)
]
MIXINS = [
    c for c in {c: 0 for t in TRAINERS for c in t.__bases__} if "trl_selfplay" in c.__module__
]
# What a method may say about itself; all else in a mixin is the same for every method.
HOOKS = {
    "play_round", "identity", "prepare_stages", "warm_up_rows", "load_sets", "score_sets",
    "score_heldout",
    "compute_ref_log_probs", "collated_columns", "load_rows", "placeholder_rows", "data_of",
    "samples_prompts", "trained_prompts",
}  # fmt: skip


def test_there_are_trainers_and_mixins() -> None:
    assert len(TRAINERS) >= 3
    assert RoundsMixin in MIXINS


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_round_is_read_in_the_methods_own_file(trainer) -> None:
    assert trainer.play_round.__module__ == trainer.__module__
    assert all(base in MIXINS for base in trainer.__bases__[:-1])
    assert trainer.__bases__[-1].__module__.startswith("trl.")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_is_common_is_not_overridden(trainer) -> None:
    mixins = [base for base in trainer.__bases__ if base in MIXINS]
    common = {name for mixin in mixins for name in vars(mixin) if not name.startswith("__")}
    assert set(vars(trainer)) & common <= HOOKS


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_constructor_begins_with_the_parents_parameters(trainer) -> None:
    """So a script of the parent's works by place as well; what is new has a name of its own."""
    parents = list(inspect.signature(trainer.__bases__[-1]).parameters.values())
    own = list(inspect.signature(trainer).parameters.values())
    assert [(p.name, p.default) for p in own[: len(parents)]] == [
        (p.name, p.default) for p in parents
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in own[len(parents) :])


def test_a_trainer_without_rounds_says_what_is_missing() -> None:
    class Unfinished(RoundsMixin):
        def __init__(self) -> None:
            pass

    with pytest.raises(NotImplementedError, match=r"Unfinished must define play_round"):
        Unfinished().play_round(0)


def test_the_parent_gets_by_name_only_what_was_given(monkeypatch, build_star) -> None:
    """TRL 2.0 drops `compute_loss_func`; scripts that don't pass it must not notice."""
    given = []
    build_parent = SFTTrainer.__init__

    def record(self, *args, **kwargs):
        given.append(set(kwargs))
        build_parent(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "__init__", record)
    build_star()
    assert "train_dataset" in given[0]
    assert not {"compute_loss_func", "compute_metrics", "callbacks"} & given[0]
