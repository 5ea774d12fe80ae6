"""Trajectories over engines: each turn has its own limit, and the tokens are those of the turns alone."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from engines import VLLM_PYTHON, StandIn, needs_vllm, stand_in_text
from local_ray import SHARE
from lora_server import serving_adapters
from patience import ENDS_S
from peft import LoraConfig, get_peft_model
from simple_tools import add

from trl_selfplay.generation import vllm_server
from trl_selfplay.generation.checked_sampler import CheckedSampler
from trl_selfplay.generation.engine import EngineSettings, EngineWeights
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.ray_cluster import RayCluster
from trl_selfplay.generation.ray_sampler import PoolSettings, RaySampler
from trl_selfplay.generation.ray_worker import WorkerPlan
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.generation.vllm_sampler import VLLMSampler
from trl_selfplay.generation.vllm_server import VLLMServerSampler
from trl_selfplay.tools.record import Reply, ToolCall
from trl_selfplay.tools.tool_set import ToolSet
from trl_selfplay.tools.trajectories import Trajectories, turn_key

ENDS, MOST_TURNS, LENGTH = frozenset(range(3, 43)), 3, 36
SEEDS = 2**63 - 1  # the bits of a key that vLLM takes
OPTIONS = SamplingOptions(LENGTH, eos_token_ids=tuple(ENDS), return_logprobs=True)
REQUESTS = [SampleRequest((50 + i % 9, 62, 54), 1000 + i) for i in range(8)]


class EachTurnCalls:
    """A dialogue for models that call nothing of their own accord: each turn asks for a sum."""

    stop_strings = ()

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def read(self, turn_ids, prefix_ids, schemas):
        call = ToolCall("add", {"a": len(turn_ids), "b": 1})
        return Reply({"role": "assistant", "content": "a turn"}, (call,))

    def observation_ids(self, turn_ids, results):
        return tuple(self.tokenizer.encode(f" {results[0].content}\n", add_special_tokens=False))


@dataclass
class Weights:
    """What hands weights that never change to an engine."""

    weights: EngineWeights

    def __call__(self):
        return self.weights

    def forget(self) -> None:
        pass

    def previous(self):
        return None


def over(sampler, tokenizer):
    dialogue = EachTurnCalls(tokenizer)
    return Trajectories(ToolSet([add], ENDS_S), dialogue, MOST_TURNS, 256).over(sampler)


def told(found):
    """What trajectories are, by request."""
    return {
        number: (each.completion_ids, each.completion_mask, each.finish) for number, each in found
    }


def follow(request, tokenizer, write):
    """Return a trajectory, led turn by turn: `write(ids, key, limit)` returns a turn's tokens."""
    ids, mask = [], []
    for turn in range(MOST_TURNS + 1):
        context = (*request.prompt_ids, *ids)
        written = write(context, turn_key(request.stream_key, turn), LENGTH - len(ids))
        ids += written
        mask += [True] * len(written)
        finish = "eos" if written[-1] in ENDS else "length"
        if finish == "length" or turn == MOST_TURNS:
            break
        shown = tokenizer.encode(f" {len(written) + 1}\n", add_special_tokens=False)
        if len(ids) + len(shown) >= LENGTH:
            finish = "length"
            break
        ids += shown
        mask += [False] * len(shown)
    return tuple(ids), None if all(mask) else tuple(mask), finish


def in_process(model, tokenizer, key_bits=2**64 - 1):
    """Trajectories of the model, each turn sampled by itself."""
    sampler = TransformersSampler(model, tokenizer)

    def write(ids, key, limit):
        [(_, turn)] = sampler.sample(
            [SampleRequest(tuple(ids), key & key_bits)],
            replace(OPTIONS, max_completion_length=limit),
            1,
        )
        return turn.completion_ids

    found = {n: follow(request, tokenizer, write) for n, request in enumerate(REQUESTS)}
    assert {finish for _, _, finish in found.values()} == {"eos", "length"}
    assert sum(mask is not None for _, mask, _ in found.values()) > len(REQUESTS) / 2
    return found


def test_trajectories_over_a_checked_engine_that_dies_on_the_way(
    byte_tokenizer, tiny_model, tmp_path, monkeypatch
) -> None:
    """The turns that were lost are written again with the same seeds, and no others."""
    stand_in, text = StandIn(tmp_path, monkeypatch), stand_in_text()
    stand_in.plan(at=9, then="die")
    weights = EngineWeights("a-model", None, 0, "first")
    engine = VLLMSampler(
        EngineSettings(python=stand_in.python, max_num_seqs=8, max_model_length=256),
        lambda: weights, byte_tokenizer, describe_model(tiny_model(byte_tokenizer)),
    )  # fmt: skip

    def score(completions, options):
        return [-len(ids) * math.log(259) for _, ids in completions]

    def write(ids, key, limit):
        source, written = text(ids, key & SEEDS, ""), []
        while len(written) < limit and not (written and written[-1] in ENDS):
            written.append(next(source))
        return written

    checked = CheckedSampler(engine, Weights(weights), score, 1e-3, tmp_path / "engine.json")
    try:
        found = told(over(checked, byte_tokenizer).sample(REQUESTS, OPTIONS, 16))
    finally:
        checked.release()
    assert found == {
        number: follow(request, byte_tokenizer, write) for number, request in enumerate(REQUESTS)
    }
    assert len(stand_in.notes("wrong")) == 1
    assert len(stand_in.notes("engine")) == 2


@pytest.fixture
def saved_model(byte_tokenizer, tiny_model, tmp_path):
    """A model, and its folder."""
    model, folder = (
        tiny_model(byte_tokenizer, initializer_range=0.3, head_dim=64),
        tmp_path / "model",
    )
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return model, folder


def test_trajectories_over_a_server_are_those_of_the_model(
    byte_tokenizer, saved_model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(vllm_server, "_WAIT_S", 0.0)
    model, folder = saved_model
    traits = describe_model(model)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    policy = get_peft_model(model, config)
    policy.save_pretrained(tmp_path / "adapter")
    weights = EngineWeights(str(folder), tmp_path / "adapter", 4, "first")
    with serving_adapters(folder, byte_tokenizer) as server:
        sampler = VLLMServerSampler(server.url, lambda: weights, byte_tokenizer, traits, ENDS_S)
        found = told(over(sampler, byte_tokenizer).sample(REQUESTS, OPTIONS, 5))
    assert found == in_process(policy.eval(), byte_tokenizer, SEEDS)


@pytest.mark.slow
def test_trajectories_over_ray_workers_are_those_of_the_model_if_one_is_killed(
    local_ray, byte_tokenizer, saved_model, worker_processes
) -> None:
    torch.set_num_threads(1)
    model, folder = saved_model
    weights = EngineWeights(str(folder), None, 0, "first")
    settings = EngineSettings(dtype="float32")
    plan = WorkerPlan(byte_tokenizer, describe_model(model), "cpu", settings)
    sampler = RaySampler(RayCluster(), plan, PoolSettings(2, SHARE), lambda: weights)
    try:
        completions = over(sampler, byte_tokenizer).sample(REQUESTS, OPTIONS, 4)
        first = [next(completions)]
        worker_processes()[0].kill()
        found = told([*first, *completions])
    finally:
        sampler.release()
    assert found == in_process(model.eval(), byte_tokenizer)


@pytest.mark.vllm
@needs_vllm
def test_trajectories_over_vllm_are_those_of_the_engine_turn_by_turn(
    byte_tokenizer, saved_model
) -> None:
    """A turn's tokens depend on its prompt, key and limit, and not on what decodes beside it."""
    model, folder = saved_model
    weights = EngineWeights(str(folder), None, 0, "first")
    settings = EngineSettings(python=VLLM_PYTHON, dtype="float32", max_num_seqs=8)
    engine = VLLMSampler(settings, lambda: weights, byte_tokenizer, describe_model(model))

    def write(ids, key, limit):
        [(_, turn)] = engine.sample(
            [SampleRequest(tuple(ids), key)], replace(OPTIONS, max_completion_length=limit), 1
        )
        return turn.completion_ids

    try:
        found = told(over(engine, byte_tokenizer).sample(REQUESTS, OPTIONS, 16))
        expected = {n: follow(r, byte_tokenizer, write) for n, r in enumerate(REQUESTS)}
    finally:
        engine.release()
    assert sum(found[n] == expected[n] for n in found) >= 0.9 * len(REQUESTS)  # ties of rounding
    assert len(found) == len(REQUESTS)
    for ids, mask, finish in found.values():
        assert len(ids) <= LENGTH
        assert mask is None or len(mask) == len(ids)
        assert finish in ("eos", "length")
