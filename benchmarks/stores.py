"""What it costs to keep the rounds on S3 as well as on disk.

STaR with a random decoder of 0.8 M parameters on 64 sums, two checkpoints a round; moto's S3 server in a
process of its own on the loopback interface. Runs with and without a store take turns. The files are
small, so this measures the time per object; a real network adds its own, and bytes over its bandwidth.

    OMP_NUM_THREADS=1 python benchmarks/stores.py > benchmarks/results/stores.md
"""

import argparse
import logging
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from trl_selfplay import STaRConfig, STaRTrainer
from trl_selfplay.demos.sums import build_tokenizer
from trl_selfplay.rounds.store import RoundsStore

DATE = date.today().isoformat()
SIZES_MB = (0.1, 1, 10, 100)


@contextmanager
def serving() -> Iterator[None]:
    """Serve S3 on this machine, and tell clients in this process where."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield
    finally:
        server.terminate()
        server.wait()


def make_bucket(name: str) -> str:
    """Make a bucket, and return its name."""
    import boto3

    boto3.client("s3").create_bucket(Bucket=name)
    return name


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Give every second completion a reward, by its length."""
    return [float(len(completion) % 2) for completion in completions]


def build(folder: Path, num_rounds: int, url: str | None) -> STaRTrainer:
    """Return a trainer of a random model."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    rows = [{"prompt": f"{i // 8} + {i % 8} =", "solution": str(i // 8 + i % 8)} for i in range(64)]
    return STaRTrainer(
        model,
        STaRConfig(
            str(folder), num_rounds=num_rounds, num_generations=4, max_completion_length=32,
            temperature=1.0, rationalize=False, max_steps=8, save_steps=4, per_device_train_batch_size=4,
            report_to=[], disable_tqdm=True, use_cpu=True, gradient_checkpointing=False, rounds_dir=url,
        ),
        train_dataset=Dataset.from_list(rows),
        reward_funcs=reward,
        processing_class=tokenizer,
    )  # fmt: skip


def run(folder: Path, num_rounds: int, url: str | None, puts: dict[str, list]) -> float:
    """Return the seconds of a run; note the seconds and bytes of each put."""
    put = RoundsStore.put

    def timed(self: RoundsStore, name: str, path: Path) -> int:
        began = time.perf_counter()
        size = put(self, name, path)
        kind = re.sub(r"\d+", "*", name.partition("/")[2] if name.startswith("round-") else name)
        puts[kind].append((time.perf_counter() - began, size))
        return size

    RoundsStore.put = timed  # type: ignore[method-assign]
    trainer = build(folder, num_rounds, url)
    began = time.perf_counter()
    with redirect_stdout(sys.stderr):
        trainer.train()
    RoundsStore.put = put  # type: ignore[method-assign]
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    puts: dict[str, list[tuple[float, int]]] = defaultdict(list)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with serving(), TemporaryDirectory() as place:
        for pair in range(-1, args.pairs):  # the first one warms up
            for with_store in (False, True) if pair % 2 else (True, False):
                folder = Path(place) / "run"
                url = f"s3://{make_bucket(f'pair-{pair + 1}')}/run" if with_store else None
                took = run(folder, args.rounds, url, puts if pair >= 0 else defaultdict(list))
                if pair >= 0:
                    seconds[with_store].append(took)
                shutil.rmtree(folder)
        print("# Rounds on S3 as well as on disk\n")
        print(__doc__.split("\n\n")[1].replace("\n", " ") + "\n")
        versions = ", ".join(
            f"{n} {version(n)}" for n in ("torch", "trl", "fsspec", "s3fs", "moto")
        )
        print(f"Two shared {platform.machine()} cores, one thread, {versions}, seed 42, {DATE}. Command: "
              f"`OMP_NUM_THREADS=1 python benchmarks/stores.py --pairs {args.pairs} --rounds {args.rounds}`.\n")  # fmt: skip
        print_runs(seconds, puts, args)
        print_puts(RoundsStore(f"s3://{make_bucket('sizes')}/run"), Path(place))


def print_runs(seconds: dict[bool, list[float]], puts: dict[str, list], args: Any) -> None:
    """Print the seconds per round of both, and what was put."""
    print("| rounds | " + " | ".join(f"pair {i}" for i in range(args.pairs)) + " | median |")
    print("|---|" + "---:|" * (args.pairs + 1))
    for with_store, values in seconds.items():
        each = [value / args.rounds for value in values]
        cells = " | ".join(f"{value:.2f}" for value in (*each, statistics.median(each)))
        print(f"| {'on S3 as well' if with_store else 'on disk alone'}, s per round | {cells} |")
    total = sum(s for each in puts.values() for s, _ in each)
    print(
        f"\nputs: {sum(map(len, puts.values()))}, {total / args.pairs / args.rounds:.2f} s per round\n"
    )
    print("| what | puts | median ms | largest ms | kB each |\n|---|---:|---:|---:|---:|")
    for kind, each in sorted(puts.items()):
        times = sorted(s for s, _ in each)
        size = statistics.median(size for _, size in each) / 1e3
        print(f"| `{kind}` | {len(each)} | {1e3 * statistics.median(times):.1f} | {1e3 * times[-1]:.1f} | "
              f"{size:,.1f} |")  # fmt: skip


def print_puts(store: RoundsStore, place: Path) -> None:
    """Print the seconds of a put and of a fetch by size."""
    print("\n| MB | put, s | fetch, s |\n|---:|---:|---:|")
    for size in SIZES_MB:
        path, fetched = place / f"{size}.bin", place / "fetched.bin"
        path.write_bytes(os.urandom(int(size * 1e6)))
        began = time.perf_counter()
        store.put(path.name, path)
        put_s = time.perf_counter() - began
        entry = store.entries()[path.name]
        began = time.perf_counter()
        store.fetch(path.name, entry, fetched)
        print(f"| {size:g} | {put_s:.3f} | {time.perf_counter() - began:.3f} |")
        path.unlink()


if __name__ == "__main__":
    main()
