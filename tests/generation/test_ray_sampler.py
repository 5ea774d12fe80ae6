"""Workers on a Ray cluster: whose samples, and what becomes of those of a worker that is lost."""

import os
import socket
import time
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from local_ray import SHARE

from trl_selfplay.generation import ray_cluster, ray_worker
from trl_selfplay.generation.engine import EngineSettings, EngineWeights
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.ray_cluster import RayCluster
from trl_selfplay.generation.ray_sampler import PoolSettings, RaySampler, _Worker
from trl_selfplay.generation.ray_worker import RayWorker, WorkerPlan, describe_folder
from trl_selfplay.generation.request_queue import RequestQueue
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.generation.vllm_process import EngineFailure

OPTIONS = SamplingOptions(48, eos_token_ids=(1,), return_logprobs=True)
REQUESTS = [SampleRequest((16, 4 + i % 9, 13, 5), 1000 + i) for i in range(40)]


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def drawn(completions):
    """Tokens by request; summed log-probs differ in the last bits with what is in a batch."""
    return {
        index: (each.completion_ids, each.finish, pytest.approx(each.logprob, abs=1e-4))
        for index, each in completions
    }


@pytest.fixture
def model(tiny_model, word_tokenizer):
    return tiny_model(word_tokenizer)


@pytest.fixture
def plan(model, word_tokenizer) -> WorkerPlan:
    return WorkerPlan(word_tokenizer, describe_model(model), "cpu", EngineSettings(dtype="float32"))


@pytest.fixture
def build(plan, saved_tiny_model):
    """Build a sampler over a pool; it is released at the end."""
    built = []

    def build(num_workers=2, num_cpus=SHARE, **changes) -> RaySampler:
        weights = EngineWeights(str(saved_tiny_model), None, 0, "first")
        pool = PoolSettings(num_workers, num_cpus)
        sampler = RaySampler(RayCluster(), replace(plan, **changes), pool, lambda: weights)
        built.append(sampler)
        return sampler

    yield build
    for sampler in built:
        sampler.release()


@pytest.mark.slow
def test_samples_are_those_of_the_model_also_if_a_worker_is_killed(
    local_ray, build, model, word_tokenizer, worker_processes
) -> None:
    import ray

    torch.set_num_threads(1)
    in_process = list(TransformersSampler(model, word_tokenizer).sample(REQUESTS, OPTIONS, 8))
    expected = drawn(in_process)
    sampler = build()
    while len(worker_processes()) < 2:  # one worker may do everything while the other starts
        assert drawn(sampler.sample(REQUESTS, OPTIONS, 8)) == expected
    # Requests of an iterator, and a worker that dies amid its own.
    tokens = []
    completions = sampler.sample(iter(REQUESTS), OPTIONS, 8, tokens.append)
    first = list(islice(completions, 1))
    worker_processes()[0].kill()
    assert drawn([*first, *completions]) == expected
    assert sum(tokens) == sum(len(each.completion_ids) for _, each in in_process)
    # What was interrupted leaves nothing behind.
    next(sampler.sample(REQUESTS, OPTIONS, 8))
    sampler.release()
    assert ray.is_initialized(), "the test has made the connection, and the sampler closed it"


@pytest.mark.slow
def test_the_only_worker_is_replaced_however_old_the_pool_is(
    local_ray, build, worker_processes, monkeypatch
) -> None:
    """Its replacement gets as long as the first one got, an hour later too."""
    sampler = build(num_workers=1)
    expected = drawn(sampler.sample(REQUESTS, OPTIONS, 8))
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 3600)
    worker_processes()[-1].kill()
    assert drawn(sampler.sample(REQUESTS, OPTIONS, 8)) == expected


@pytest.mark.parametrize(
    ("looks", "has_worker", "patience_s"),
    [
        ("", False, 3),
        ("...", False, 0),
        ("..x", False, 3),
        ("..x.x..", False, 1),
        (8 * ".", True, 3),
    ],
)
def test_only_seconds_without_news_and_without_a_worker_use_up_the_patience(
    plan, monkeypatch, looks, has_worker, patience_s
) -> None:
    """Looks with news are "x"; the time between looks, in which others grade, doesn't count."""
    coming = iter(looks)
    sampler = RaySampler(RayCluster(), plan, PoolSettings(1, start_patience_s=3.0), lambda: None)
    worker = _Worker(None, "first" if has_worker else None)
    sampler._workers = [worker]
    sampler._ray = SimpleNamespace(
        wait=lambda awaited, **_: (awaited if next(coming, ".") == "x" else [], []),
        exceptions=None,
        available_resources=dict,
    )
    monkeypatch.setattr(sampler, "_read", lambda *_: [])

    def look() -> None:
        sampler._awaited = {"answer": worker}
        sampler._receive(None)

    for _ in looks:
        look()
    worker.version = None  # if it was there, it is lost, and the next one is starting
    for _ in range(patience_s):
        look()
    with pytest.raises(EngineFailure, match="no Ray worker has started within 4 s"):
        look()


@pytest.mark.slow
def test_workers_that_always_die_end_in_an_error(local_ray, build) -> None:
    sampler = build(num_workers=1, tokenizer=Deadly())
    with pytest.raises(
        EngineFailure, match=r"(?s)3 Ray workers were lost .*What is sampled is kept"
    ):
        dict(sampler.sample(REQUESTS, OPTIONS, 8))


@pytest.mark.slow
def test_workers_that_fit_no_node_end_in_an_error(local_ray, build) -> None:
    with pytest.raises(EngineFailure, match="needs 64 CPU; the nodes have: 2 CPU"):
        dict(build(num_cpus=64).sample(REQUESTS, OPTIONS, 8))


@pytest.mark.slow
@pytest.mark.parametrize("is_mute", [False, True], ids=["nobody", "something else"])
def test_an_address_that_does_not_answer_is_told_within_seconds(is_mute, monkeypatch) -> None:
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "trl-selfplay[ray]"')
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster, "_PATIENCE_S", 5.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if is_mute:
            listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"ray_address='{address}'"):
            RayCluster(address).connect()


def test_a_worker_refuses_weights_that_it_has_not(plan) -> None:
    with pytest.raises(RuntimeError, match="has weights None and is to sample with 'second'"):
        list(RayWorker(plan).sample("second", REQUESTS, OPTIONS, 8))


def test_a_node_without_the_folder_samples_from_a_copy(
    plan, saved_tiny_model, tmp_path, monkeypatch, model, word_tokenizer
) -> None:
    """What lies at the same path there, but holds other weights, isn't taken."""
    monkeypatch.setattr(ray_worker.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = describe_folder(saved_tiny_model)
    content = {file.name: file.read_bytes() for file in ray_worker.files_of(saved_tiny_model)}
    worker = RayWorker(plan)
    assert worker.lacks([folder]) == []
    weights = saved_tiny_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert worker.lacks([folder]) == [folder]
    first = EngineWeights(str(saved_tiny_model), None, 0, "first")
    record = worker.load(first, [folder], {folder.path: content})
    assert record["sampler"] == "transformers"
    assert worker.lacks([folder]) == []
    groups = list(worker.sample("first", REQUESTS, OPTIONS, 8))
    expected = TransformersSampler(model, word_tokenizer).sample(REQUESTS, OPTIONS, 8)
    assert drawn(pair for group in groups for pair in group) == drawn(expected)
    worker.close()
    assert worker.lacks([folder]) == [folder]


def test_a_queue_tells_how_many_requests_wait() -> None:
    queue = RequestQueue(REQUESTS, None)
    queue.take(3, lambda _: True)
    assert len(queue) == len(REQUESTS) - 3
