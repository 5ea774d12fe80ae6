"""What a round sampled and selected, read back from its folder."""

import json

import pytest

from trl_selfplay.disk import DamagedFileError
from trl_selfplay.rollouts.record import save_rollouts
from trl_selfplay.rollouts.selection import Selection
from trl_selfplay.rollouts.stored import load_kept, load_samples, save_selection

PROMPTS = [f"{i:032x}" for i in range(6)]


@pytest.fixture
def folder(tmp_path, make_rollout):
    """Three shards of two prompts and two samples each, as planned."""
    samples = tmp_path / "samples"
    samples.mkdir()
    plan = []
    for number in range(3):
        prompt_ids = PROMPTS[2 * number : 2 * number + 2]
        plan.append({"prompt_ids": prompt_ids, "batch_size": 4})
        rollouts = [make_rollout(prompt_id=p, sample_index=i) for p in prompt_ids for i in (0, 1)]
        save_rollouts(samples / f"{number:05d}.parquet", rollouts)
    (samples / "plan.json").write_text(json.dumps(plan))
    return tmp_path


def test_all_that_was_planned_is_read(folder) -> None:
    found = load_samples(folder)
    assert [(r.prompt_id, r.sample_index) for r in found] == [
        (p, i) for p in PROMPTS for i in (0, 1)
    ]


def test_a_round_is_iterated_over_one_shard_at_a_time(folder) -> None:
    stored = load_samples(folder)
    assert len(stored) == 12
    opened = iter(stored)
    next(opened)
    for path in sorted((folder / "samples").glob("*.parquet"))[1:]:
        path.unlink()  # not yet read
    assert [next(opened).prompt_id for _ in range(3)] == [PROMPTS[0], *[PROMPTS[1]] * 2]
    with pytest.raises(DamagedFileError, match=r"00001\.parquet"):
        next(opened)


def test_a_missing_shard_of_an_earlier_round_is_noticed(folder) -> None:
    """A third of the prompts would be gone without a word."""
    (folder / "samples" / "00001.parquet").unlink()
    with pytest.raises(DamagedFileError, match=r"00001\.parquet can't be read .* Bring it back"):
        load_samples(folder)


def test_a_shard_that_lacks_a_prompt_is_noticed(folder, make_rollout) -> None:
    save_rollouts(folder / "samples" / "00002.parquet", [make_rollout(prompt_id=PROMPTS[4])])
    with pytest.raises(
        DamagedFileError, match=r"00002\.parquet lacks 1 of the 2 prompts that .*/plan\.json says"
    ):
        list(load_samples(folder))


def test_a_plan_that_can_not_be_read_is_not_said_to_be_made_anew(folder) -> None:
    """Whoever reads a finished round plans nothing."""
    (folder / "samples" / "plan.json").write_text("[")
    with pytest.raises(DamagedFileError, match=r"plan\.json can't be read .*\)\. Bring it back"):
        load_samples(folder)


def test_a_missing_plan_or_selection_is_noticed(folder) -> None:
    with pytest.raises(
        DamagedFileError, match=r"selection\.parquet can't be read .* Bring it back"
    ):
        load_kept(folder)
    (folder / "samples" / "plan.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"samples/plan\.json is gone, .* Bring it back"):
        load_samples(folder)


def test_hinted_samples_without_their_plan_are_not_left_out_in_silence(
    folder, make_rollout
) -> None:
    """Their shards are named by the plan alone."""
    samples = list(load_samples(folder))
    hinted = make_rollout(phase="hint", hinted=True, prompt_id=PROMPTS[0], sample_index=2)
    plan = folder / "samples" / "hint-plan.json"
    save_rollouts(folder / "samples" / "hint-00000.parquet", [hinted])
    assert list(load_samples(folder)) == samples  # left over: no selection has hinted samples
    save_selection(folder / "selection.parquet", Selection.of([*samples, hinted], lambda _: "kept"))
    with pytest.raises(DamagedFileError, match=r"hint-plan\.json is gone.* Bring it back"):
        load_samples(folder)
    plan.write_text(json.dumps([{"prompt_ids": [PROMPTS[0]], "batch_size": 1}]))
    assert list(load_samples(folder)) == [*samples, hinted]
    plan.unlink()
    (folder / "selection.parquet").write_bytes(b"damaged")  # told by whoever reads outcomes
    assert list(load_samples(folder)) == samples
