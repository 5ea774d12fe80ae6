"""Sampling through Ray against in process, on one machine; and why not through Ray Data.

One worker on one CPU and the in-process sampler draw the same shards of the demo's prompts in turn, in
float32 on one thread each, until either side has sampled for `--minutes`. The start of the worker is
measured apart. `--ray-data` measures what a pool of Ray Data's does instead: the start of each
execution, and what becomes of the batches of a node that goes, with workers that wait in place of a model.

    OMP_NUM_THREADS=1 python benchmarks/ray_overhead.py --minutes 10
    OMP_NUM_THREADS=1 python benchmarks/ray_overhead.py --ray-data

Prints what stands in results/ray.md.
"""

import argparse
import datetime
import logging
import time
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_selfplay.demos.words import demo_split, load_demo_model_path
from trl_selfplay.generation.engine import EngineSettings, EngineWeights
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.ray_cluster import RayCluster
from trl_selfplay.generation.ray_sampler import PoolSettings, RaySampler
from trl_selfplay.generation.ray_worker import RayWorker, WorkerPlan, describe_folder
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

SAMPLES_PER_PROMPT = 4
BATCHES_PER_SHARD = 4


def prompts_of(tokenizer: Any) -> list[tuple[int, ...]]:
    """Return the demo's prompts as tokens."""
    split = demo_split()
    return [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}],
                add_generation_prompt=True,
                return_dict=True,
            )["input_ids"]
        )
        for part in (split.train, split.report)
        for row in part
    ]


def measure_overhead(minutes: float, batch_size: int, length: int) -> None:
    """Draw shards on both sides in turn, and print the seconds of each."""
    source = load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    traits = describe_model(model)
    own = TransformersSampler(model, tokenizer, traits=traits)
    weights = EngineWeights(str(source), None, 0, 0)
    plan = WorkerPlan(tokenizer, traits, "cpu", EngineSettings(dtype="float32"))
    over_ray = RaySampler(RayCluster(), plan, PoolSettings(1), lambda: weights, print)
    eos = tokenizer.eos_token_id
    options = SamplingOptions(length, eos_token_ids=(eos,))
    prompts = prompts_of(tokenizer)
    began = time.monotonic()
    list(over_ray.sample([SampleRequest(prompts[0], 0)], options, 1))
    start_s = time.monotonic() - began
    list(own.sample([SampleRequest(prompts[0], 0)], options, 1))
    seconds: dict[str, list[float]] = {"own": [], "ray": []}
    shard, size = 0, BATCHES_PER_SHARD * batch_size
    while min(sum(each) for each in seconds.values()) < 60 * minutes:
        requests = [
            SampleRequest(prompts[i // SAMPLES_PER_PROMPT % len(prompts)], i)
            for i in range(shard * size, (shard + 1) * size)
        ]
        drawn = {}
        sides = [("own", own), ("ray", over_ray)]
        for name, sampler in sides if shard % 2 == 0 else reversed(sides):
            began = time.monotonic()
            drawn[name] = {
                i: each.completion_ids for i, each in sampler.sample(requests, options, batch_size)
            }
            seconds[name].append(time.monotonic() - began)
        assert drawn["own"] == drawn["ray"]
        shard += 1
        print(shard, {name: round(each[-1], 2) for name, each in seconds.items()}, flush=True)
    over_ray.release()
    ratio = [r / o for r, o in zip(seconds["ray"], seconds["own"], strict=True)]
    totals = {name: sum(each) for name, each in seconds.items()}
    print(
        f"\n{_machine()}; {shard} shards of {size} samples, at most {length} tokens each, batches of "
        f"{batch_size}; all samples equal.\nStart: {start_s:.1f} s (Ray, one worker, one sample). In "
        f"process {totals['own']:.1f} s, through Ray {totals['ray']:.1f} s: "
        f"{100 * (totals['ray'] / totals['own'] - 1):+.1f} %; shard by shard the median is "
        f"{100 * (median(ratio) - 1):+.1f} %, from {100 * (min(ratio) - 1):+.1f} to "
        f"{100 * (max(ratio) - 1):+.1f} %."
    )


class LoadingWorker:
    """Of Ray Data: loads the demo's model, and samples nothing."""

    def __init__(self, plan: WorkerPlan, weights: EngineWeights) -> None:
        folder = describe_folder(weights.model)
        RayWorker(plan).load(weights, [folder], {})

    def __call__(self, batch: Any) -> Any:
        """Return the batch."""
        return batch


class WaitingWorker:
    """Waits as a model would; of Ray Data, and of an actor."""

    def __call__(self, batch: Any) -> Any:
        """Return the batch half a second later."""
        time.sleep(0.5)
        return batch


def measure_ray_data() -> None:
    """Print the seconds to the first batch of an execution, and the batches' order when a node goes."""
    import ray
    from ray.cluster_utils import Cluster

    source = load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    plan = WorkerPlan(tokenizer, describe_model(model), "cpu", EngineSettings(dtype="float32"))
    weights = EngineWeights(str(source), None, 0, 0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    print(_machine())
    for _ in range(2):
        began = time.monotonic()
        data = ray.data.from_items(list(range(4)), override_num_blocks=4).map_batches(
            LoadingWorker,
            fn_constructor_args=(plan, weights),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0.4,
        )
        next(iter(data.iter_batches(batch_size=None, prefetch_batches=0)))
        print(f"Ray Data, one execution: first batch after {time.monotonic() - began:.1f} s")
        del data
    began = time.monotonic()
    data = ray.data.from_items(list(range(40)), override_num_blocks=40).map_batches(
        WaitingWorker, batch_size=None, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=0.9
    )
    order: list[int] = []
    for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
        order += map(int, batch["item"])
        if len(order) == 6:
            cluster.remove_node(second)
            print(f"a node of two went after {time.monotonic() - began:.1f} s")
    print(f"all 40 batches after {time.monotonic() - began:.1f} s, in the order {order}")
    ray.shutdown()
    cluster.shutdown()


def _machine() -> str:
    return (
        f"{datetime.date.today()}; {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {version('transformers')}, ray {version('ray')}"
    )


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of sampling on either side")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="maximum tokens per completion")
    parser.add_argument("--ray-data", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if arguments.ray_data:
        measure_ray_data()
    else:
        measure_overhead(arguments.minutes, arguments.batch_size, arguments.length)


if __name__ == "__main__":
    main()
