"""Sections of the model card, from lines of rounds.jsonl."""

from types import SimpleNamespace

import pytest

from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts
from trl_selfplay.rounds.card import _alarms, _dropped, name_base


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


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("/tmp/../tmp", "a model in a local folder, tmp"),
        (".", "a model in a local folder, work"),
        ("<b> here", "a model in a local folder, &lt;b&gt; here"),
        ("", "a model object without a name"),
    ],
)
def test_a_base_model_that_isnt_on_the_hub_is_named_without_the_path_to_it(
    source, named, tmp_path, monkeypatch
) -> None:
    folder = tmp_path / "work"
    (folder / "<b> here").mkdir(parents=True)
    monkeypatch.chdir(folder)
    model = SimpleNamespace(config=SimpleNamespace(name_or_path=source))
    trainer = SimpleNamespace(
        model=model, args=SimpleNamespace(output_dir="."), is_world_process_zero=lambda: True
    )
    card = folder / "README.md"
    card.write_text("A fine-tuned version of [None](https://huggingface.co/None).")
    name_base(trainer)
    assert card.read_text() == f"A fine-tuned version of {named}."
