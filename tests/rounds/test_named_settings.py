"""Errors of parents and libraries name the settings that they may come from."""

from dataclasses import dataclass, field

import pytest

from trl_selfplay.rounds.named_settings import naming_settings


@dataclass
class Config:
    rate: float = 0.1
    names: list[str] = field(default_factory=list)
    hub_token: str | None = None
    model_init_kwargs: dict[str, str] | None = None


def test_an_error_that_says_nothing_becomes_one_with_the_settings() -> None:
    with (
        pytest.raises(
            ValueError, match=r"KeyError: 'a'. At once. .* defaults: rate=0.5."
        ) as raised,
        naming_settings(Config(rate=0.5), "At once."),
    ):
        raise KeyError("a")
    assert isinstance(raised.value.__cause__, KeyError)


def test_an_error_with_a_message_keeps_its_type_and_gets_a_note() -> None:
    with pytest.raises(OSError, match="no room") as raised, naming_settings(Config(), "At once."):
        raise OSError("no room")
    assert raised.value.__notes__ == ["At once. Settings that differ from their defaults: none."]


def test_secrets_are_not_named() -> None:
    config = Config(hub_token="hf_1", model_init_kwargs={"token": "hf_2", "revision": "main"})
    with pytest.raises(ValueError, match="KeyError") as raised, naming_settings(config, ""):
        raise KeyError("a")
    assert "hf_" not in str(raised.value)
    assert "'revision': 'main'" in str(raised.value)
