import json
from dataclasses import fields, replace

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_selfplay.disk import DamagedFileError, NewerFormatError
from trl_selfplay.rollouts.record import (
    FORMAT,
    SCHEMA,
    Rollout,
    hash_prompt,
    load_rollouts,
    save_rollouts,
)

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)
scores = st.none() | st.floats(allow_nan=False)
ids_and_masks = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=6)
plain_rollouts = st.builds(
    Rollout,
    round_index=st.integers(-1, 9),
    phase=st.sampled_from(["train", "hint", "eval"]),
    prompt_id=st.text("0123456789abcdef", min_size=32, max_size=32),
    sample_index=st.integers(0, 99),
    prompt_ids=token_ids,
    completion_ids=token_ids,
    prompt=st.text(),
    completion=st.text(),
    finish=st.sampled_from(["eos", "stop", "length"]),
    hinted=st.booleans(),
    logprob=scores,
    reward=scores,
    rewards=st.lists(scores, max_size=3).map(tuple),
    causes=st.lists(st.none() | st.text(), max_size=3).map(tuple),
)


messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls"]),
        st.text() | st.none() | st.lists(st.dictionaries(st.text(), st.integers()), max_size=2),
    ),
    max_size=3,
).map(tuple)


@st.composite
def any_rollout(draw: st.DrawFn) -> Rollout:
    """A rollout of which every second has tokens that the policy didn't write."""
    rollout = draw(plain_rollouts)
    if draw(st.booleans()):
        return rollout
    drawn = draw(ids_and_masks)
    return replace(
        rollout,
        completion_ids=tuple(i for i, _ in drawn),
        completion_mask=tuple(m for _, m in drawn),
        messages=draw(messages),
        environment_reward=draw(scores),
        halt=draw(st.sampled_from([None, "malformed", "tool_limit"])),
        num_failed_calls=draw(st.integers(0, 99)),
        num_rerendered_turns=draw(st.integers(0, 99)),
    )


rollouts = st.lists(any_rollout(), max_size=5)


@given(rollouts)
def test_a_shard_reads_back_as_it_was_written(tmp_path_factory, written) -> None:
    path = tmp_path_factory.mktemp("shard") / "00000.parquet"
    save_rollouts(path, written)
    assert load_rollouts(path) == written


OF_TRAJECTORIES = [
    "messages", "environment_reward", "halt", "num_failed_calls", "num_rerendered_turns",
]  # fmt: skip


@pytest.mark.parametrize(
    ("version", "lacking"),
    [
        (1, ["completion_mask", "causes", *OF_TRAJECTORIES]),
        (2, ["causes", *OF_TRAJECTORIES]),
        (3, OF_TRAJECTORIES),
    ],
)
def test_a_shard_of_an_earlier_format_lacks_columns(
    tmp_path, make_rollout, version, lacking
) -> None:
    """Those without a format number are of the first."""
    path, rollout = tmp_path / "00000.parquet", make_rollout()
    save_rollouts(path, [rollout])
    table = pq.read_table(path).drop_columns(lacking)
    key = next(iter(table.schema.metadata))
    metadata = None if version == 1 else {key: str(version).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert load_rollouts(path) == [rollout]


def test_the_cause_of_an_abstention_is_the_first_that_a_function_named(make_rollout) -> None:
    abstained = {"reward": None, "rewards": (None, None, None)}
    assert make_rollout(**abstained, causes=(None, "tie", "no answer")).cause == "tie"
    assert make_rollout(**abstained).cause is None
    assert make_rollout(rewards=(None, 1.0), causes=("tie", None)).cause is None  # it has a reward


def test_a_shard_of_a_later_format_is_left_alone_and_named(tmp_path, make_rollout) -> None:
    path = tmp_path / "00000.parquet"
    save_rollouts(path, [make_rollout()])
    table = pq.read_table(path)
    key = next(iter(table.schema.metadata))
    later = {key: str(FORMAT + 1).encode()}
    pq.write_table(table.replace_schema_metadata(later), path)
    with pytest.raises(
        NewerFormatError, match=rf"00000\.parquet has format {FORMAT + 1} .*upgrade"
    ):
        load_rollouts(path)


def test_a_mask_of_another_length_is_refused(make_rollout) -> None:
    with pytest.raises(ValueError, match="completion_mask has 1 entries for 3 completion_ids"):
        make_rollout(completion_mask=(True,))


def test_messages_are_a_column_of_json(tmp_path, make_rollout) -> None:
    path = tmp_path / "00000.parquet"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    written = (
        {"role": "assistant", "content": "\ud800 é", "tool_calls": [call]},  # half a surrogate pair
        {"role": "tool", "name": "add", "content": "1"},
    )
    save_rollouts(path, [make_rollout(messages=written), make_rollout()])
    of_trajectory, of_single_turn = pq.read_table(path).column("messages").to_pylist()
    assert json.loads(of_trajectory) == list(written)
    assert of_single_turn is None
    assert load_rollouts(path)[0].messages == written


def test_the_schema_has_every_field_of_the_record() -> None:
    assert SCHEMA.names == [field.name for field in fields(Rollout)]


def test_the_prompt_id_is_the_same_in_every_process_and_for_every_key_order() -> None:
    """Written down once: a changed hash would lose every sample on disk."""
    assert hash_prompt("2 + 2?", "4") == "e402ae8ff6c2500d6ab5671aa9e4817e"
    message, turned = {"role": "user", "content": "é"}, {"content": "é", "role": "user"}
    assert hash_prompt([message], 1) == hash_prompt([turned], 1)
    assert hash_prompt("2 + 2?", "4") != hash_prompt("2 + 2?", "5")


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "lacks a column"])
def test_a_damaged_shard_is_recognised(tmp_path, make_rollout, damage) -> None:
    path = tmp_path / "00000.parquet"
    save_rollouts(path, [make_rollout() for _ in range(50)])
    content = path.read_bytes()
    if damage == "lacks a column":
        pq.write_table(pq.read_table(path).drop_columns(["completion_ids"]), path)
    else:
        path.write_bytes(
            {"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\0" * 500}[damage]
        )
    with pytest.raises(DamagedFileError, match=r"00000\.parquet"):
        load_rollouts(path)


def test_no_changed_bit_is_read_as_another_sample(tmp_path, make_rollout) -> None:
    path, named = tmp_path / "shard.parquet", []
    written = [
        make_rollout(sample_index=i, completion_ids=(i, i + 1), logprob=i / 3) for i in range(9)
    ]
    save_rollouts(path, written)
    content = path.read_bytes()
    for place in range(0, len(content), 9):
        changed = bytes([content[place] ^ 1])
        path.write_bytes(content[:place] + changed + content[place + 1 :])
        try:
            assert load_rollouts(path) == written, place
        except (DamagedFileError, NewerFormatError) as error:
            named.append(str(error))
    assert len(named) > len(content) / 9 / 2
    assert all(str(path) in text for text in named)
