"""The GPU benchmark's records, order and tables, and on a CPU one of its parts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def parts(monkeypatch):
    """Let the parts be imported as the script imports them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_parts.items as items

    return items


def run_all(parts, items, path, session="1", seconds=60.0, **arguments):
    """Run items in this process."""
    return parts.run_items(
        lambda: items,
        parts.Records(path, session),
        time.time() + seconds,
        arguments.get("is_broken", lambda: False),
        lambda: None,
    )


def test_what_fails_leaves_the_others_and_is_tried_last_in_the_next_session(
    parts, tmp_path
) -> None:
    path, order, fails = tmp_path / "a.json", [], [True]

    def first():
        order.append("first")
        if fails[0]:
            raise ValueError("no such kernel")
        return {"number": 1}

    def second():
        order.append("second")
        return {"number": 2}

    items = [parts.Item("first", first), parts.Item("second", second)]
    assert run_all(parts, items, path) == 0
    found = parts.Records(path).load()
    assert "no such kernel" in found["first"]["error"]
    assert found["second"]["number"] == 2
    fails[0] = False
    items.append(parts.Item("third", lambda: order.append("third") or {"number": 3}))
    assert run_all(parts, items, path, session="2") == 0
    assert order == ["first", "second", "third", "first"]
    assert parts.Records(path).load()["first"]["number"] == 1


def test_no_item_is_begun_without_its_time(parts, tmp_path) -> None:
    path = tmp_path / "a.json"
    items = [parts.Item("long", lambda: {}, 100.0), parts.Item("short", lambda: {}, 1.0)]
    run_all(parts, items, path, seconds=50.0)
    assert set(parts.Records(path).load()) == {"short"}


def test_a_device_that_is_broken_ends_the_process(parts, tmp_path) -> None:
    def fail():
        raise RuntimeError("an illegal memory access")

    items = [parts.Item("first", fail), parts.Item("second", lambda: {})]
    path = tmp_path / "a.json"
    assert run_all(parts, items, path, is_broken=lambda: True) == parts.BROKEN
    assert set(parts.Records(path).load()) == {"first"}


def test_what_a_dead_process_had_begun_is_an_error_and_what_a_limit_stopped_is_not(
    parts, tmp_path
) -> None:
    records = parts.Records(tmp_path / "a.json", "1")
    records.begin("first")
    assert not records.begin("first")  # another process of the same session
    records.end_begun("The process ended with status -11")
    assert "-11" in records.load()["first"]["error"]
    later = parts.Records(tmp_path / "a.json", "2")
    later.begin("second")
    later.end_begun(None)
    assert later.load()["second"]["state"] == "stopped"
    assert not parts.is_done(later.load()["second"])


def test_longer_texts_are_bisected_and_known_ones_left_out(parts) -> None:
    from gpu_parts.quiet_star import bisecting, is_unknown

    values = tuple(range(1, 12))
    order = bisecting(values)
    assert sorted(order) == list(values)
    assert order[:3] == [6, 3, 9]
    for most in range(12):  # what fits
        records = {}
        for length in order:
            if is_unknown(length, records):
                fits = length <= most
                records[f"split {length}"] = {} if fits else {"error": "CUDA out of memory."}
        known = [int(name.split()[1]) for name, r in records.items() if parts.is_done(r)]
        assert max(known, default=0) == most
        assert len(records) <= 4


def test_tables_say_what_was_not_measured_ran_out_of_memory_or_failed(parts, tmp_path) -> None:
    from gpu_parts.report import write_report

    results = tmp_path / "gpu"
    write_report(results)
    text = results.with_suffix(".md").read_text()
    assert "No card has been measured" in text
    assert "| STaR (target 10 GB) | not measured |" in text
    record = {"tokens_per_second": 1234.5, "first_seconds": 2.0}
    items = {
        "eager nf4 32": record,
        "graphs nf4 32": {"error": "torch.OutOfMemoryError: CUDA out of memory."},
        "generate nf4 32": {"error": "Traceback:\nValueError: no such kernel"},
    }
    content = {"date": "2026-11-26", "python": "3.12.3", "versions": {}, "items": items}
    (results / "a-card").mkdir(parents=True)
    (results / "a-card" / "a.json").write_text(json.dumps(content))
    write_report(results)
    text = results.with_suffix(".md").read_text()
    assert "| nf4 | 32 | 1234 [2.0] | out of memory | failed | not measured |" in text
    assert "- generate nf4 32 failed: `ValueError: no such kernel`" in text


@pytest.mark.slow
def test_a_part_runs_at_toy_size_on_a_cpu(tmp_path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--parts", "a"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "gpu")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    items = json.loads((tmp_path / "gpu" / "cpu" / "a.json").read_text())["items"]
    assert {"star", "spin", "eager nf4 8", "generate 16-bit 8"} <= set(items)
    assert not [record["error"] for record in items.values() if "error" in record]
    assert items["spin"]["peaks"]["scoring"]["allocated"] > 0
