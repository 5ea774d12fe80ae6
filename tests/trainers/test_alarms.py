"""Alarms in real runs of a tiny model: what is recorded, logged and done. Invariants CD-9 and CD-10."""

import json
import logging

import pytest

from trl_selfplay import STaRConfig
from trl_selfplay.evaluation.detectors import DETECTOR_OF
from trl_selfplay.rollouts.stored import load_samples


def anything(completions, **kwargs):
    """Accept every completion."""
    return [1.0] * len(completions)


def nothing(completions, **kwargs):
    """Reject every completion, as a second verifier."""
    return [0.0] * len(completions)


@pytest.fixture
def build_watched(build_star, sums):
    """Return a function that builds a trainer whose samples pass and whose held-out ones fail."""

    def build(folder="run", **changes):
        settings = {
            "num_rounds": 3,
            "max_steps": 1,
            "rationalize": False,
            "reward_funcs": anything,
            "eval_reward_funcs": nothing,
            "eval_dataset": sums(8, 20),
            "temperature": 1.0,
            "max_completion_length": 12,
        }
        return build_star(folder, **{**settings, **changes})

    return build


def names_of(line):
    return {alarm["name"] for alarm in line["alarms"]}


def warned(caplog, name):
    return [r.message for r in caplog.records if f"#alarm-{name}" in r.message]


def test_each_round_records_what_its_detectors_measured(build_watched, caplog) -> None:
    trainer = build_watched(num_rounds=2, warmup_steps=4)
    trainer.train()
    first, second = trainer.run.lines
    assert first["detectors"]["false-positives"] == 1.0
    assert first["detectors"]["starvation"] == pytest.approx(0.75)
    assert {"starvation", "false-positives"} <= names_of(first)
    assert not {"distinct-ratio", "token-entropy", "duplicates-of-history"} & set(
        first["detectors"]
    )
    assert {"distinct-ratio", "token-entropy", "length-drift", "coverage",
            "duplicates-of-history", "held-out-fall"} - set(second["detectors"]) <= {"coverage"}  # fmt: skip
    (alarm,) = [a for a in first["alarms"] if a["name"] == "starvation"]
    assert alarm["action"] == "warn"
    assert alarm["text"] in warned(caplog, "starvation")
    assert len(warned(caplog, "starvation")) == 2  # once a round
    entropy = first["metrics"]["play/token_entropy"]
    samples = [r for r in load_samples(trainer.run.folder(0)) if not r.hinted]
    assert entropy == pytest.approx(
        -sum(r.logprob for r in samples) / sum(len(r.completion_ids) for r in samples)
    )


def test_an_alarm_that_stops_ends_the_run_until_its_action_is_another(
    build_watched, caplog
) -> None:
    trainer = build_watched(alarm_actions={"false-positives": "stop"})
    trainer.train()
    assert len(trainer.run.lines) == 1
    assert trainer.run.lines[0]["alarms"][-1]["action"] == "stop"
    stops = "stopping: alarm 'false-positives' of round 0, by alarm_actions"
    assert any(stops in r.message for r in caplog.records)
    again = build_watched(alarm_actions={"false-positives": "stop"})
    again.train(resume_from_checkpoint=True)
    assert len(again.run.lines) == 1
    further = build_watched(alarm_actions={"false-positives": "ignore"})
    further.train(resume_from_checkpoint=True)
    assert len(further.run.lines) == 3
    assert "false-positives" not in further.run.lines[1]["detectors"]  # nothing was graded for it


def test_an_alarm_can_end_the_run_with_the_best_round(build_watched, recorder, caplog) -> None:
    """CD-9: all rounds score 0, so that the untrained model is the earliest best one."""
    trainer = build_watched(
        alarm_actions={"false-positives": "best_round"},
        load_best_round_at_end=False,
        callbacks=[recorder],
    )
    before = recorder.copy(trainer.model)
    trainer.train()
    assert len(trainer.run.lines) == 1
    after = recorder.copy(trainer.model)
    assert all(bool((after[name] == weights).all()) for name, weights in before.items())
    assert any("loaded the weights of the untrained model" in r.message for r in caplog.records)
    card = (trainer.run.root.parent / "README.md").read_text()
    assert "| Weights | those before training |" in card
    assert "- Round 0, false-positives: " in card


@pytest.mark.slow
def test_a_resumed_run_takes_the_same_readings(build_watched) -> None:
    """What is compared with is read from disk."""
    whole = build_watched("whole")
    whole.train()
    for rounds in (1, 3):
        resumed = build_watched("resumed", num_rounds=rounds)
        resumed.train(resume_from_checkpoint=True)
    for line, other in zip(whole.run.lines, resumed.run.lines, strict=True):
        assert line["detectors"] == other["detectors"]
        assert line["alarms"] == other["alarms"]


def test_a_second_verifier_that_can_not_grade_training_rows_ends_nothing(
    build_watched, caplog
) -> None:
    def reads_another_column(completions, difficulty, **kwargs):
        return [0.0] * len(completions)

    trainer = build_watched(num_rounds=1)
    scorer = trainer.self_play.collector.eval_scorer
    scorer._functions[0] = reads_another_column
    trainer.self_play.heldout.clear()
    trainer.train()
    assert "false-positives" not in trainer.run.lines[0]["detectors"]
    assert any("false positives aren't measured" in r.message for r in caplog.records)


@pytest.mark.slow
def test_nothing_is_compared_at_another_temperature(build_watched) -> None:
    trainer = build_watched(num_rounds=2, round_temperatures=[1.0, 0.8])
    trainer.train()
    found = trainer.run.lines[1]["detectors"]
    assert not {"distinct-ratio", "distinct-correct", "token-entropy", "length-drift"} & set(found)


@pytest.mark.slow
def test_drift_is_scored_with_the_weights_from_before_round_0_if_asked_for(
    build_watched,
) -> None:
    """CD-7, on a real run: the weights stay as they are, and the number is that of both models."""
    trainer = build_watched(num_rounds=2, alarm_actions={"drift-from-base": "warn"})
    trainer.train()
    first, second = trainer.run.lines
    assert "drift-from-base" not in first["detectors"]
    assert second["detectors"]["drift-from-base"] > 0.0
    assert "drift-from-base" not in names_of(second)
    plain = build_watched("plain", num_rounds=2)
    plain.train()
    assert "drift-from-base" not in plain.run.lines[1]["detectors"]
    kept = [list(load_samples(t.run.folder(1))) for t in (trainer, plain)]
    assert kept[0] == kept[1]
    for parameter, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert bool((parameter == other).all())


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ({"held-out-drop": "stop"}, "no alarm. There are held-out-fall, sharpening"),
        ({"drift-from-base": "stop"}, "has no threshold"),
        ({"held-out-fall": "halt"}, r"must be one of \['ignore', 'warn', 'stop', 'best_round'\]"),
    ],
)
def test_unknown_alarms_and_actions_are_refused(tmp_path, actions, message) -> None:
    with pytest.raises(ValueError, match=message):
        STaRConfig(str(tmp_path), alarm_actions=actions, use_cpu=True)


def test_actions_are_read_from_a_flag_and_need_held_out_prompts_for_the_best_round(
    tmp_path, build_watched
) -> None:
    actions = dict.fromkeys(DETECTOR_OF, "warn")
    config = STaRConfig(str(tmp_path), alarm_actions=json.dumps(actions), use_cpu=True)
    assert config.alarm_actions == actions
    with pytest.raises(ValueError, match="needs an `eval_dataset`"):
        build_watched(
            alarm_actions={"coverage": "best_round"}, eval_dataset=None, eval_reward_funcs=None
        )


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING)
