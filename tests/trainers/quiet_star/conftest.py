"""Models that can think, and a text to think about."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import VOCAB, build_family, wake_head

from trl_selfplay.trainers.quiet_star.mixing import attach_thought_module


@pytest.fixture
def family_model() -> Callable[..., Any]:
    """Build a model that can think: `family_model(family, awake=True)`."""

    def build(family: str = "llama", seed: int = 0, awake: bool = True, **changes: Any) -> Any:
        model = build_family(family, seed, **changes)
        attach_thought_module(model, None, scale=100.0, seed=seed)
        if awake:
            wake_head(model)
        return model

    return build


@pytest.fixture
def text() -> SimpleNamespace:
    """Two rows of 12 random tokens, without padding."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB, (2, 12), generator=generator)
    return SimpleNamespace(ids=ids, mask=torch.ones_like(ids), generator=generator)
