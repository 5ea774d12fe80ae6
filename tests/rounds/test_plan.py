"""What the config plans for each round, before the first one begins."""

import math
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from trl_selfplay import ReSTEMConfig, SPINConfig, STaRConfig
from trl_selfplay.rounds.plan import OnResume, PerRound, declared_rules

CPU = {"use_cpu": True, "bf16": False, "report_to": []}


def test_rounds_differ_in_their_values_of_the_lists() -> None:
    config = SPINConfig(
        "a", num_rounds=2, round_betas=[0.1, 0.5], round_temperatures=[1.0, 0.7], **CPU
    )
    first, second = config.plan_rounds()
    assert (first.round_index, first.sampling_round, first.settings) == (
        0, 0, {"beta": 0.1, "temperature": 1.0},
    )  # fmt: skip
    assert (second.round_index, second.sampling_round, second.settings) == (
        1, 1, {"beta": 0.5, "temperature": 0.7},
    )  # fmt: skip
    assert not first.details
    assert not first.may_be_skipped
    assert [plan.settings for plan in SPINConfig("a", num_rounds=3, **CPU).plan_rounds()] == [
        {}
    ] * 3


def test_improve_steps_are_rounds_that_share_the_samples_of_their_grow_step() -> None:
    config = ReSTEMConfig(
        "a", num_rounds=2, improve_thresholds=[-math.inf, 0.5, 0.8], start_from="previous",
        learning_rate=1e-2, round_learning_rates=[1e-2, 4e-2], improve_learning_rate_factor=0.5,
        round_max_steps=[3, 4], on_empty_round="stop", **CPU,
    )  # fmt: skip
    plans = config.plan_rounds()
    assert [plan.round_index for plan in plans] == [0, 1, 2, 3, 4, 5]
    assert [plan.sampling_round for plan in plans] == [0, 0, 0, 3, 3, 3]
    assert [plan.settings for plan in plans] == [
        {"learning_rate": rate, "max_steps": steps}
        for rate, steps in ((1e-2, 3), (5e-3, 3), (2.5e-3, 3), (4e-2, 4), (2e-2, 4), (1e-2, 4))
    ]
    assert [plan.details for plan in plans] == [
        {"grow": grow, "improve": improve, "threshold": threshold}
        for grow in (0, 1)
        for improve, threshold in enumerate((None, 0.5, 0.8))
    ]
    assert [plan.may_be_skipped for plan in plans] == [False, True, True] * 2
    assert len(ReSTEMConfig("a", num_rounds=2, **CPU).plan_rounds()) == 2


def test_temperatures_that_cannot_work_are_named() -> None:
    for changes, named in (
        ({"round_temperatures": [1.0]}, "round_temperatures has 1 values for num_rounds=2"),
        ({"round_temperatures": [1.0, -1.0]}, "each element a number of at least 1e-06, or 0"),
        (
            {"round_temperatures": [1.0, 0.0], "num_generations": 2},
            r"num_generations=2 with round_temperatures=\[1\.0, 0\.0\]: greedy",
        ),
        (
            {"round_temperatures": [1.0, 0.5], "generation_kwargs": {"temperature": 0.3}},
            r"generation_kwargs has temperature=0\.3 with round_temperatures=\[1\.0, 0\.5\]",
        ),
        (
            {"round_temperatures": [1.0, 0.5], "generation_kwargs": {"do_sample": False}},
            "do_sample=False with temperature=1.0, 0.5",
        ),
    ):
        with pytest.raises(ValueError, match=named):
            STaRConfig("a", num_rounds=2, **{**CPU, **changes})
    # `temperature` itself is then not read.
    STaRConfig("a", num_rounds=2, num_generations=2, round_temperatures=[1.0, 0.5], **CPU)


@dataclass
class CooledConfig(STaRConfig):
    """A method's config in a module with `from __future__ import annotations`."""

    coolness: "Annotated[float, OnResume.FREE]" = 1.0
    round_top_ps: "Annotated[list[float] | None, PerRound('top_p'), OnResume.FIXED]" = None
    temperature: float = field(default=0.5)


def test_annotations_that_are_text_are_read_too() -> None:
    config = CooledConfig("a", num_rounds=2, round_top_ps=[1.0, 0.5], **CPU)
    assert [plan.settings for plan in config.plan_rounds()] == [{"top_p": 1.0}, {"top_p": 0.5}]
    rules = declared_rules(CooledConfig)
    assert rules["coolness"] is OnResume.FREE
    assert rules["temperature"] is OnResume.FIXED  # as where it was declared first
