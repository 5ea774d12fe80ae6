"""The same run in one process and in two: are samples, selection and training set equal, and how long?

STaR with hints, ReST^EM and IRPO, one round each on a random decoder, started as `torchrun` starts processes.
Samples must be equal bit for bit, but for their log-probs, and so must be what became of each, and the rows to
train on in round 0. Seconds are those of the round's sampling and grading, with the start left out. Prints the table of
benchmarks/results/processes.md.

    OMP_NUM_THREADS=1 python benchmarks/processes.py --repeats 3
"""

import argparse
import contextlib
import io
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

DATE = date.today().isoformat()
METHODS = ("STaR", "ReSTEM", "IRPO")
NUM_PROMPTS, NUM_SAMPLES, NUM_TOKENS = 48, 8, 64


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Call a completion right if its number of words is even."""
    return [float(len(completion.split()) % 2 == 0) for completion in completions]


def play(method: str, folder: str) -> None:
    """Run one round in this process, alone or with others."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    import trl_selfplay
    from trl_selfplay.demos.sums import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    config: Any = getattr(trl_selfplay, f"{method}Config")(
        folder, num_rounds=1, num_generations=NUM_SAMPLES, max_completion_length=NUM_TOKENS,
        temperature=1.0, max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
        gradient_checkpointing=False, logging_strategy="no",
    )  # fmt: skip
    rows = [{"prompt": f"{a}+{a + 7}=", "solution": str(2 * a + 7)} for a in range(NUM_PROMPTS)]
    trainer: Any = getattr(trl_selfplay, f"{method}Trainer")(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        reward_funcs=reward,
    )  # fmt: skip
    trainer.self_play.collector.sampler.suggest_batch_size = lambda *lengths: 8
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()


def start(method: str, folder: Path, num_processes: int) -> float:
    """Run a method in some processes; return the seconds of its sampling."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_processes)}
    command = [sys.executable, __file__, "--play", method, str(folder)]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(num_processes)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"{method} in {num_processes} processes ended with {codes}")
    (line,) = (folder / "_rounds/rounds.jsonl").read_text().splitlines()
    return float(json.loads(line)["seconds"]["sample"])


def read_run(folder: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """Return samples without log-probs, what became of each, and the rows that were trained on."""
    import pyarrow.parquet as pq
    from datasets import load_from_disk

    root = folder / "_rounds/round-000"
    samples = [
        {k: v for k, v in row.items() if k != "logprob"}
        for path in sorted((root / "samples").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    rows = load_from_disk(str(root / "dataset"))
    scores = [name for name in rows.column_names if name.startswith("ref_")]  # sums over a batch
    return (
        samples,
        pq.read_table(root / "selection.parquet").to_pylist(),
        rows.remove_columns(scores).to_list(),
    )


def compare(methods: list[str], repeats: int) -> None:
    """Print a line for each method."""
    print(__doc__.split("\n\n")[0] if __doc__ else "")
    print(
        "\n| trainer | runs of each | samples | trained on | identical | 1 process, s | 2 processes, s |"
    )
    print("|---|---|---|---|---|---|---|")
    for method in methods:
        seconds: dict[int, list[float]] = {1: [], 2: []}
        runs = []
        for _ in range(repeats):
            for count in (1, 2):
                with tempfile.TemporaryDirectory() as folder:
                    seconds[count].append(start(method, Path(folder), count))
                    runs.append(read_run(Path(folder)))
        same = all(run == runs[0] for run in runs)
        print(
            f"| {method} | {repeats} | {len(runs[0][0]):,} | {len(runs[0][2]):,} | {'yes' if same else 'NO'} | "
            f"{median(seconds[1]):.1f} | {median(seconds[2]):.1f} |",
            flush=True,
        )
    print(
        f"\n`python benchmarks/processes.py --repeats {repeats}`: medians. Two shared {platform.machine()} cores, one "
        f"thread per process; torch {version('torch')}, transformers {version('transformers')}; {DATE}."
    )


def main() -> None:
    """Read the flags, and compare; or play one run, as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--play", nargs=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.play:
        play(*arguments.play)
    else:
        compare(arguments.methods, arguments.repeats)


if __name__ == "__main__":
    main()
