"""The verifiers on labelled answers.

`corpus/frozen.jsonl` and `corpus/second.jsonl` were written by people who hadn't seen the code, and don't
change.
`answer_forms.py` has the forms that the verifiers were written for.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from answer_forms import CHOICE_FORMS, OPTIONS, all_rows, choice_rows

from trl_selfplay.rewards import choice_reward, exact_reward, math_reward
from trl_selfplay.rewards.worker import close_workers

CORPUS = Path(__file__).parent / "corpus"
SHA_256 = {
    "frozen": "2c4ead630fb5938d7bfb96e8d040e04a3c072655ae5bce017b096eebb0d42b63",
    "second": "d1a5f71e6bd24d367416b66c20ddb869a790b195c2d6af8c27ef6bb1d5d48bcb",
}
# False 1.0s and right answers found, by corpus, reward function and kind.
MEASURED = {
    ("frozen", "exact_reward", "number"): (0, 253),
    ("frozen", "exact_reward", "text"): (0, 106),
    ("frozen", "choice_reward", "choice"): (0, 371),
    ("frozen", "math_reward", "number"): (0, 250),
    ("frozen", "math_reward", "maths"): (0, 250),
    ("second", "exact_reward", "number"): (0, 123),
    ("second", "exact_reward", "text"): (0, 48),
    ("second", "choice_reward", "choice"): (0, 151),
    ("second", "math_reward", "number"): (0, 119),
    ("second", "math_reward", "maths"): (0, 114),
}


@pytest.fixture(scope="module", params=["frozen", "second"])
def corpus(request):
    """Return the name and the rows of a corpus."""
    path = CORPUS / f"{request.param}.jsonl"
    return request.param, list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module", autouse=True)
def _end_the_workers():
    yield
    close_workers()


def grade(reward, rows):
    return reward(
        completions=[row["completion"] for row in rows],
        solution=[row["solution"] for row in rows],
        choices=[row["choices"] for row in rows],
    )


def count(reward, rows):
    """Return the numbers of false 1.0s and of right answers that got 1.0."""
    passed = Counter(
        row["verdict"] for row, score in zip(rows, grade(reward, rows), strict=True) if score == 1.0
    )
    return passed[0], passed[1]


@pytest.mark.parametrize("name", SHA_256)
def test_the_rows_have_not_changed(name) -> None:
    assert hashlib.sha256((CORPUS / f"{name}.jsonl").read_bytes()).hexdigest() == SHA_256[name]


@pytest.mark.parametrize("kind", ["number", "text"])
def test_exact_answers_of_the_corpora(corpus, kind) -> None:
    name, rows = corpus
    rows = [row for row in rows if row["kind"] == kind]
    assert count(exact_reward, rows) == MEASURED[name, "exact_reward", kind]


def test_choices_of_the_corpora(corpus) -> None:
    name, rows = corpus
    rows = [row for row in rows if row["kind"] == "choice"]
    assert count(choice_reward, rows) == MEASURED[name, "choice_reward", "choice"]


def test_mathematics_of_the_corpora(corpus) -> None:
    """At least as many as measured: what the grader of mathematics reads may grow."""
    pytest.importorskip("math_verify")
    name, rows = corpus
    rows = [row for row in rows if row["kind"] in ("number", "maths")]
    scores = grade(math_reward, rows)
    for kind in ("number", "maths"):
        pairs = [(row, s) for row, s in zip(rows, scores, strict=True) if row["kind"] == kind]
        false_ones, least = MEASURED[name, "math_reward", kind]
        assert sum(s == 1.0 and not row["verdict"] for row, s in pairs) == false_ones
        assert sum(s == 1.0 and row["verdict"] for row, s in pairs) >= least


def test_every_form_has_its_verdict() -> None:
    for reward, kinds in ((exact_reward, ("number", "text")), (choice_reward, ("choice",))):
        rows = [row for row in all_rows() if row["kind"] in kinds]
        scores = grade(reward, rows)
        wrong = [r for r, s in zip(rows, scores, strict=True) if s != r["verdict"]]
        assert wrong == []


def test_every_form_of_mathematics_has_its_verdict() -> None:
    pytest.importorskip("math_verify")
    rows = [row for row in all_rows() if row["kind"] == "maths"]
    scores = grade(math_reward, rows)
    assert [r for r, s in zip(rows, scores, strict=True) if s != r["verdict"]] == []


def test_no_verdict_depends_on_the_letter_that_is_right() -> None:
    """Every form has one verdict for all ten letters, A and I among them."""
    rows = choice_rows()
    scores = grade(choice_reward, rows)
    forms = [scores[i : i + len(OPTIONS)] for i in range(0, len(scores), len(OPTIONS))]
    assert [set(form) for form in forms] == [{float(verdict)} for _, _, verdict in CHOICE_FORMS]


def test_swapped_letters_swap_verdicts() -> None:
    """If B answers what A did, and the solutions are swapped too, nothing changes."""
    swap = str.maketrans("ABab", "BAba")
    for _, form, _ in CHOICE_FORMS:
        if "@T" in form or "@U" in form:
            continue
        text = form.replace("@G", "A").replace("@W", "B").replace("@g", "a")
        swapped = form.replace("@G", "B").replace("@W", "A").replace("@g", "b")
        first = choice_reward([text] * 3, ["A", "B", "C"])
        assert choice_reward([swapped] * 3, [s.translate(swap) for s in "ABC"]) == first, form
