import pytest

from trl_selfplay.rewards.calibration import Calibration
from trl_selfplay.rewards.scoring import Scorer


class Calibrated:
    calibrate = True

    def __call__(self, completions, **kwargs):
        return [float(c) if c else None for c in completions]


def length(completions, **kwargs):
    return [float(len(c)) for c in completions]


def test_equal_scores_count_half_and_the_mean_of_the_compared_ones_is_a_half() -> None:
    scores = [3.0, 1.0, 1.0, 1.0, 2.0]
    calibration = Calibration({"f": Calibrated()})
    calibration.compare_with({"f": scores})
    found = [calibration.apply("f", score) for score in (-9.0, 1.0, 2.5, 9.0)]
    assert found == pytest.approx([0.0, 0.3, 0.8, 1.0])
    assert sum(calibration.apply("f", score) for score in scores) / 5 == pytest.approx(0.5)


def test_a_calibrated_function_counts_by_percentile_beside_others() -> None:
    scorer = Scorer([Calibrated(), length], reward_weights=[2.0, 1.0])
    assert scorer.calibration.names == ("Calibrated",)
    rewards = scorer.score(["?"] * 4, ["10", "20", "30", ""], [[]] * 4, {})
    assert [scorer.weighted(r) for r in rewards] == [22.0, 42.0, 62.0, 0.0]
    first = scorer.calibration.scores_of(rewards)
    assert first == {"Calibrated": [10.0, 20.0, 30.0, None]}
    scorer.calibration.compare_with(first)
    expected = [2 / 6 + 2.0, 1.0 + 2.0, 10 / 6 + 2.0, 0.0]
    assert [scorer.weighted(r) for r in rewards] == pytest.approx(expected)


def test_nothing_but_abstentions_is_no_calibration() -> None:
    scorer = Scorer(Calibrated())
    with pytest.raises(ValueError, match="Calibrated can't be calibrated by round 0"):
        scorer.calibration.compare_with({"Calibrated": [None, None]})
