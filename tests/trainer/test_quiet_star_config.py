import pytest

from trl_selfplay import QuietSTaRConfig

BASE = {"output_dir": "unused", "use_cpu": True, "bf16": False}


def test_the_defaults_are_those_of_the_method() -> None:
    config = QuietSTaRConfig(**BASE)
    names = ("num_thoughts", "thought_length", "num_ahead_tokens", "thought_temperature",
             "thought_fraction", "base_loss_weight", "reinforce_weight", "reinforce_baseline",
             "meta_token_scale")  # fmt: skip
    values = [getattr(config, name) for name in names]
    assert values == [2, 8, 4, 1.0, 1.0, 0.5, 1.0, "mean", 100.0]
    ours = set(QuietSTaRConfig.__dataclass_fields__) - set(
        QuietSTaRConfig.__mro__[1].__dataclass_fields__
    )
    assert ours == set(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_thoughts": -1}, "num_thoughts=-1"),
        ({"num_thoughts": 1.5}, "num_thoughts=1.5"),
        ({"thought_length": -1}, "thought_length=-1"),
        ({"num_ahead_tokens": 0}, "num_ahead_tokens=0"),
        ({"thought_fraction": 1.5}, "thought_fraction=1.5"),
        ({"thought_fraction": 0.0}, "set num_thoughts=0"),
        ({"base_loss_weight": -0.1}, "base_loss_weight=-0.1"),
        ({"reinforce_weight": -1.0}, "reinforce_weight=-1.0"),
        ({"meta_token_scale": 0.0}, "meta_token_scale=0.0"),
        ({"reinforce_baseline": "median"}, "reinforce_baseline='median'"),
        ({"thought_temperature": 0.0}, "thought_temperature=0.0"),
        ({"num_thoughts": 1}, "Set reinforce_baseline='base', or num_thoughts=2"),
        ({"num_thoughts": 1, "reinforce_baseline": "leave_one_out"}, "num_thoughts=1 with"),
        ({"thought_length": 0}, "set num_thoughts=1"),
        ({"packing": True}, "a thought would see its neighbours"),
        ({"eval_packing": True}, "a thought would see its neighbours"),
        ({"padding_free": True, "max_length": None}, "a thought would see its neighbours"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"router_aux_loss_coef": 0.01}, "router_aux_loss_coef=0.01"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
        (
            {"num_thoughts": 1, "reinforce_weight": 0.0, "reinforce_baseline": "leave_one_out"},
            "there is no other thought",
        ),
    ],
)
def test_values_that_cannot_work_are_named(changes, message) -> None:
    """QS-23, and QS-17: packing is refused, with the reason."""
    with pytest.raises(ValueError, match=message):
        QuietSTaRConfig(**BASE, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_thoughts": 0, "packing": True},
        {"num_thoughts": 1, "reinforce_baseline": "base"},
        {"num_thoughts": 1, "reinforce_weight": 0.0},
        {"num_thoughts": 1, "thought_length": 0},
    ],
)
def test_values_that_can_work_are_not_refused(changes) -> None:
    QuietSTaRConfig(**BASE, **changes)


def test_the_papers_recipe() -> None:
    config = QuietSTaRConfig.from_paper(**BASE, max_steps=7)
    assert (config.thought_length, config.num_ahead_tokens, config.num_thoughts) == (9, 4, 2)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8
    assert (config.max_length, config.learning_rate, config.max_steps) == (256, 1e-6, 7)
    assert config.reinforce_weight * config.thought_length == pytest.approx(1e6)
    shorter = QuietSTaRConfig.from_paper(**BASE, thought_length=5)
    assert shorter.reinforce_weight == pytest.approx(2e5)
    assert QuietSTaRConfig.from_paper(**BASE, reinforce_weight=3.0).reinforce_weight == 3.0
