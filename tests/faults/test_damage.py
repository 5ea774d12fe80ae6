"""A file of a run that is damaged or gone is made again, or named with what is lost or what to do."""

import json
import logging
import os
import random
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
    "flipped": lambda content: _flip(content, len(content) // 2),
    "deleted": None,
}
# Where runs stop. Of those over rounds, round 0 is finished, and round 1 trained for two of its steps.
STOPS = {
    "STaR": Fault("saved", 5),
    "ReST^EM": Fault("saved", 5),
    "SPIN": Fault("saved", 5),
    "IRPO": Fault("saved", 5),
    "ReST^EM with tools": Fault("saved", 5),
    "ReST^EM with tools, sampling": Fault("turn", 99),
    "agent": Fault("saved", 5),
    "agent, sampling": Fault("sample train", 110),
    "agent, finished": Fault("done"),
    "V-STaR": Fault("saved", 1),
    "V-STaR, trained": Fault("rmtree checkpoint-0"),
    "Quiet-STaR": Fault("saved", 1),
}
MOST_CASES = 120
# What a round's line says of it in comparison with earlier rounds.
COMPARISONS = ("metrics", "detectors")
WARNING = "compared|counted"

# A few files for CI: where, the damage, and how the run goes on.
CASES = {
    "STaR": [
        ("run/_rounds/config.json", "torn", "named"),
        ("run/_rounds/initial/trainable.safetensors", "garbled", "named"),
        ("run/_rounds/rounds.jsonl", "torn", "equal"),
        ("run/_rounds/round-000/evaluation/sampled-00000.parquet", "deleted", "told"),
        ("run/_rounds/round-000/evaluation/greedy-00000.parquet", "torn", "equal"),
        ("run/_rounds/round-000/samples/00000.parquet", "garbled", "told"),
        ("run/_rounds/round-000/samples/00001.parquet", "flipped", "told"),
        ("run/_rounds/round-000/samples/hint-plan.json", "deleted", "told"),
        ("run/_rounds/round-000/selection.parquet", "torn", "told"),
        ("run/_rounds/round-001/checkpoint-2/optimizer.pt", "torn", "equal"),
        ("run/_rounds/round-001/samples/00001.parquet", "deleted", "equal"),
        ("run/_rounds/round-001/selection.parquet", "emptied", "equal"),
    ],
    "SPIN": [
        ("run/_rounds/rendering.json", "emptied", "named"),
        ("run/_rounds/round-000/model/adapter_model.safetensors", "deleted", "named"),
        ("run/_rounds/round-001/dataset/state.json", "garbled", "equal"),
        ("run/_rounds/round-001/dataset/data-00000-of-00001.arrow", "flipped", "equal"),
    ],
    "V-STaR": [
        ("inputs/star/_rounds/round-000/samples/plan.json", "torn", "named"),
        ("run/_rounds/initial/trainable.safetensors", "flipped", "named"),
        ("run/_rounds/round-000/checkpoint-2/adapter_model.safetensors", "flipped", "equal"),
        ("run/merged/model.safetensors", "flipped", "equal"),
        ("run/merged/tokenizer.json", "emptied", "equal"),
    ],
    "Quiet-STaR": [
        ("run/checkpoint-2/quiet_star.json", "garbled", "equal"),
        ("run/checkpoint-2/quiet_star.safetensors", "flipped", "equal"),
    ],
    "ReST^EM with tools, sampling": [
        ("run/_rounds/round-001/samples/00000.steps.jsonl", "garbled", "equal"),
        ("run/_rounds/round-001/samples/00000.steps.jsonl", "torn", "equal"),
    ],
    "agent, sampling": [
        ("run/_rounds/initial/trainable.safetensors", "emptied", "named"),
        ("run/_rounds/observations.jsonl", "torn", "equal"),
    ],
}


def _flip(content: bytes, place: int) -> bytes:
    """Return the content with one bit changed."""
    return content[:place] + bytes(b ^ 1 for b in content[place : place + 1]) + content[place + 1 :]


def files_of_each_kind(base: Path, folder: str) -> list[str]:
    """Return the last file in a folder of `base` for each name and round, numbers aside."""
    paths = sorted(str(p.relative_to(base)) for p in (base / folder).rglob("*") if p.is_file())
    return list({(*re.findall(r"round-\d+|before", p), short_name(p)): p for p in paths}.values())


@pytest.fixture
def stop(request):
    """Return a function that makes a run that stopped, beside what it reads, and a whole one."""

    def stop(name):
        run_name = name.partition(",")[0]
        base = request.getfixturevalue("star_base" if run_name == "V-STaR" else "fault_base")
        stopped = base / "stopped"
        shutil.copytree(base / "inputs", stopped / "inputs")
        call(
            run, str(stopped / "run"), run_name, str(base / "inputs"), STOPS[name], log=base / "log"
        )
        return stopped, run_whole(base, run_name)

    return stop


@pytest.fixture
def go_on(fault_base):
    """Return a function that damages one file of a copy, goes on and says what came of it.

    "equal": like a run that nothing stopped. "told": the same but for comparisons with earlier
    rounds, of which a warning names the file. "named": an error names the file, and what to do.
    """

    def go_on(name, stopped, whole, file, damage):
        case, log = fault_base / "damaged", fault_base / "damaged.log"
        shutil.rmtree(case, ignore_errors=True)
        log.unlink(missing_ok=True)
        shutil.copytree(stopped, case)
        folder, path, change = case / "run", case / file, DAMAGES[damage]
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))
        code = call(
            run, str(folder), name.partition(",")[0], str(case / "inputs"), None, log=log
        )  # fmt: skip
        printed = log.read_text()
        if code != 0:
            error = re.sub("(?m)^  .*\n", "", printed.rpartition("Traceback (most")[2])
            says = re.search("bring it back|delete|restore it", error, re.IGNORECASE)
            names = str(path) in error or f"{path.parent} " in error
            return "named" if names and says else f"unclear: {error}"
        if (undamaged := whole / os.path.relpath(path, folder)).is_file():
            path.parent.mkdir(
                parents=True, exist_ok=True
            )  # what is no longer needed stays as it is
            shutil.copy(undamaged, path)
        difference = find_difference(whole, folder)
        if difference is None:
            return "equal"
        lines = printed.splitlines()
        if warned := [line for line in lines if str(path) in line and re.search(WARNING, line)]:
            take_comparisons(whole, folder)
            difference = find_difference(whole, folder)
        return f"differs: {difference}, {warned}" if difference else "told"

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
@pytest.mark.parametrize("name", STOPS)
def test_each_damaged_file_is_mended_or_named(name, stop, go_on) -> None:
    """With `--log-cli-level=INFO` pytest shows each outcome as it comes."""
    stopped, whole = stop(name)
    files = files_of_each_kind(stopped, "run")
    if name.startswith("V-STaR"):  # which reads the samples of another run
        of_star = files_of_each_kind(stopped, "inputs/star/_rounds")
        files += [file for file in of_star if "/samples/" in file]
    cases = [(file, damage) for file in files for damage in DAMAGES]
    outcomes = {}
    for file, damage in sorted(random.Random(0).sample(cases, min(MOST_CASES, len(cases)))):
        outcome = outcomes[file, damage] = go_on(name, stopped, whole, file, damage)
        logger.info("%s: %s %s: %s", name, file, damage, outcome)
    logger.info("%s: %s", name, Counter(o.partition(":")[0] for o in outcomes.values()))
    assert {case: o for case, o in outcomes.items() if o not in ("equal", "told", "named")} == {}
