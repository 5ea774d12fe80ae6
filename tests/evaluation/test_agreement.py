"""Agreement with labels against counts by hand, with bounds against scipy's."""

import json
import sys

import pytest
from chat_server import serving
from scipy.stats import binomtest

from trl_selfplay.evaluation.agreement import main, measure_agreement
from trl_selfplay.rewards import JudgeReward
from trl_selfplay.rewards.scores import Scores


def rows(*groups):
    """Return labelled rows: `(count, completion, label)` each."""
    return [
        {"prompt": f"p{i // 2}", "completion": completion, "label": label, "solution": "7"}
        for completion, label, i in (
            (completion, label, i) for count, completion, label in groups for i in range(count)
        )
    ]


def graded(completions, **kwargs):
    """Score "good" with 1.0 and "bad" with 0.4; abstain on the rest."""
    known = {"good": 1.0, "bad": 0.4}
    return Scores(
        [known.get(c) for c in completions],
        {i: "unknown" for i, c in enumerate(completions) if c not in known},
    )


TABLE = rows((30, "good", 1), (6, "good", 0), (20, "bad", 0), (4, "bad", True), (5, "?", 1))


def test_the_numbers_are_those_of_the_table() -> None:
    found = measure_agreement(graded, TABLE)
    for estimate, successes, count in (
        (found.accuracy, 50, 60), (found.precision, 30, 36), (found.recall, 30, 34),
        (found.abstained, 5, 65),
    ):  # fmt: skip
        bounds = binomtest(successes, count).proportion_ci(0.95, "wilson")
        assert (estimate.value, estimate.count) == (successes / count, count)
        assert (estimate.low, estimate.high) == pytest.approx((bounds.low, bounds.high))
    chance = (36 / 60) * (34 / 60) + (24 / 60) * (26 / 60)
    assert found.kappa.value == pytest.approx((50 / 60 - chance) / (1 - chance))
    assert found.kappa.low < found.kappa.value < found.kappa.high
    assert found.causes == {"unknown": 5}
    assert found.orders_disagree.count == 0
    text = str(found)
    assert "precision: 0.833 (0.681 to 0.921; 36)" in text
    assert "5 × unknown" in text


def test_the_threshold_decides_what_passes() -> None:
    found = measure_agreement(graded, TABLE, threshold=0.3)
    assert (found.accuracy.value, found.recall.value) == (34 / 60, 1.0)
    assert found.kappa.value == 0.0  # it passes everything
    assert measure_agreement(graded, TABLE, threshold=2.0).precision.value is None


def test_a_function_that_always_abstains_has_no_accuracy() -> None:
    found = measure_agreement(lambda completions, **kwargs: [None] * len(completions), TABLE)
    assert (found.accuracy.value, found.kappa.value, found.abstained.value) == (None, None, 1.0)
    assert "accuracy: – (no items)" in str(found)


def test_bias_of_position_is_that_of_the_judges_pairs() -> None:
    """A judge that always names the first response."""

    def first(question):
        tag = question.partition("Verdict ")[2][:6]
        return f"Verdict {tag}: A"

    with serving(first) as server:
        judge = JudgeReward("m", against="solution", base_url=server.url)
        table = [{**row, "completion": f"{i} {row['completion']}"} for i, row in enumerate(TABLE)]
        found = measure_agreement(judge, table, threshold=0.5)
    assert (found.orders_disagree.value, found.orders_disagree.count) == (1.0, 65)
    assert (found.prefers_first.value, found.prefers_first.count) == (1.0, 130)
    assert "prefers the first response: 1.000" in str(found)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE[:49], "49 labelled rows"),
        ([{k: v for k, v in row.items() if k != "label"} for row in TABLE], r"lacks \['label'\]"),
        ([{**row, "label": "yes"} for row in TABLE], "label 'yes'"),
        ([{**row, "label": 0.5} for row in TABLE], r"label 0\.5"),
        ([{**row, "label": 1} for row in TABLE], "all labels are 1"),
    ],
)
def test_rows_that_show_nothing_are_refused(table, message) -> None:
    with pytest.raises(ValueError, match=message):
        measure_agreement(graded, table)


def test_the_command_reads_json_lines(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "my_judges.py").write_text(
        "def judge(completions, **kwargs):\n    return [float(c == 'good') for c in completions]\n"
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, TABLE)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["my_judges.judge", "rows.jsonl", "--threshold", "0.5"])
    assert "precision: 0.833" in capsys.readouterr().out
    sys.modules.pop("my_judges")
