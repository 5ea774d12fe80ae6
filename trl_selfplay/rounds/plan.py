"""Per-round values of a config's fields, and when fields may change on resume.

In: a config with annotations such as `Annotated[int, OnResume.FIXED]` (not field metadata, because the
command-line parser passes metadata on to argparse, which rejects unknown names). Out: a rule per field,
and a plan per round, known before the first one begins. A method whose rounds differ in other ways, such
as ReST's Improve steps, makes its own plan.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class OnResume(StrEnum):
    """When a field may have another value in a run that is resumed."""

    FREE = "free"
    """Always: it says how often, how verbosely, where or how fast, but not what is computed."""
    WARNED = "warned"
    """Always, with a warning once a round has been trained on: later rounds then lead to another
    result."""
    UNTIL_TRAINED = "until_trained"
    """Until a round has been trained on: only selection and training read it, so the samples on
    disk stay valid. In a list with one value per round, each value: until its round is finished."""
    MAY_GROW = "may_grow"
    """Always, to a larger value: rounds are added at the end."""
    ENGINE = "engine"
    """With `allow_engine_change=True`: samples before and after come from different engines."""
    FIXED = "fixed"
    """Never: samples depend on it. In a list with one value per round, each value: until its round
    samples."""


@dataclass(frozen=True, slots=True)
class PerRound:
    """Marks a list with one value per round.

    Attributes:
        replaces: The field whose value is replaced in each round.
    """

    replaces: str


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """One round of a run.

    Attributes:
        round_index: Index in the run, from 0.
        sampling_round: The round whose samples it trains on: itself, or an earlier one.
        settings: Fields of the config that have another value while this round is played and
            trained on.
        details: What rounds.jsonl records of the round besides its results.
        may_be_skipped: If the round keeps nothing, it leaves the weights as they are and the next
            one begins.
    """

    round_index: int
    sampling_round: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    may_be_skipped: bool = False


def declared_rules(config_class: type) -> dict[str, OnResume]:
    """Return when each field may change on resume, for fields whose annotation says so."""
    return {name: mark for name, mark in _marks(config_class) if isinstance(mark, OnResume)}


def per_round_lists(config_class: type) -> dict[str, str]:
    """Return the fields that hold one value per round, and the field that each replaces."""
    return {n: mark.replaces for n, mark in _marks(config_class) if isinstance(mark, PerRound)}


def _marks(config_class: type) -> Iterator[tuple[str, Any]]:
    """Yield (field, mark) of all annotations; a field that a subclass redeclares keeps its marks."""
    for base in reversed(config_class.__mro__):
        annotations = inspect.get_annotations(base)
        # Text under `from __future__ import annotations`; the parents' isn't always importable.
        if any(isinstance(text, str) and "Annotated[" in text for text in annotations.values()):
            annotations = inspect.get_annotations(base, eval_str=True)
        for name, annotation in annotations.items():
            for mark in getattr(annotation, "__metadata__", ()):
                yield name, mark


def plan_equal_rounds(config: Any) -> tuple[RoundPlan, ...]:
    """Return one plan per round that samples for itself, with its values of the lists.

    Args:
        config: With `num_rounds`, and lists that are None or hold a value for each round.
    """
    lists = {
        replaced: values
        for name, replaced in per_round_lists(type(config)).items()
        if (values := getattr(config, name)) is not None
    }
    return tuple(
        RoundPlan(index, index, {name: values[index] for name, values in lists.items()})
        for index in range(config.num_rounds)
    )
