"""A folder of rounds on a store: what is whole, what is put and fetched, what errors say."""

import json
import pickle
import re
from pathlib import Path
from uuid import uuid4

import pytest

from trl_selfplay.rounds.store import (
    RoundsStore,
    StoreError,
    check_rounds_dir,
    describe,
    is_same,
    scan,
    without_url_secrets,
)

PASSWORD = "Hunter2/Secret"


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path) -> RoundsStore:
    place = (
        f"memory://{uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/store"
    )
    return RoundsStore(place, pauses_s=())


@pytest.fixture
def rounds(tmp_path) -> Path:
    """Rounds on disk: files, a whole folder with a folder in it, and what a kill leaves behind."""
    root = tmp_path / "_rounds"
    files = {
        "config.json": b"{}",
        "round-000/samples/train-00000.parquet": b"samples",
        "round-000/model/adapter.safetensors": b"weights",
        "round-000/model/inner/more.json": b"",
        "round-000/.model/adapter.safetensors": b"half of the wei",
        "round-000/.config.json.17.tmp": b"half",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def put_all(store, root) -> None:
    for name, path in scan(root).items():
        store.put(name, path)


def test_files_and_whole_folders_are_told_apart_and_temporary_ones_left_out(rounds) -> None:
    assert list(scan(rounds)) == [
        "config.json", "round-000/model", "round-000/samples/train-00000.parquet",
    ]  # fmt: skip


def test_what_is_fetched_is_what_was_put(store, rounds, tmp_path) -> None:
    put_all(store, rounds)
    entries = store.entries()
    assert set(entries) == set(scan(rounds))
    for name, entry in entries.items():
        store.fetch(name, entry, tmp_path / "other" / name)
        assert describe(tmp_path / "other" / name) == describe(rounds / name)
    assert set(scan(tmp_path / "other")) == set(scan(rounds))
    assert is_same(rounds / "round-000/model", entries["round-000/model"])
    (rounds / "round-000/model/adapter.safetensors").write_bytes(b"WEIGHTS")
    assert not is_same(rounds / "round-000/model", entries["round-000/model"])


def test_a_folder_without_its_list_or_with_a_file_of_another_size_is_not_there(
    store, rounds
) -> None:
    put_all(store, rounds)
    listed = store.read("round-000/model/_files.json")
    store.write("round-000/model/adapter.safetensors", b"half")
    assert "round-000/model" not in store.entries()
    store.put("round-000/model", rounds / "round-000/model")
    store.delete("round-000/model/_files.json")
    assert set(store.entries()) == {"config.json", "round-000/samples/train-00000.parquet"}
    store.write("round-000/model/_files.json", listed)
    assert "round-000/model" in store.entries()
    store.write("round-000/model/_files.json", listed[:-9])
    assert "round-000/model" not in store.entries()


def test_a_folder_that_replaces_another_keeps_none_of_its_files(store, rounds) -> None:
    put_all(store, rounds)
    (rounds / "round-000/model/adapter.safetensors").unlink()
    store.put("round-000/model", rounds / "round-000/model")
    assert set(store.entries()["round-000/model"].files) == {"inner/more.json"}
    assert store.read("round-000/model/adapter.safetensors") is None


def test_what_is_deleted_is_gone_and_what_is_not_there_is_no_error(store, rounds) -> None:
    put_all(store, rounds)
    store.delete("round-000")
    store.delete("round-001/model")
    assert set(store.entries()) == {"config.json"}


def test_an_object_that_came_otherwise_than_it_was_put_is_an_error_that_names_it(
    store, rounds, tmp_path
) -> None:
    put_all(store, rounds)
    entry = store.entries()["round-000/model"]
    store.write("round-000/model/adapter.safetensors", b"WEIGHTS")
    with pytest.raises(StoreError, match=r"round-000/model/adapter\.safetensors came otherwise"):
        store.fetch("round-000/model", entry, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_later_format_is_refused(store, rounds) -> None:
    put_all(store, rounds)
    store.write("round-000/model/_files.json", json.dumps({"format": 2}).encode())
    with pytest.raises(StoreError, match=r"model/_files\.json was written by a later version"):
        store.entries()


@pytest.mark.parametrize(
    "listed",
    [
        b"", b"\xff\xfe", b"[1, 2]", b"null", b"5", b"{}", b'{"format": "x"}', b'{"format": null}',
        b'{"format": 1}', b'{"format": 1, "files": 5}', b'{"format": 1, "files": ["config.json"]}',
        b'{"format": 1, "files": {"config.json": "2"}}', b'{"format": 1, "files": null}',
        b'{"format": 1, "files": {"config.json": 2}, "md5": [1]}',
        b'{"format": 1, "files": {"config.json": 2}, "md5": {"config.json": 1}}',
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)  # fmt: skip
def test_a_damaged_list_of_files_counts_as_none(listed, caplog) -> None:
    store = RoundsStore(f"memory://{uuid4().hex}/run", pauses_s=())
    store.write("round-000/model/config.json", b"{}")
    store.write("round-000/model/_files.json", listed)
    assert store.entries() == {}
    assert caplog.messages == [
        f"{store.url}/round-000/model/_files.json can't be read, and counts for nothing."
    ]


@pytest.mark.parametrize(
    "name",
    [
        "../../out",
        "/etc/out",
        "round-000/../../../out",
        "round-000/./out",
        "a//out",
        "a\0out",
        "..",
    ],
)
def test_an_object_whose_name_leads_out_of_its_folder_is_refused_by_name(
    store, monkeypatch, name
) -> None:
    store.write("config.json", b"{}")

    def find(at, detail):
        return {f"{at}/config.json": {"size": 2}, f"{at}/{name}": {"size": 2}}

    monkeypatch.setattr(
        store._connect(), "find", find
    )  # these two clients tidy names; S3's doesn't
    for list_all in (store.check_answers, store.entries):
        with pytest.raises(StoreError, match=re.escape(repr(name))) as caught:
            list_all()
        assert caught.value.is_permanent


@pytest.mark.parametrize("inner", ["../../../../out", "/etc/out", "inner/../out", ""])
def test_a_list_of_files_that_leads_out_of_its_folder_is_refused_by_name(
    store, rounds, inner
) -> None:
    put_all(store, rounds)
    listed = json.loads(store.read("round-000/model/_files.json"))
    listed["files"][inner] = 2
    store.write("round-000/model/_files.json", json.dumps(listed).encode())
    with pytest.raises(StoreError, match=re.escape(repr(f"round-000/model/{inner}"))):
        store.entries()


def test_objects_on_s3_that_lead_out_are_refused_and_those_that_mark_a_folder_left_out(s3) -> None:
    client, bucket = s3.client(), s3.make_bucket()
    store = RoundsStore(f"s3://{bucket}/run", pauses_s=())
    for key in ("run/", "run/round-000/", "run/round-000/model/", "run/config.json"):
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    assert set(store.entries()) == {"config.json"}
    client.put_object(Bucket=bucket, Key="run/round-000/../../../out", Body=b"")
    with pytest.raises(StoreError, match=r"round-000/\.\./\.\./\.\./out"):
        store.entries()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("runs/mine", "isn't a URL"),
        ("", "isn't a URL"),
        ("simplecache::s3://bucket/run", "isn't a URL"),
        ("s3://bucket", "name a folder in the bucket"),
        ("s3://bucket/", "name a folder in the bucket"),
        ("s3://", "as in s3://bucket/run"),
        ("nope://bucket/run", "no kind of store is called 'nope'"),
        (f"s3://someone:{PASSWORD}@bucket/run", "more than the place"),
        (f"s3://someone:{PASSWORD.replace('/', '')}@bucket/run", "more than the place"),
        (f"abfs://box@account/run?sig={PASSWORD}", "more than the place"),
    ],
)
def test_a_place_that_is_none_or_that_holds_a_secret_is_refused_without_showing_it(
    url, told
) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        check_rounds_dir(url)
    assert "Secret" not in str(caught.value)


def test_texts_of_clients_lose_their_secrets() -> None:
    text = f"Could not connect to https://me:{PASSWORD}@host:9000/bucket?X-Amz-Signature=Secret now"
    assert without_url_secrets(text) == (
        "Could not connect to https://(not shown)@host:9000/bucket?(not shown) now"
    )
    assert without_url_secrets("s3://bucket/run/a.json") == "s3://bucket/run/a.json"


def test_a_store_whose_client_is_missing_is_told_at_once() -> None:
    with pytest.raises(StoreError, match="Install what it names") as caught:
        RoundsStore("dvc://bucket/run").check_answers()
    assert caught.value.is_permanent
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_bucket_that_is_missing_and_wrong_credentials_are_told_at_once(s3, monkeypatch) -> None:
    store = RoundsStore("s3://no-such-bucket/run")
    with pytest.raises(StoreError, match="bucket does not exist") as caught:
        store.check_answers()
    assert caught.value.is_permanent
    with pytest.raises(StoreError, match=r"could not write a.*See that the bucket is there"):
        store.write("a", b"")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(StoreError, match="Set AWS_ACCESS_KEY_ID and AWS_SECRET") as caught:
        RoundsStore("s3://no-such-bucket/run").check_answers()
    assert caught.value.is_permanent
