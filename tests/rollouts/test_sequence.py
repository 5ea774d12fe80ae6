"""Rollouts that are read when they are needed: the same records, in the order that was asked for."""

import json
import os
import random
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from trl_selfplay.disk import DamagedFileError
from trl_selfplay.rollouts import sequence
from trl_selfplay.rollouts.facts import digest_form
from trl_selfplay.rollouts.record import save_rollouts
from trl_selfplay.rollouts.rows import build_training_rows
from trl_selfplay.rollouts.selection import SelectionRules, default_normal_form, select
from trl_selfplay.rollouts.sequence import Rollouts, StoredShard


@pytest.fixture
def store(tmp_path, make_rollout):
    """Write shards of prompts with 4 samples each; return them, and their rollouts as a list."""

    def write(num_shards, num_prompts=3, num_tokens=4):
        rng = random.Random(0)
        shards, rollouts = [], []
        for number in range(num_shards):
            prompt_ids = tuple(f"{rng.getrandbits(64):032x}" for _ in range(num_prompts))
            held = [
                make_rollout(
                    prompt_id=prompt_id,
                    sample_index=index,
                    completion_ids=tuple(rng.choices(range(1000), k=num_tokens)),
                    completion=f"{'so ' * num_tokens}{rng.randrange(3)}",
                    reward=reward,
                    rewards=(reward, None),
                    completion_mask=None if rng.random() < 0.9 else (True,) * num_tokens,
                )
                for prompt_id in prompt_ids
                for index in range(4)
                for reward in [float(rng.random() < 0.5)]
            ]
            path = tmp_path / f"{number:05d}.parquet"
            save_rollouts(path, held)
            shards.append(StoredShard(path, prompt_ids))
            rollouts += held
        return Rollouts.stored(shards), rollouts

    return write


@pytest.mark.parametrize("band", [5, 64, 8192])
def test_any_order_gives_the_same_records(store, make_rollout, monkeypatch, band) -> None:
    """Those in memory among them, and some of them twice; nothing is left behind on disk."""
    monkeypatch.setattr(sequence, "_BAND", band)
    stored, rollouts = store(7)
    extra = [make_rollout(prompt_id="in memory", sample_index=i) for i in range(3)]
    both, expected = stored + extra, rollouts + extra
    assert stored == rollouts
    assert both == expected
    assert extra + stored == extra + rollouts
    places = random.Random(1).choices(range(len(expected)), k=150)
    assert both.pick(places) == [expected[i] for i in places]
    assert dict(both.pick(places).scan()) == {i: expected[p] for i, p in enumerate(places)}
    assert both[-1] == extra[-1]
    assert both[5:20:3] == expected[5:20:3]
    indices, ids = both.pick(places).columns("sample_index", "completion_ids")
    assert indices == [expected[i].sample_index for i in places]
    assert ids == [expected[i].completion_ids for i in places]
    assert len(list(stored[:1]._parts[0].path.parent.iterdir())) == 7  # type: ignore[union-attr]


def test_numbers_replace_indices(store) -> None:
    stored, rollouts = store(2)
    numbers = list(range(100, 100 + len(rollouts)))
    other = Rollouts.of(stored).renumbered(sequence.np.array(numbers))
    expected = [replace(r, sample_index=i) for r, i in zip(rollouts, numbers, strict=True)]
    assert other == expected
    assert other[::-1] == expected[::-1]
    assert other.columns("sample_index") == [numbers]


def test_a_shard_that_is_gone_is_noticed_when_it_is_read(store) -> None:
    stored, rollouts = store(3)
    stored[4 * 3 : 4 * 3 + 1]._parts[1].path.unlink()  # type: ignore[union-attr]
    assert stored[0] == rollouts[0]
    with pytest.raises(DamagedFileError, match=r"00001\.parquet"):
        list(stored)


@pytest.mark.parametrize("form", [default_normal_form, len, None])
def test_a_round_on_disk_is_selected_like_one_in_memory(store, form) -> None:
    stored, rollouts = store(6)
    rules = SelectionRules(
        lambda r: r.passes(1.0), seed=3, normal_form=form, max_per_prompt=2,
        fits=lambda r: r.completion_ids[0] % 7 > 0,
    )  # fmt: skip
    earlier = [replace(r, round_index=-1, completion=r.completion + "!") for r in rollouts[::2]]
    one, other = (select(given, rules, history=earlier) for given in (stored, rollouts))
    assert one.kept == other.kept
    assert one.history == other.history
    assert (one.outcomes, one.funnel) == (other.outcomes, other.funnel)
    assert len(one.kept) > 5


def test_rows_on_disk_are_those_in_memory(store, tmp_path) -> None:
    stored, rollouts = store(6)
    prompts = {r.prompt_id: (1, 2) for r in rollouts}
    folder = tmp_path / "rows"
    one = build_training_rows(stored, prompts, 9, seed=5, weigh=lambda r, _: r, folder=folder)
    other = build_training_rows(rollouts, prompts, 9, seed=5, weigh=lambda r, _: r)
    assert one.to_list() == other.to_list()
    assert one.features == other.features
    assert one.cache_files
    assert build_training_rows([], {}, 9, seed=5, folder=folder).to_list() == []


def test_digests_are_equal_for_equal_forms_alone() -> None:
    forms = ["a", ("a",), "('a',)", ("a", "b"), ("a, b",), "", (), -1, -2, (1, "a"), frozenset("a")]
    digests = [digest_form(form) for form in forms]
    assert len(set(digests)) == len(forms)
    assert digest_form("".join(["a", "b"])) == digest_form("ab")


def test_memory_does_not_grow_with_tokens_and_texts(store, tmp_path) -> None:
    """Selecting and building rows holds some hundred bytes per rollout, whatever its length."""
    rules = SelectionRules(lambda r: r.passes(1.0), seed=3, normal_form=default_normal_form)
    peaks = []
    for num_shards in (10, 40):
        stored, rollouts = store(num_shards, num_prompts=8, num_tokens=200)
        prompts = {r.prompt_id: (1, 2) for r in rollouts}
        del rollouts
        tracemalloc.start()
        kept = select(stored, rules).kept
        build_training_rows(kept[:32], prompts, 9, seed=5, folder=tmp_path / "rows")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (30 * 8 * 4) < 1000  # bytes; a record's are over 7000


@pytest.mark.full
def test_a_million_rollouts_are_selected_in_less_than_2_gb(tmp_path) -> None:
    """The process's peak, with torch and all other packages: graded, selected, and rows written."""
    script = Path(__file__).parents[2] / "benchmarks" / "growth.py"
    done = subprocess.run(
        [sys.executable, script, "--part", "store", "--measure", "1000000"],
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["examples"] > 300_000
    assert found["peak_mb"] < 2000
