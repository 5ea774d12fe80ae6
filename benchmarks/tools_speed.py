"""How much faster trajectories with tools are side by side than one after the other.

A model writes 64 trajectories of three turns; the length of each turn is drawn from 8 to 40 tokens by its stream
key, and each of the first two ends with a call of a tool that takes 200 ms. A prompt has about 200 tokens, nearly
all of which describe tools. The models are the demo's, and one of two layers, whose decoding takes next to no
time. The arms alternate in one process. "One after the other" begins a trajectory when the one before has ended;
8 are measured, and count eight times. What is finished is in results/tools_speed/ and isn't measured again:

    OMP_NUM_THREADS=1 python benchmarks/tools_speed.py

`--before CHECKOUT` measures single turns instead, as they were with another checkout of the package, in processes
that alternate, and says whether the samples are equal.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sampling import EndsWhereTold
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trl_selfplay.demos.words import load_demo_model_path
from trl_selfplay.generation import transformers_sampler
from trl_selfplay.generation.decode_batch import DecodeBatch
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

RESULTS = Path(__file__).parent / "results" / "tools_speed" / "arms.json"
COUNT, TOOL_S, CALLS, LEAST, MOST = 64, 0.2, 2, 8, 40
ONE_BY_ONE = 8
DESCRIPTION = (
    "You may call tools. search(query) looks a name up in an encyclopedia and returns the first lines of what it "
    "finds. calculator(expression) returns the value of an arithmetic expression. calendar(day) returns what "
    "happened on a day. To call a tool, write a line with its name and its argument in brackets, then stop: the "
    "result follows on the next line. Think before you call a tool, and after you have read its result. When you "
    "know the answer, write it on a line of its own and end. "
) * 2


def wait(number: int) -> str:
    """Take as long as a search over a network.

    Args:
        number: Anything.
    """
    began = time.perf_counter()  # of the machine, and not of the process
    time.sleep(TOOL_S)
    return f"{began} {time.perf_counter()}: the answer to {number} is in the next volume."


class DrawnLengths(dict[int, int]):
    """The length of each turn by its key."""

    def __missing__(self, key: int) -> int:
        return LEAST + key % (MOST - LEAST + 1)


@contextmanager
def told_lengths(eos: int) -> Iterator[None]:
    """Let each turn end at its length."""
    EndsWhereTold.eos, EndsWhereTold.lengths = eos, DrawnLengths()
    plain, transformers_sampler.TokenChooser = transformers_sampler.TokenChooser, EndsWhereTold
    try:
        yield
    finally:
        transformers_sampler.TokenChooser = plain


class Clock:
    """When tokens were decoded, when tools ran, and how long prompts were computed."""

    def __init__(self) -> None:
        self.decoded: list[tuple[float, int]] = []
        self.calls: list[tuple[float, float]] = []
        self.prefill_s, self.prefilled = 0.0, 0

    def on_tokens(self, count: int) -> None:
        """Note what a step added."""
        self.decoded.append((time.perf_counter(), count))

    def read_calls(self, messages: Iterable[Any]) -> None:
        """Note when the tools of a trajectory ran, which they say themselves."""
        for message in messages:
            if message["role"] == "tool":
                began, ended = message["content"].partition(":")[0].split()
                self.calls.append((float(began), float(ended)))

    @contextmanager
    def times_prefills(self) -> Iterator[None]:
        """Note the time of prompts, and their tokens."""
        plain = DecodeBatch._prefill

        def prefill(batch: Any, prompts: Any, pad_token_id: int, prefix: Any) -> None:
            started = time.perf_counter()
            plain(batch, prompts, pad_token_id, prefix)
            self.prefill_s += time.perf_counter() - started
            shared = 0 if prefix is None else len(prefix.token_ids)
            self.prefilled += sum(len(prompt) - shared for prompt in set(prompts))

        DecodeBatch._prefill = prefill  # type: ignore[method-assign]
        try:
            yield
        finally:
            DecodeBatch._prefill = plain  # type: ignore[method-assign]

    def while_tools_run(self) -> tuple[float, float]:
        """Return for how long at least one tool ran, and how many tokens were decoded in that time.

        The tokens of a step are spread over the time since the step before.
        """
        spans: list[list[float]] = []
        for start, end in sorted(self.calls):
            if spans and start <= spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([start, end])
        tokens = 0.0
        for (since, _), (at, n) in pairwise(self.decoded):
            shared = sum(max(0.0, min(at, b) - max(since, a)) for a, b in spans)
            tokens += n * shared / (at - since)
        return sum(b - a for a, b in spans), tokens


class EachTurnCalls:
    """A dialogue in which each turn is a call, for a model that makes none of its own accord."""

    stop_strings = ()

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def read(self, turn_ids: Any, prefix_ids: Any, schemas: Any) -> Any:
        """Return a turn as a call."""
        from trl_selfplay.tools.record import Reply, ToolCall

        call = ToolCall("wait", {"number": len(prefix_ids)})
        return Reply({"role": "assistant", "content": ""}, (call,))

    def observation_ids(self, turn_ids: Any, results: Any) -> tuple[int, ...]:
        """Return the tokens of a result."""
        return tuple(self._tokenizer.encode(f"\n{results[0].content}\n"))


def measure(model: Any, tokenizer: Any, arm: str) -> dict[str, float]:
    """Sample the trajectories once; return seconds and counts."""
    from trl_selfplay.tools.tool_set import ToolSet
    from trl_selfplay.tools.trajectories import Trajectories

    requests = [
        SampleRequest(tuple(tokenizer(f"{DESCRIPTION}\nQuestion {i}: what is it?\n").input_ids), i)
        for i in range(COUNT)
    ]
    options = SamplingOptions(512, eos_token_ids=(tokenizer.eos_token_id,))
    if arm == "one after the other":
        requests = requests[:ONE_BY_ONE]
    scale = COUNT / len(requests)
    clock = Clock()
    trajectories = Trajectories(ToolSet([wait], 60.0), EachTurnCalls(tokenizer), CALLS)
    inner = TransformersSampler(model, tokenizer)
    advance = DecodeBatch.advance
    if arm == "asked when one ends":  # and not at each step
        DecodeBatch.advance = lambda batch, one_step=False: advance(batch)  # type: ignore[method-assign]
    started = time.perf_counter()
    try:
        with told_lengths(tokenizer.eos_token_id), clock.times_prefills():
            groups = [[r] for r in requests] if arm == "one after the other" else [requests]
            found = []
            for group in groups:
                sampler = trajectories.over(inner)
                found += [c for _, c in sampler.sample(group, options, COUNT, clock.on_tokens)]
    finally:
        DecodeBatch.advance = advance  # type: ignore[method-assign]
    seconds = time.perf_counter() - started
    for completion in found:
        clock.read_calls(completion.messages)
    tools_s, tokens_beside = clock.while_tools_run()
    assert len(clock.calls) == CALLS * len(requests)
    return {
        "seconds": seconds * scale,
        "tokens": sum(n for _, n in clock.decoded) * scale,
        "prompt_tokens": sum(len(r.prompt_ids) for r in requests) * scale,
        "prefilled": clock.prefilled * scale,
        "prefill_s": clock.prefill_s * scale,
        "tools_s": tools_s * scale,
        "tokens_while_tools_run": tokens_beside * scale,
    }


DEMO, SMALL = "SmolLM2-135M-Instruct", "two random layers"
ARMS = ("side by side", "asked when one ends", "one after the other")


def single_turns() -> None:
    """Print the tokens per second of CPU time of single turns, and a digest of what was sampled.

    Of the small model, of which a step costs least, so that what comes beside it shows.
    """
    model, tokenizer = load(SMALL)
    requests = [
        SampleRequest(tuple(tokenizer(f"{DESCRIPTION}Question {i // 4}:").input_ids), i)
        for i in range(COUNT)
    ]
    options = SamplingOptions(512, eos_token_ids=(tokenizer.eos_token_id,))
    with told_lengths(tokenizer.eos_token_id):
        sampler = TransformersSampler(model, tokenizer)
        list(sampler.sample(requests[:8], options, 8))
        seconds = []
        for _ in range(7):
            started = time.process_time()
            found = dict(sampler.sample(requests, options, 24))
            seconds.append(time.process_time() - started)
    ids = [found[i].completion_ids for i in range(COUNT)]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
    print(json.dumps({"rate": sum(map(len, ids)) / min(seconds), "digest": digest}))


def compare_single_turns(before: Path, repeats: int) -> dict[str, Any]:
    """Run `single_turns` with both checkouts in turn."""
    trees = {"before": before, "now": Path(__file__).parents[1]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for _ in range(repeats):
        for name, tree in trees.items():
            out = subprocess.run(
                [sys.executable, __file__, "--single-turns"],
                env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True, check=True,
            )  # fmt: skip
            found[name].append(json.loads(out.stdout.splitlines()[-1]))
    return {
        "rates": {name: [each["rate"] for each in runs] for name, runs in found.items()},
        "equal": len({each["digest"] for runs in found.values() for each in runs}) == 1,
    }


def load(name: str) -> tuple[Any, Any]:
    """Return a model and the demo's tokenizer."""
    path = load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if name == DEMO:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().eval(), tokenizer


def main() -> None:
    """Measure what isn't measured yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of the arms side by side")
    parser.add_argument("--before", type=Path, help="another checkout, for single turns")
    parser.add_argument("--single-turns", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.single_turns:
        single_turns()
        return
    record: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.before is not None:
        record["single turns"] = compare_single_turns(args.before, args.repeats)
        RESULTS.write_text(json.dumps(record, indent=1))
    else:
        for name in (SMALL, DEMO):
            if name not in record:
                record[name] = measure_model(name, args.repeats)
                RESULTS.write_text(json.dumps(record, indent=1))
    write_summary(record)


def measure_model(name: str, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Measure each arm in turn."""
    model, tokenizer = load(name)
    if name == SMALL:
        measure(model, tokenizer, "side by side")  # starts the processes of the tool
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(repeats):
        for arm in ARMS if name == SMALL else (ARMS[0], ARMS[-1]):
            found[arm].append(measure(model, tokenizer, arm))
            print(name, arm, found[arm][-1], flush=True)
    return found


def write_summary(record: dict[str, Any]) -> None:
    """Write results/tools_speed.md."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("transformers", "torch"))
    lines = [
        "# Trajectories side by side",
        "",
        f"float32, {torch.get_num_threads()} threads, two shared {platform.machine()} "
        f"cores; {versions}; {datetime.date.today().isoformat()}. Script: `benchmarks/tools_speed.py`. "
        f"{COUNT} trajectories with {CALLS} calls each of a tool that takes {TOOL_S * 1000:.0f} ms; one after the other {ONE_BY_ONE} were measured, and count "
        f"{COUNT // ONE_BY_ONE} times. Other work ran on the cores, so compare the arms alone.",
    ]
    for name in (SMALL, DEMO):
        if name not in record:
            continue
        lines += [
            "",
            f"## {name}",
            "",
            "| arm | seconds | times one after the other | tokens per second | while tools run | share of the "
            "time in prompts |",
            "|---|---|---|---|---|---|",
        ]
        slowest = median(run["seconds"] for run in record[name]["one after the other"])
        for arm in ARMS:
            runs = record[name][arm]
            if not runs:
                lines.append(f"| {arm} | not measured | | | | |")
                continue
            seconds = [run["seconds"] for run in runs]
            rate = median(run["tokens"] / run["seconds"] for run in runs)
            beside = median(run["tokens_while_tools_run"] / run["tools_s"] for run in runs)
            share = median(run["prefill_s"] / run["seconds"] for run in runs)
            lines.append(
                f"| {arm} | {median(seconds):.1f} [{min(seconds):.1f}, {max(seconds):.1f}] | "
                f"{slowest / median(seconds):.1f} | {rate:.0f} | {beside:.0f} | {share:.0%} |"
            )
        run = record[name]["side by side"][0]
        lines += [
            "",
            "What all prompts begin with is computed once. Each turn computes the rest of its context again: "
            f"{run['prefilled']:,.0f} tokens, beside {run['tokens']:,.0f} that were sampled.",
        ]
    if "single turns" in record:
        rates, equal = record["single turns"]["rates"], record["single turns"]["equal"]
        told = {name: f"{median(r):.1f} [{min(r):.1f}, {max(r):.1f}]" for name, r in rates.items()}
        lines += [
            "",
            f"Single turns, {COUNT} completions of {SMALL} in batches of 24, before requests were asked for at "
            f"each step and now, in processes that alternate ({len(rates['now'])} each, the best of 7 runs in "
            f"each): {told['before']} and {told['now']} tokens per second of CPU time; the samples are {'equal' if equal else 'NOT equal'}.",
        ]
    lines += [
        "",
        "*Asked when one ends*: a new turn begins when another turn has ended, and not at each step. It makes no "
        "difference here, where turns end often.",
    ]
    RESULTS.parent.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
