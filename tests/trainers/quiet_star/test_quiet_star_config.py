import pytest
import torch
from transformers import get_scheduler
from trl import SFTConfig

from trl_selfplay import QuietSTaRConfig

BASE = {"output_dir": "unused", "use_cpu": True, "bf16": False}


def test_the_defaults_are_those_of_the_method() -> None:
    config = QuietSTaRConfig(**BASE)
    names = ("num_thoughts", "thought_length", "num_ahead_tokens", "thought_temperature",
             "thought_fraction", "base_loss_weight", "reinforce_weight", "reinforce_baseline",
             "meta_token_scale")  # fmt: skip
    values = [getattr(config, name) for name in names]
    assert values == [2, 8, 4, 1.0, 1.0, 0.5, 1.0, "mean", 100.0]
    ours = set(QuietSTaRConfig.__dataclass_fields__) - set(SFTConfig.__dataclass_fields__)
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
        ({"thought_temperature": 1e-40}, "thought_temperature=1e-40.*of at least 1e-06, or 0"),
        ({"num_thoughts": 1}, "Set reinforce_baseline='base', or num_thoughts=2"),
        ({"num_thoughts": 1, "reinforce_baseline": "leave_one_out"}, "num_thoughts=1 with"),
        ({"thought_length": 0}, "Set num_thoughts=1"),
        ({"packing": True}, "a thought would see other texts"),
        ({"eval_packing": True}, "a thought would see other texts"),
        ({"padding_free": True, "max_length": None}, "a thought would see other texts"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True permanently rounds"),
        ({"router_aux_loss_coef": 0.01}, "router_aux_loss_coef=0.01"),
        ({"torch_compile": True}, "torch_compile=True compiles"),
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
    assert config.reinforce_weight * config.thought_length == pytest.approx(1e6 / 3)
    shorter = QuietSTaRConfig.from_paper(**BASE, thought_length=5)
    assert shorter.reinforce_weight == pytest.approx(2e5 / 3)
    assert QuietSTaRConfig.from_paper(**BASE, reinforce_weight=3.0).reinforce_weight == 3.0


def test_the_papers_learning_rate_is_that_of_its_hundred_thousand_steps() -> None:
    """In every one of the 100 that are run, to a thousandth."""
    config = QuietSTaRConfig.from_paper(**BASE)
    rates = []
    for kind, steps in (("linear", 100_000), (config.lr_scheduler_type, config.max_steps)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.learning_rate)
        schedule = get_scheduler(kind, optimizer, int(config.warmup_steps), steps)
        rates.append([])
        for _ in range(100):
            rates[-1].append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    assert rates[1] == pytest.approx(rates[0], rel=1e-3)


def test_the_papers_weight_gives_reinforce_the_size_of_its_code() -> None:
    """Gradients of a thought's log-prob by its logits: mean at temperature 3, sum at 1."""
    config = QuietSTaRConfig.from_paper(**BASE)
    logits = torch.zeros(config.thought_length, 50, requires_grad=True)

    def gradient(weight, temperature, reduce):
        log_probs = (logits / temperature).log_softmax(-1)[:, 7]
        return torch.autograd.grad(weight * reduce(log_probs), logits)[0]

    theirs = gradient(1e6, 3.0, torch.mean)
    ours = gradient(config.reinforce_weight, config.thought_temperature, torch.sum)
    torch.testing.assert_close(ours, theirs)
