"""Settings without secrets: tokens, keys, passwords.

In: what a user configured, by name. Out: the same to be written, logged or shown in an error. A secret is
told by the name of its setting, at any depth; in text also by what it looks like, as the user and
password of an address do.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

# In the place of a secret.
MASK = "(not shown)"

# The end of a setting's name. A tokenizer's special tokens are no secrets.
_NAME = (
    r"(?:(?<!\beos[_-])(?<!\bbos[_-])(?<!\bpad[_-])(?<!\bunk[_-])token|api_?keys?|key|secret"
    r"|pass(?:word|wd|phrase)?|pwd|credentials?|auth(?:orization)?|cookie|connection_string)"
)
_SECRET = re.compile(rf"(?:^|[_.\- ]|(?-i:(?<=[a-z])(?=[A-Z]))){_NAME}$", re.IGNORECASE)
_IN_TEXT = re.compile(
    # user:password@ of an address
    r"(?<=://)[^/\s\"']+(?=@)"
    # token=…, "api_key": "…", a line `token: …`, Bearer …
    rf"|(?:(?<![^\W_]){_NAME}(?:\s*=|[\"']\s*:)|(?:\A|[{{,\n]\s*)(?:\w+[_-])?{_NAME}\s*:|\bbearer\b)"
    r"\s*[\"']?(?:bearer\s+|basic\s+)?(?!None|True|False|null|bearer\b|basic\b|\(not)(?P<value>[^\s\"'&,;})\]]+)"
    # tokens of the Hub, of OpenAI, GitHub, AWS, Slack and Google
    r"|\b(?:hf_[a-z0-9]{16,}|sk-[\w-]{16,}|gh[opsru]_\w{16,}|github_pat_\w{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,})",
    re.IGNORECASE,
)


class HidesSecrets:
    """Leaves secrets out of what a config tells about itself: its dict, JSON, text and pickle.

    It stands before TRL's config in the bases. Experiment trackers read the dict, logs the text; `repr`,
    which a notebook shows, would otherwise be a dataclass's, with all values. The parent pickles the whole
    config as `training_args.bin`, and pushes that file. Copies in memory have the secrets.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = HidesSecrets.__str__  # type: ignore[assignment,method-assign]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as the parent does, with `MASK` in the place of secrets."""
        return masked(super().to_dict())  # type: ignore[misc]

    def __str__(self) -> str:
        config: Any = self
        given = {each.name: getattr(self, each.name) for each in fields(config)}
        lines = [
            f"{name}={shown(value, name, most=10_000)},\n" for name, value in sorted(given.items())
        ]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self)
        return {name: None for name in state if is_secret_name(name)} | without_secrets(state)

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


def is_secret_name(name: str) -> bool:
    """Return whether a setting of this name holds a secret.

    >>> is_secret_name("hub_token"), is_secret_name("eos_token"), is_secret_name("max_tokens")
    (True, False, False)
    """
    return _SECRET.search(name) is not None


def masked(value: Any, name: str = "") -> Any:
    """Return a setting with `MASK` in the place of each secret, in dicts, lists and text.

    >>> masked({"token": "hf_x", "revision": "main", "url": "http://me:pw@host"})
    {'token': '(not shown)', 'revision': 'main', 'url': 'http://(not shown)@host'}
    """
    if is_secret_name(name) and _can_be_secret(value):
        return MASK
    if isinstance(value, Mapping):
        return {key: masked(inner, str(key)) for key, inner in value.items()}
    return _within(value, masked)


def without_secrets(value: Any) -> Any:
    """Return a setting as `masked` does, but for dicts, which lose the entries that are secret.

    A library that reads them then takes its own default, such as the token of `hf auth login`.
    """
    if isinstance(value, Mapping):
        return {
            key: without_secrets(inner)
            for key, inner in value.items()
            if not (is_secret_name(str(key)) and _can_be_secret(inner))
        }
    return _within(value, without_secrets)


def shown(value: Any, name: str = "", most: int = 200) -> str:
    """Return a setting for a message: its `repr` without secrets, cut to a length."""
    text = _mask_text(repr(masked(value, name)))
    return text if len(text) <= most else text[:most] + "…"


def _within(value: Any, change: Any) -> Any:
    if type(value) in (list, tuple, set):
        return type(value)(change(inner) for inner in value)
    return _mask_text(value) if isinstance(value, str) else value


def _mask_text(text: str) -> str:
    def hide(found: re.Match[str]) -> str:
        secret = found["value"] or found[0]
        return found[0].removesuffix(secret) + MASK

    return _IN_TEXT.sub(hide, text)


def _can_be_secret(value: Any) -> bool:
    """Return whether a value may be a secret: `token=True` and an id aren't."""
    return value is not None and not isinstance(value, bool | int | float) and value != ""
