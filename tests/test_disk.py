"""Files of a run: whole or not at all, also after a power cut; one process; errors with a remedy."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trl_selfplay.disk import (
    DamagedFileError,
    held_by_this_process,
    is_found,
    naming_damage,
    refuse_changed,
    replace_folder,
    save_checksums,
    save_file_with,
    saying_what_is_kept,
)
from trl_selfplay.rollouts.record import load_rollouts, save_rollouts


@pytest.fixture
def synced(monkeypatch):
    """Keep which paths are synced, in order, and where each was at that moment."""
    paths, sync = [], os.fsync

    def fsync(descriptor):
        paths.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


def test_a_finished_folder_takes_the_place_of_an_older_one(tmp_path) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "text").read_text() == "new"
    assert not (tmp_path / "new").exists()


def test_a_file_that_has_changed_in_a_folder_with_checksums_is_named(tmp_path) -> None:
    (tmp_path / "inner").mkdir()
    names = ("inner/model.safetensors", "data.arrow", "state.json")
    for name in names:
        (tmp_path / name).write_text(name)
    refuse_changed(tmp_path)  # as earlier versions left it
    save_checksums(tmp_path, (".safetensors", ".arrow", ".json"))
    (tmp_path / "README.md").write_text("what came later, or is for people alone")
    refuse_changed(tmp_path)
    for name in names:
        (tmp_path / name).write_text(name.upper())
        with pytest.raises(ValueError, match=f"{name} has changed"):
            refuse_changed(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            refuse_changed(tmp_path)
        (tmp_path / name).write_text(name)
    save_checksums(tmp_path)
    (tmp_path / "state.json").write_text("edited")
    refuse_changed(tmp_path)
    (tmp_path / "checksums.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        refuse_changed(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads names from Linux's /proc")
def test_a_folder_is_synced_with_all_that_is_in_it_before_it_is_renamed(tmp_path, synced) -> None:
    new = tmp_path / "new"
    (new / "inner").mkdir(parents=True)
    for path in (new / "a", new / "inner" / "b"):
        path.write_text("text")
    everything = {new, *new.rglob("*")}
    replace_folder(new, tmp_path / "final")
    assert set(synced[:-1]) == everything  # at their old places
    assert synced[-1] == tmp_path
    synced.clear()
    save_file_with(tmp_path / "state", lambda path: path.write_text("state"))
    assert [path.parent for path in synced] == [tmp_path, tmp_path.parent]
    assert synced[-1] == tmp_path


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")
def test_a_folder_is_held_until_its_process_ends_however_it_ends(tmp_path) -> None:
    code = (
        "import os, signal; from pathlib import Path\n"
        "from trl_selfplay.disk import held_by_this_process\n"
        f"with held_by_this_process(Path({str(tmp_path)!r})):\n"
        "    if not os.fork():\n"
        "        print(os.getpid(), flush=True); signal.pause()\n"  # it lives on
        "    input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    forked = int(child.stdout.readline())
    with (
        pytest.raises(RuntimeError, match="another process is training into"),
        held_by_this_process(tmp_path),
    ):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    try:
        for _ in range(2):  # and let go of at the end
            with held_by_this_process(tmp_path):
                pass
    finally:
        os.kill(forked, signal.SIGKILL)
        child.communicate()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("gone"), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), KeyError("a")],
)
def test_whatever_a_reader_raises_names_the_file_and_what_to_do(tmp_path, error) -> None:
    with (
        pytest.raises(DamagedFileError, match=r"file can't be read \(.*\)\. Do this\."),
        naming_damage(tmp_path / "file", "Do this."),
    ):
        raise error


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount]).returncode:
        pytest.skip("this machine doesn't let a test mount a tmpfs")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)  # an error's traceback keeps a file open


def test_a_full_disk_leaves_earlier_shards_and_says_what_to_do(small_disk, make_rollout) -> None:
    save_rollouts(small_disk / "00000.parquet", [make_rollout()])
    unique = [make_rollout(completion=os.urandom(2000).hex()) for _ in range(100)]
    with pytest.raises(OSError, match="resume_from_checkpoint=True") as raised:
        save_rollouts(small_disk / "00001.parquet", unique)
    assert raised.value.errno == errno.ENOSPC
    assert [p.name for p in small_disk.iterdir()] == ["00000.parquet"]
    assert load_rollouts(small_disk / "00000.parquet") == [make_rollout()]


@pytest.mark.parametrize(
    "save",
    [
        lambda tensor, path: torch.save(tensor, path),
        lambda tensor, path: save_file({"a": tensor}, path),
        lambda tensor, path: path.write_bytes(bytes(tensor.nbytes)),
    ],
    ids=["torch", "safetensors", "bytes"],
)
def test_a_disk_that_a_checkpoint_fills_says_what_is_kept(small_disk, save) -> None:
    with (
        pytest.raises(
            OSError, match=r"the disk is full in .*kept: free some space, then resume with train"
        ) as raised,
        saying_what_is_kept(small_disk),
    ):
        save(torch.rand(100_000), small_disk / "weights")
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="of another kind"), saying_what_is_kept(small_disk):
        raise RuntimeError("of another kind")


def test_a_file_that_a_network_shows_late_is_found(tmp_path, monkeypatch) -> None:
    path = tmp_path / "config.json"
    assert not is_found(path, seconds=0.0)
    monkeypatch.setattr("time.sleep", lambda _: path.touch())
    assert is_found(path)
