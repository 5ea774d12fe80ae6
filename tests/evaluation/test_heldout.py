"""The names of held-out metrics."""

from trl_selfplay.evaluation.heldout import metric_prefixes


def test_prefixes_are_trl_s() -> None:
    assert metric_prefixes([""], "eval") == {"": "eval"}
    assert metric_prefixes(["a", "b"], "test") == {"a": "test_a", "b": "test_b"}
