"""What is read from a run's folder, and what is said of it where it was damaged."""

import json
import logging

import pytest

from trl_selfplay.disk import DamagedFileError
from trl_selfplay.rounds.run import load_lines

LINES = [{"round": i, "steps": 3, "eval": {}} for i in range(3)]


def write(path, texts):
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def test_a_last_line_cut_short_is_finished_again(tmp_path, caplog) -> None:
    path = write(tmp_path / "rounds.jsonl", [json.dumps(line).encode() for line in LINES])
    assert load_lines(path) == LINES
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        assert load_lines(path) == LINES[:2]
    assert "finished again" in caplog.text
    assert load_lines(tmp_path / "none") == []


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b"[1]", b"3", b'{"round": 2}', b""])
def test_a_damaged_line_before_the_last_is_named(tmp_path, damage) -> None:
    texts = [json.dumps(line).encode() for line in LINES]
    path = write(tmp_path / "rounds.jsonl", [texts[0], damage, texts[2]])
    with pytest.raises(DamagedFileError, match=r"line 2 of .*rounds\.jsonl .* delete this line"):
        load_lines(path)
