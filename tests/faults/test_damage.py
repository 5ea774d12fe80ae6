"""A file of a run that is damaged or gone is made again, or named with what is lost or what to do."""

import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from fault_events import Fault, short_name
from fault_runs import run
from processes import call
from survival import find_difference, run_whole

logger = logging.getLogger(__name__)

DAMAGES = {
    "torn": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "garbled": lambda content: bytes(255 - byte for byte in content),
    "deleted": None,
}
# Round 0 is finished, and round 1 trained for two of its steps.
STOP = Fault("saved", 5)
# What a round's line says of it in comparison with earlier rounds.
COMPARISONS = ("metrics", "detectors")
WARNING = "compared|counted"

# A few files for CI: where, the damage, and how the run goes on.
CASES = {
    "STaR": [
        ("config.json", "torn", "named"),
        ("initial/trainable.safetensors", "garbled", "named"),
        ("rounds.jsonl", "torn", "equal"),
        ("round-000/evaluation/sampled-00000.parquet", "deleted", "told"),
        ("round-000/evaluation/greedy-00000.parquet", "torn", "equal"),
        ("round-000/samples/00000.parquet", "garbled", "told"),
        ("round-000/samples/hint-plan.json", "deleted", "told"),
        ("round-000/selection.parquet", "torn", "told"),
        ("round-001/checkpoint-2/optimizer.pt", "torn", "equal"),
        ("round-001/samples/00001.parquet", "deleted", "equal"),
        ("round-001/selection.parquet", "emptied", "equal"),
    ],
    "SPIN": [
        ("rendering.json", "emptied", "named"),
        ("round-000/model/adapter_model.safetensors", "deleted", "named"),
        ("round-001/dataset/state.json", "garbled", "equal"),
    ],
}


def files_of_each_kind(folder: Path) -> list[str]:
    """Return the last file of `_rounds` for each name and round, numbers aside."""
    rounds = folder / "_rounds"
    paths = sorted(p.relative_to(rounds) for p in rounds.rglob("*") if p.is_file())
    return list({(path.parts[0], short_name(str(path))): str(path) for path in paths}.values())


@pytest.fixture
def stop(fault_base):
    """Return a function that makes a whole run and one that stopped."""

    def stop(name):
        stopped = fault_base / "stopped"
        call(run, str(stopped), name, str(fault_base / "inputs"), STOP, log=fault_base / "log")
        return stopped, run_whole(fault_base, name)

    return stop


@pytest.fixture
def go_on(fault_base):
    """Return a function that damages one file of a copy, goes on and says what came of it.

    "equal": like a run that nothing stopped. "told": the same but for comparisons with earlier
    rounds, of which a warning names the file. "named": an error names the file, and what to do.
    """

    def go_on(name, stopped, whole, file, damage):
        folder, log = fault_base / "damaged", fault_base / "damaged.log"
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
        shutil.copytree(stopped, folder)
        path, change = folder / "_rounds" / file, DAMAGES[damage]
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))
        code = call(run, str(folder), name, str(fault_base / "inputs"), None, log=log)
        printed = log.read_text()
        if code != 0:
            error = re.sub("(?m)^  .*\n", "", printed.rpartition("Traceback (most")[2])
            says = re.search("bring it back|delete|restore it", error, re.IGNORECASE)
            names = str(path) in error or f"{path.parent} " in error
            return "named" if names and says else f"unclear: {error}"
        if (whole / "_rounds" / file).exists():  # what is no longer needed stays as it is
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(whole / "_rounds" / file, path)
        if find_difference(whole, folder) is None:
            return "equal"
        lines = printed.splitlines()
        warned = [line for line in lines if str(path) in line and re.search(WARNING, line)]
        take_comparisons(whole, folder)
        difference = find_difference(whole, folder)
        return "told" if warned and difference is None else f"differs: {difference}, {warned}"

    return go_on


def take_comparisons(whole: Path, folder: Path) -> None:
    """Let a run's lines have the comparisons of another's."""
    paths = [each / "_rounds" / "rounds.jsonl" for each in (whole, folder)]
    expected, found = ([json.loads(t) for t in p.read_text().splitlines()] for p in paths)
    for line, other in zip(found, expected, strict=True):
        line |= {key: other[key] for key in COMPARISONS if key in other}
    paths[1].write_text("".join(json.dumps(line) + "\n" for line in found))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_is_mended_or_named(name, stop, go_on) -> None:
    stopped, whole = stop(name)
    found = [(*case[:2], go_on(name, stopped, whole, *case[:2])) for case in CASES[name]]
    assert found == CASES[name]


@pytest.mark.full
@pytest.mark.parametrize("name", ["STaR", "SPIN", "ReST^EM"])
def test_each_damaged_file_is_mended_or_named(name, stop, go_on) -> None:
    """With `--log-cli-level=INFO` pytest shows each outcome as it comes."""
    stopped, whole = stop(name)
    outcomes = {}
    for file in files_of_each_kind(stopped):
        for damage in DAMAGES:
            outcome = outcomes[file, damage] = go_on(name, stopped, whole, file, damage)
            logger.info("%s: %s %s: %s", name, file, damage, outcome)
    logger.info("%s: %s", name, Counter(o.partition(":")[0] for o in outcomes.values()))
    assert {case: o for case, o in outcomes.items() if o not in ("equal", "told", "named")} == {}
