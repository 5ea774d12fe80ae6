"""What can't work over rounds is refused at construction, with the remedy; the docs list all of it."""

import re
from pathlib import Path

import pytest
from refusals import REFUSALS, as_table

DOCS = Path(__file__).parent.parent.parent / "docs" / "drop_in.md"


@pytest.mark.parametrize(
    "refusal", REFUSALS, ids=lambda r: re.sub(r"\W+", "_", r.feature).strip("_")
)
def test_what_is_not_taken_is_refused_with_the_remedy(build, parts, refusal) -> None:
    changes = refusal.changes(parts) if callable(refusal.changes) else refusal.changes
    for method in refusal.methods:
        with pytest.raises((ValueError, TypeError), match=refusal.message):
            build(method, **changes)


@pytest.mark.parametrize("name", ["predict", "hyperparameter_search"])
def test_what_rounds_have_no_use_for_is_refused_when_it_is_called(build, parts, name) -> None:
    for method in ("STaR", "SPIN"):
        with pytest.raises(NotImplementedError, match=r"evaluate|another output_dir"):
            getattr(build(method), name)(parts.rows)
    assert f"`{name}`" in DOCS.read_text()


def test_the_docs_list_what_is_refused() -> None:
    """To bring them up to date: print(as_table())."""
    assert as_table() in DOCS.read_text()
