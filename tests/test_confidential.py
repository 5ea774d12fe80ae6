"""Settings without secrets, of any depth and in text."""

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_selfplay.confidential import MASK, is_secret_name, masked, shown, without_secrets

SECRET = "Canary-7f3"
SECRET_NAMES = [
    "token", "hub_token", "api_key", "apiKey", "OPENAI_API_KEY", "aws_secret_access_key", "password",
    "passwd", "secret", "sas_token", "account_key", "connection_string", "credentials", "Authorization",
    "use_auth_token", "private-key",
]  # fmt: skip
OTHER_NAMES = [
    "eos_token", "pad_token", "max_new_tokens", "skip_special_tokens", "monkey", "author", "bypass",
    "keyboard", "tokenizer", "num_virtual_tokens", "revision",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_setting_is_secret_by_its_name(name) -> None:
    assert is_secret_name(name)
    assert masked({"a": [{name: SECRET}]}) == {"a": [{name: MASK}]}
    assert without_secrets({"a": ({name: SECRET, "b": 1},)}) == {"a": ({"b": 1},)}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_setting_with_another_name_stays(name) -> None:
    assert not is_secret_name(name)
    assert masked({name: "text"}) == without_secrets({name: "text"}) == {name: "text"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"http://me:{SECRET}@host:8000/v1", f"http://{MASK}@host:8000/v1"),
        (f"http://me:p@{SECRET}@host/a@b", f"http://{MASK}@host/a@b"),
        (f"https://host/v1?api_key={SECRET}&n=2", f"https://host/v1?api_key={MASK}&n=2"),
        (f'{{"token": "{SECRET}", "n": ', f'{{"token": "{MASK}", "n": '),
        (f"token: {SECRET}", f"token: {MASK}"),
        (f"a: 1\nhub_token: {SECRET}", f"a: 1\nhub_token: {MASK}"),
        (f"Authorization: Bearer {SECRET}", f"Authorization: Bearer {MASK}"),
        ("see hf_" + "aB3" * 11, f"see {MASK}"),
        ("sk-" + "a1_" * 8, MASK),
        ("the token: a word, and the key is 3", "the token: a word, and the key is 3"),
        ("eos_token='<|im_end|>'", "eos_token='<|im_end|>'"),
        ("https://host/a@b", "https://host/a@b"),
        ("hf_hub", "hf_hub"),
    ],
)
def test_secrets_in_text_are_masked_once(text, expected) -> None:
    assert masked(text) == expected
    assert masked(expected) == expected


def test_what_cannot_be_a_secret_stays() -> None:
    settings = {"token": True, "key": 3, "password": None, "secret": "", "of": [1.5, b"x"]}
    assert masked(settings) == without_secrets(settings) == settings


def test_a_message_shows_a_setting_without_its_secrets() -> None:
    assert shown({"token": SECRET, "n": 1}) == f"{{'token': '{MASK}', 'n': 1}}"
    assert shown(SECRET, "hub_token") == repr(MASK)
    assert SECRET not in shown(type("Of", (), {"__repr__": lambda _: f"Of(token='{SECRET}')"})())
    assert shown("x" * 300) == "'" + "x" * 199 + "…"


nested = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(OTHER_NAMES), inner, max_size=3),
        st.tuples(st.sampled_from(SECRET_NAMES)).map(lambda name: {name[0]: SECRET}),
        inner.map(lambda value: {"password": [SECRET, value]}),
    ),
    max_leaves=8,
)


@hypothesis.settings(max_examples=30)
@given(nested)
def test_no_secret_is_left_at_any_depth(value) -> None:
    assert SECRET not in repr(masked(value))
    assert SECRET not in repr(without_secrets(value))
    assert SECRET not in shown(value, most=100_000)
