"""A phase's progress counts tokens: the bar moves at once, and the forecast is near the truth."""

import logging
import random

import pytest

from trl_selfplay.evaluation.progress import SamplingProgress, forecast, format_duration


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def forecasts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "trl_selfplay.evaluation.progress"]


def decode(
    progress: SamplingProgress, clock: Clock, lengths: list[int], batch_size: int, step_s: float
) -> list[tuple[float, float]]:
    """Decode completions of these lengths, batch after batch; return (time, share shown) per step."""
    shown = []
    for first in range(0, len(lengths), batch_size):
        batch = lengths[first : first + batch_size]
        for step in range(1, max(batch) + 1):
            clock.now += step_s
            progress.decode(sum(length >= step for length in batch))
            if ended := [length for length in batch if length == step]:
                progress.update(len(ended), sum(ended))
            shown.append((clock.now, progress.share))
    return shown


def test_a_process_that_gets_more_than_its_share_counts_all_that_it_samples() -> None:
    with SamplingProgress(25 / 2, "round 0", 50, disable=True) as progress:
        progress.expect(16 - 25 / 2)
        progress.update(8, 400)
        assert (progress.total, progress.share) == (16, 0.5)


def test_the_forecast_is_near_the_truth_though_few_samples_are_finished_after_a_minute(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counting finished samples alone, 256 completions of some minutes were said to take 5 hours."""
    rng = random.Random(0)
    lengths = [min(rng.randint(12, 60), 36) for _ in range(256)]
    lengths[0] = 3  # the only one that is finished after a minute
    clock = Clock()
    with (
        caplog.at_level(logging.WARNING),
        SamplingProgress(256, "round 0", max_completion_length=36, clock=clock) as progress,
    ):
        shown = decode(progress, clock, lengths, batch_size=64, step_s=6.0)
        at_a_minute = next(share for second, share in shown if second >= 60.0)
    took = clock.now
    assert 15 * took < 256 / 1 * 60.0  # what counting finished samples gives after a minute
    [text] = forecasts(caplog)
    assert text.startswith("round 0: 256 completions, about ")
    assert took / 1.5 < 60 * int(text.split("about ")[1].split(" min")[0]) < took * 1.5
    assert 0.05 < at_a_minute < 60.0 / took
    assert shown[-1][1] == 1.0
    assert [share for _, share in shown] == sorted(share for _, share in shown)


def test_the_bar_moves_while_the_first_samples_are_decoded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a bar is cut at the width that tqdm finds
    monkeypatch.setenv("LINES", "50")
    clock = Clock()
    with SamplingProgress(8, "round 0", 50, clock=clock) as progress:
        clock.now = 2.0
        progress.decode(100)
        assert SamplingProgress.current is progress
        with SamplingProgress(8, "judging", 50, disable=True):
            assert SamplingProgress.current is not progress
        assert SamplingProgress.current is progress
        assert progress.share == 100 / (8 * 50)
    assert SamplingProgress.current is None
    shown = capsys.readouterr().err
    assert " 25%|" in shown
    assert "0/8 samples, 50 tokens/s" in shown


def test_the_forecast_comes_once_after_a_minute(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    with (
        caplog.at_level(logging.WARNING),
        SamplingProgress(240_000, "round 0", 4096, clock=clock) as progress,
    ):
        for second in (10.0, 59.9, 60.0, 120.0):
            clock.now = second
            progress.decode(1500)
            assert len(forecasts(caplog)) == (second > 60.0)
            progress.update(43, 1000)
            assert len(forecasts(caplog)) == (second >= 60.0)
    # 129 samples in 60 s
    assert forecasts(caplog) == [
        "round 0: 240,000 completions, about 31 h; see `num_prompts_per_round`, `num_generations`"
    ]


def test_after_five_minutes_without_a_finished_sample_there_is_an_upper_bound(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    with SamplingProgress(100, "round 0", 1000, clock=clock) as progress:
        for second in (60.0, 299.0, 300.0):
            assert forecasts(caplog) == []
            clock.now = second
            progress.decode(5_000)
    # 15,000 of at most 100,000 tokens in 300 s
    assert forecasts(caplog) == [
        "round 0: 100 completions, at most 33 min; see `num_prompts_per_round`, `num_generations`"
    ]


def test_samples_read_back_from_disk_do_not_shorten_the_forecast(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    with SamplingProgress(
        1000, "held-out", 100, settings=["num_generations_eval"], clock=clock
    ) as p:
        p.update(900, 90_000, restored=True)
        clock.now = 60.0
        p.update(10, 600)
        assert p._bar.n == 910
        assert p._bar.postfix == "910/1,000 samples, 10 tokens/s"
    assert forecasts(caplog) == [
        "held-out: 100 completions, about 10 min; see `num_generations_eval`"
    ]


def test_a_phase_that_ends_within_a_minute_gets_no_forecast(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    with SamplingProgress(10, "round 0", 100, clock=clock) as progress:
        clock.now = 61.0
        progress.update(10, 100)
    assert forecasts(caplog) == []


def test_the_bar_shows_speed_and_share_solved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")
    clock = Clock()
    with SamplingProgress(8, "round 3", 5000, clock=clock) as progress:
        clock.now = 2.0
        progress.update(4, 5000)
        progress.set_solved(0.25)
        progress.set_abstained(1_200, "no answer within the deadline")
        progress.update(4, 3000)
    shown = capsys.readouterr().err
    assert "round 3: 100%" in shown
    assert (
        "8/8 samples, 4,000 tokens/s, 25% solved, 1,200 abstained (no answer within the deadline)"
        in shown
    )


def test_a_disabled_progress_says_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    with SamplingProgress(100, "round 0", 100, disable=True, clock=clock) as progress:
        clock.now = 100.0
        progress.update(1, 10)
        progress.set_solved(0.5)
    assert forecasts(caplog) == []
    assert capsys.readouterr().err == ""


def test_a_forecast_is_the_rule_of_three() -> None:
    assert forecast(done=50, total=200, seconds=60.0) == 240.0
    with pytest.raises(ValueError, match="done"):
        forecast(0, 200, 60.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (600, "10 min"), (5_990, "100 min"), (7_200, "2 h"),
     (111_600, "31 h"), (864_000, "10 days")],
)  # fmt: skip
def test_durations_are_in_the_unit_that_people_use(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
