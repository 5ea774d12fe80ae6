"""Sections of the model card, from lines of rounds.jsonl."""

from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts
from trl_selfplay.rounds.card import _alarms, _dropped


def test_outcomes_are_counted_over_both_kinds_of_samples_and_add_up() -> None:
    funnel = Funnel(
        prompts=3, prompts_solved=1, unhinted=OutcomeCounts(kept=2, failed=3, truncated=1),
        hinted=OutcomeCounts(kept=1, leaked=4),
    )  # fmt: skip
    text = _dropped([{"round": 0, "funnel": funnel.to_dict()}])
    header, _, row = [line for line in text.splitlines() if line.startswith("|")]
    assert header == "| round | sampled | kept | truncated | failed | leaked |"
    assert row == "| 0 | 11 | 3 | 1 | 3 | 4 |"


def test_alarms_are_listed_by_round_and_a_run_that_nothing_watched_has_no_section() -> None:
    alarm = {"name": "sharpening", "text": "samples <b>|\nrepeat"}
    lines = [{"round": 0, "alarms": []}, {"round": 1, "alarms": [alarm]}]
    assert _alarms(lines).splitlines()[2:] == [r"- Round 1, sharpening: samples &lt;b&gt;\| repeat"]
    assert _alarms(lines[:1]).endswith("None.")
    assert _alarms([{"round": 0}]) == ""
