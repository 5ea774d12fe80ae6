"""Ray's connection of a process, and a cluster of two nodes of which one goes."""

import pytest
from processes import call

from trl_selfplay.generation.ray_cluster import RayCluster


def connect_and_leave() -> None:
    """A thread that ends doesn't take a local Ray with it, and the last to leave closes it."""
    import signal
    from threading import Thread

    before = signal.getsignal(signal.SIGTERM)
    first, second = RayCluster(), RayCluster()
    thread = Thread(target=first.connect)
    thread.start()
    thread.join()
    ray = second.connect()
    first.release()
    first.release()
    assert ray.get(ray.remote(num_cpus=0.1)(lambda: 8).remote()) == 8
    assert signal.getsignal(signal.SIGTERM) is before
    second.release()
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_local_ray_lives_until_the_last_one_leaves(monkeypatch) -> None:
    pytest.importorskip("ray", reason='needs Ray: pip install "trl-selfplay[ray]"')
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert call(connect_and_leave) == 0


def sample_while_a_node_goes(folder: str) -> None:
    """Sample on two nodes with one worker each, and remove one of them after the first completion."""
    import torch
    from ray.cluster_utils import Cluster
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_selfplay.generation.engine import EngineSettings, EngineWeights
    from trl_selfplay.generation.model_traits import describe_model
    from trl_selfplay.generation.ray_sampler import PoolSettings, RaySampler
    from trl_selfplay.generation.ray_worker import WorkerPlan
    from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
    from trl_selfplay.generation.transformers_sampler import TransformersSampler

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = [SampleRequest((16, 4 + i % 9, 13, 5), i) for i in range(200)]
    options = SamplingOptions(200, eos_token_ids=())
    expected = {
        index: each.completion_ids
        for index, each in TransformersSampler(model, tokenizer).sample(requests, options, 16)
    }
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    plan = WorkerPlan(tokenizer, describe_model(model), "cpu", EngineSettings(dtype="float32"))
    weights = EngineWeights(folder, None, 0, "first")
    sampler = RaySampler(RayCluster(cluster.address), plan, PoolSettings(2, 0.9), lambda: weights)
    drawn, is_removed = {}, False
    for _ in range(2):  # by the second time, both workers have started
        for index, each in sampler.sample(requests, options, 16):
            drawn[index] = each.completion_ids
            if not is_removed and sum(bool(worker.numbers) for worker in sampler._workers) == 2:
                cluster.remove_node(second)
                is_removed = True
        assert drawn == expected
        drawn.clear()
    assert is_removed
    sampler.release()
    cluster.shutdown()


@pytest.mark.full
def test_samples_are_the_same_if_a_node_goes(saved_tiny_model) -> None:
    pytest.importorskip("ray", reason='needs Ray: pip install "trl-selfplay[ray]"')
    assert call(sample_while_a_node_goes, str(saved_tiny_model)) == 0
