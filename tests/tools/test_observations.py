"""Results of calls on disk: RA-15."""

import json
from datetime import datetime

from trl_selfplay.disk import followed
from trl_selfplay.tools.observations import Observations
from trl_selfplay.tools.record import ToolCall, ToolResult

CALL = ToolCall("search", {"query": "x", "count": 3})
SAME = ToolCall("search", {"count": 3, "query": "x"})
OTHER = ToolCall("search", {"query": "y"})
FOUND = ToolResult("search", "line\nbreak, é and \ud800")


def test_a_result_is_found_again_by_its_step_and_by_its_call(tmp_path) -> None:
    path = tmp_path / "new" / "observations.jsonl"
    Observations(path).add("one", CALL, FOUND)
    again = Observations(path)
    assert again.of_step("one", SAME) == again.of_call(SAME) == FOUND
    assert again.of_step("two", CALL) is None
    assert (
        again.of_step("one", OTHER) is None
    )  # a step that is sampled anew may call something else
    assert again.of_call(OTHER) is None
    (line,) = map(json.loads, path.read_text().splitlines())
    assert datetime.fromisoformat(line["date"]).tzinfo is not None


def test_a_failure_is_replayed_for_its_step_and_tried_again_by_others(tmp_path) -> None:
    """RA-8: a deadline that was missed once says nothing of the next call."""
    path = tmp_path / "observations.jsonl"
    failed = ToolResult("search", "Error: too late", failed=True)
    Observations(path).add("one", CALL, failed)
    again = Observations(path)
    assert again.of_step("one", SAME) == failed
    assert again.of_call(CALL) is None


def test_a_line_that_was_cut_off_costs_its_call_alone(tmp_path, caplog) -> None:
    path = tmp_path / "observations.jsonl"
    first = Observations(path)
    first.add("one", CALL, FOUND)
    first.add("two", OTHER, FOUND)
    path.write_bytes(path.read_bytes()[:-20])
    again = Observations(path)
    assert (again.of_step("one", CALL), again.of_step("two", OTHER)) == (FOUND, None)
    assert "line 2" in caplog.text
    again.add("two", OTHER, FOUND)
    assert Observations(path).of_step("two", OTHER) == FOUND


def test_a_result_that_has_changed_costs_its_call_alone(tmp_path, caplog) -> None:
    path = tmp_path / "observations.jsonl"
    for step, call in (("one", CALL), ("two", OTHER)):
        Observations(path).add(step, call, FOUND)
    path.write_bytes(path.read_bytes().replace(b"line", b"lime", 1))
    again = Observations(path)
    assert (again.of_step("one", CALL), again.of_step("two", OTHER)) == (None, FOUND)
    assert f"line 1 of {path} can't be read (it is damaged): its call is made again" in caplog.text


def test_a_line_of_an_earlier_version_without_a_checksum_is_read(tmp_path) -> None:
    path = tmp_path / "observations.jsonl"
    Observations(path).add("one", CALL, FOUND)
    event = json.loads(path.read_text())
    del event["crc"]
    path.write_text(json.dumps(event))
    assert Observations(path).of_step("one", CALL) == FOUND


def test_without_a_file_results_are_kept_in_memory() -> None:
    known = Observations(None)
    known.add("one", CALL, FOUND)
    assert known.of_call(SAME) == FOUND


class Noted(list):
    """Follows a folder."""

    def written(self, path) -> None:
        self.append((path.name, len(path.read_bytes().splitlines())))


def test_who_follows_the_folder_is_told_of_new_results_once(tmp_path) -> None:
    """So that a store has them."""
    noted = Noted()
    with followed(tmp_path, noted):
        known = Observations(tmp_path / "observations.jsonl")
        known.tell()
        known.add("one", CALL, FOUND)
        known.add("two", OTHER, FOUND)
        known.tell()
        known.tell()
        Observations(None).tell()
    assert noted == [("observations.jsonl", 2)]
