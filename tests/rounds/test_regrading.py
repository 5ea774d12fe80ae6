"""Scores are taken back with all that followed from them, and nothing else."""

import json
from dataclasses import replace

import pytest

from trl_selfplay.rollouts.record import load_rollouts, save_rollouts
from trl_selfplay.rounds.identity import GRADED_ANEW
from trl_selfplay.rounds.mirror import RECORD, followed_by_store
from trl_selfplay.rounds.regrading import take_scores_back
from trl_selfplay.rounds.run import load_lines
from trl_selfplay.rounds.store import RoundsStore, describe, scan

CONFIG = {"reward_funcs": "('exact',)", "metric_for_best_model": "eval_accuracy"}


@pytest.fixture
def run(write_folder, make_rollout):
    """Three rounds, of which the last is under way, as a run with adapters leaves them."""
    rounds = [
        [
            (make_rollout(round_index=i, sample_index=n, environment_reward=0.5), "kept")
            for n in (0, 1)
        ]
        for i in range(3)
    ]
    untrained = [make_rollout(phase="eval", round_index=-1)]
    folder = write_folder(
        rounds, finished=2, evaluations={-1: untrained, 0: untrained, 1: untrained}
    )
    root = folder / "_rounds"
    for index in range(2):
        write(root / f"round-{index:03d}" / "model" / "adapter_model.safetensors")
    for name in (
        "round-002/checkpoint-2/optimizer.pt", "round-002/dataset/state.json",
        "round-002/judgements/0-plan.json", "round-002/answers/00000.parquet", "gold.parquet",
        "calibration.json", "judgements/gold-0-plan.json", "before/evaluation/judgements/plan.json",
        "faithfulness.json", "trackers.json", "initial/trainable.safetensors", "rendering.json",
        "observations.jsonl", "round-002/samples/00001.steps.jsonl",
    ):  # fmt: skip
        write(root / name)
    write(folder / "student" / "_rounds" / "config.json")
    return root


def write(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def write_lines(run, lines) -> None:
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def scores_in(path):
    return {(r.reward, r.rewards) for r in load_rollouts(path)}


def test_the_round_under_way_loses_its_scores_and_what_they_became(run) -> None:
    before, lines = names_in(run), load_lines(run / "rounds.jsonl")
    found = take_scores_back(run, CONFIG, 2)
    assert (found.num_samples, found.num_environments, found.num_heldout) == (2, 2, 0)
    assert scores_in(run / "round-002/samples/00000.parquet") == {(None, ())}
    assert {
        r.environment_reward for r in load_rollouts(run / "round-002/samples/00000.parquet")
    } == {0.5}
    gone = {
        "round-002/checkpoint-2/optimizer.pt", "round-002/dataset/state.json",
        "round-002/judgements/0-plan.json", "round-002/answers/00000.parquet",
        "round-002/selection.parquet", "faithfulness.json", "trackers.json",
    }  # fmt: skip
    assert names_in(run) == before - gone
    aside = run.parent / "_rounds_aside"
    copies = {"round-002/samples/00000.parquet", "student/_rounds/config.json"}
    assert names_in(aside) == gone | copies
    assert scores_in(aside / "round-002/samples/00000.parquet") == {(1.0, (1.0,))}
    assert load_lines(run / "rounds.jsonl") == lines
    assert scores_in(run / "round-001/samples/00000.parquet") == {(1.0, (1.0,))}
    assert GRADED_ANEW not in json.loads((run / "config.json").read_text())


def test_from_the_first_round_on_all_scores_go_and_no_sample_of_it(run) -> None:
    samples = load_rollouts(run / "round-000/samples/00000.parquet")
    found = take_scores_back(run, CONFIG, 0)
    assert (found.num_samples, found.num_heldout) == (2, 1)
    assert names_in(run) == {
        "before/evaluation/greedy-00000.parquet", "before/evaluation/greedy-plan.json",
        "config.json", "initial/trainable.safetensors", "observations.jsonl", "rendering.json",
        "round-000/samples/00000.parquet", "round-000/samples/plan.json",
    }  # fmt: skip
    kept = load_rollouts(run / "round-000/samples/00000.parquet")
    assert kept == [replace(r, reward=None, rewards=()) for r in samples]
    assert scores_in(run / "before/evaluation/greedy-00000.parquet") == {(None, ())}
    aside = run.parent / "_rounds_aside"
    assert load_rollouts(aside / "round-000/samples/00000.parquet") == samples
    assert len(load_lines(aside / "rounds.jsonl")) == 2
    assert (aside / "round-002/samples/00001.steps.jsonl").exists()
    assert json.loads((run / "config.json").read_text())[GRADED_ANEW] is True


def test_a_second_time_another_folder_is_made(run) -> None:
    assert take_scores_back(run, CONFIG, 1).aside.name == "_rounds_aside"
    lines = load_lines(run / "rounds.jsonl")
    assert [line["round"] for line in lines] == [0]
    again = take_scores_back(run, CONFIG, 1)
    assert (again.aside.name, again.num_samples, again.moved) == ("_rounds_aside_2", 0, [])
    assert again.num_held == 2


def test_hinted_samples_stay_and_are_copied_although_they_have_no_scores(run, make_rollout) -> None:
    """Prompts that turn out to be solved drop out of the shards that hold them."""
    path = run / "round-002/samples/hint-00000.parquet"
    hinted = [make_rollout(phase="hint", hinted=True, sample_index=4, reward=None, rewards=())]
    save_rollouts(path, hinted)
    write(path.with_name("hint-plan.json"))
    found = take_scores_back(run, CONFIG, 2)
    assert "round-002/samples/hint-plan.json" in found.moved
    assert not path.with_name("hint-plan.json").exists()
    assert load_rollouts(path) == load_rollouts(found.aside / path.relative_to(run)) == hinted


def test_which_round_has_to_be_said_once_one_is_finished(run) -> None:
    with pytest.raises(
        ValueError, match=r"rounds 0 to 1 are finished.* --round .*again: 0, 1, 2\."
    ):
        take_scores_back(run, CONFIG)
    write_lines(run, load_lines(run / "rounds.jsonl")[:1])
    with pytest.raises(
        ValueError, match=r"^round 0 is finished, and was trained on the scores that it"
    ):
        take_scores_back(run, CONFIG)
    (run / "rounds.jsonl").unlink()
    assert take_scores_back(run, CONFIG).round_index == 0


@pytest.mark.parametrize(
    ("config", "index", "said"),
    [
        ({}, 3, r"round 3 has no samples on disk yet\. Rounds that can be graded again: 0, 1, 2\."),
        ({}, -1, r"--round -1: rounds are counted from 0\. Rounds that can"),
        ({"reward_funcs": None, "method": "SPIN"}, 0, r"no scores: this run \(SPIN\) has no reward"),
        ({"improve_thresholds": [0.0, 0.5]}, 1, "round 1 is an Improve step on .* round 0: give"),
    ],
)  # fmt: skip
def test_what_cannot_be_graded_again_is_refused_and_left_alone(run, config, index, said) -> None:
    before = names_in(run.parent)
    with pytest.raises(ValueError, match=said):
        take_scores_back(run, {**CONFIG, **config}, index)
    assert names_in(run.parent) == before


def test_a_round_whose_weights_are_gone_is_refused(run) -> None:
    """Without adapters a run keeps the newest and the best model alone."""
    model = run / "round-000" / "model"
    model.rename(run / "round-000" / "elsewhere")
    with pytest.raises(
        ValueError,
        match=r"round 1 can't be graded again: .*round-000/model is gone, whose weights a resumed run loads "
        r"before round 1, whether or not it samples .* 0, 2\. Not 1: a model .* is gone\.",
    ):
        take_scores_back(run, CONFIG, 1)
    lines = load_lines(run / "rounds.jsonl")
    lines[0]["eval"]["eval_accuracy"] = 0.9  # the best one before round 2
    write_lines(run, lines)
    with pytest.raises(
        ValueError, match=r"round-000/model is gone, whose weights are the best .* 0\."
    ):
        take_scores_back(run, CONFIG, 2)
    assert take_scores_back(run, {**CONFIG, "load_best_round_at_end": False}, 2).round_index == 2


def test_an_interrupted_call_is_finished_before_another_round(run) -> None:
    (run / "regrade.json").write_text('{"round": 1, "aside": "_rounds_aside"}')
    with pytest.raises(ValueError, match=r"round 1 was interrupted\. Finish it with --round 1"):
        take_scores_back(run, CONFIG, 0)
    assert take_scores_back(run, CONFIG).round_index == 1
    assert not (run / "regrade.json").exists()


def test_a_store_has_the_same_rounds_afterwards(run, tmp_path) -> None:
    url = f"file://{tmp_path / 'store'}"
    config = {**CONFIG, "rounds_dir": url}
    with followed_by_store(url, run):  # puts all that is there
        assert "round-002/selection.parquet" in RoundsStore(url).entries()
    with followed_by_store(url, run):
        take_scores_back(run, config, 1)
    assert "round-002/selection.parquet" not in RoundsStore(url).entries()
    other = tmp_path / "other" / "_rounds"
    with followed_by_store(url, other):  # another machine, with an empty disk
        pass
    assert {n: describe(p) for n, p in scan(other).items()} == {
        n: describe(p) for n, p in scan(run).items()
    }


def test_a_store_that_was_left_is_not_taken_up_again(run) -> None:
    """It still has what was moved aside, and would bring it back."""
    write(run.parent / RECORD)
    take_scores_back(run, CONFIG, 1)
    assert not (run.parent / RECORD).exists()
