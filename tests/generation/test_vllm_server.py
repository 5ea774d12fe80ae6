"""Sampling with a server: real HTTP, a real model with real adapters behind it."""

import gc
import threading
import warnings
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from chat_server import start
from lora_server import serving_adapters
from patience import ENDS_S
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_selfplay.generation import vllm_server
from trl_selfplay.generation.engine import EngineWeights
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.generation.vllm_server import ServerError, VLLMServerSampler

REQUESTS = [SampleRequest(tuple(range(3, 5 + i % 3)), 11 + i) for i in range(7)]
OPTIONS = SamplingOptions(9, eos_token_ids=(1,), return_logprobs=True)


@pytest.fixture
def adapter(saved_tiny_model, tmp_path):
    """Save an adapter and say what an engine would get: `adapter("name", seed)`."""

    def save(version, seed) -> EngineWeights:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(saved_tiny_model)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path / version)
        return EngineWeights(str(saved_tiny_model), tmp_path / version, 4, version)

    return save


@pytest.fixture
def server(saved_tiny_model, word_tokenizer):
    with serving_adapters(saved_tiny_model, word_tokenizer) as server:
        yield server


@pytest.fixture
def build(server, saved_tiny_model, word_tokenizer, monkeypatch):
    monkeypatch.setattr(vllm_server, "_WAIT_S", 0.0)
    traits = describe_model(AutoModelForCausalLM.from_pretrained(saved_tiny_model))

    def build_one(export):
        return VLLMServerSampler(server.url, export, word_tokenizer, traits, timeout_s=ENDS_S)

    return build_one


def in_process(weights, tokenizer, options):
    base = AutoModelForCausalLM.from_pretrained(weights.model)
    model = PeftModel.from_pretrained(base, weights.adapter)
    return dict(TransformersSampler(model, tokenizer).sample(REQUESTS, options, 7))


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.0}, {"top_k": 3, "repetition_penalty": 1.2}, {"stop_strings": ("so",)}],
)
def test_the_server_gets_the_options_and_its_tokens_come_back(
    build, adapter, word_tokenizer, changes
) -> None:
    options = SamplingOptions(9, eos_token_ids=(1,), return_logprobs=True, **changes)
    weights = adapter("first", 1)
    told = []
    found = dict(build(lambda: weights).sample(REQUESTS, options, 3, told.append))
    assert sorted(told) == sorted(len(c.completion_ids) for c in found.values())
    expected = in_process(weights, word_tokenizer, options)
    assert {i: (c.completion_ids, c.finish) for i, c in found.items()} == {
        i: (c.completion_ids, c.finish) for i, c in expected.items()
    }
    for index, completion in expected.items():
        assert found[index].logprob == pytest.approx(completion.logprob, abs=1e-4)


def test_each_version_has_a_name_of_its_own_and_the_one_before_is_unloaded(
    build, adapter, server, word_tokenizer
) -> None:
    versions = [adapter("first", 1), adapter("second", 2)]
    current = versions[:1]
    sampler = build(lambda: current[0])
    assert dict(sampler.sample(REQUESTS, OPTIONS, 7)) != {}
    assert set(server.adapters) == {"trl-selfplay-first"}
    current[0] = versions[1]
    found = dict(sampler.sample(REQUESTS, OPTIONS, 7))
    expected = in_process(versions[1], word_tokenizer, OPTIONS)
    assert {i: c.completion_ids for i, c in found.items()} == {
        i: c.completion_ids for i, c in expected.items()
    }
    assert set(server.adapters) == {"trl-selfplay-second"}
    sampler.release()
    assert server.adapters == {}
    sampler.release()


def test_an_adapter_that_a_killed_run_has_left_is_used(build, adapter, server) -> None:
    weights = adapter("first", 1)
    list(build(lambda: weights).sample(REQUESTS, OPTIONS, 7))
    assert len(list(build(lambda: weights).sample(REQUESTS, OPTIONS, 7))) == len(REQUESTS)
    assert Path(server.adapters["trl-selfplay-first"]).is_absolute()


def test_requests_that_follow_from_completions_enter_while_others_run(build, adapter) -> None:
    weights = adapter("first", 1)
    done: list[int] = []

    def follow():
        yield from REQUESTS[:2]
        while len(done) < 2:
            yield None
        yield REQUESTS[2]

    for index, _ in build(lambda: weights).sample(follow(), OPTIONS, 4):
        done.append(index)
    assert sorted(done) == [0, 1, 2]


def test_a_server_that_is_busy_is_asked_again(build, adapter, server) -> None:
    weights, left = adapter("first", 1), [2]

    def fail(path, body):
        if path == "/v1/completions" and left[0] > 0:
            left[0] -= 1
            return 503
        return None

    server.fail = fail
    assert len(list(build(lambda: weights).sample(REQUESTS, OPTIONS, 1))) == len(REQUESTS)


@pytest.mark.parametrize(
    ("path", "status", "error", "message"),
    [
        ("/v1/completions", 503, ConnectionError, "Finished shards are kept"),
        ("/v1/completions", 400, ServerError, "answers 400: it went wrong"),
        ("/v1/load_lora_adapter", 404, ServerError, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
    ],
)
def test_what_the_server_refuses_is_told(
    build, adapter, server, path, status, error, message
) -> None:
    weights = adapter("first", 1)
    sampler = build(lambda: weights)
    server.fail = lambda asked, body: status if asked == path else None
    with pytest.raises(error, match=message):
        list(sampler.sample(REQUESTS, OPTIONS, 2))


def test_closing_early_leaves_no_thread(build, adapter) -> None:
    weights = adapter("first", 1)
    sampling = build(lambda: weights).sample(REQUESTS, OPTIONS, 3)
    next(sampling)
    sampling.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("vllm-server")]


def test_what_waits_for_another_try_is_not_sent_after_closing(
    build, adapter, server, monkeypatch
) -> None:
    weights, was_refused = adapter("first", 1), threading.Event()
    sampler = build(lambda: weights)
    monkeypatch.setattr(vllm_server, "_WAIT_S", 600.0)  # closing comes first in any case

    def fail(path, body):
        if path == "/v1/completions" and body["seed"] == REQUESTS[1].stream_key:
            was_refused.set()
            return 503
        return None

    server.fail = fail
    sampling = sampler.sample(REQUESTS[:2], OPTIONS, 2)
    next(sampling)
    assert was_refused.wait(60)
    sampling.close()
    assert [path for path, _ in server.asked].count("/v1/completions") == 2


def test_an_error_is_told_though_its_text_is_cut_within_a_character(build, adapter, server):
    weights = adapter("first", 1)
    sampler = build(lambda: weights)

    def answer(path, body):
        raise ValueError("x" + "é" * 400)

    server.answer = answer
    with pytest.raises(ServerError, match="answers 400: xéé"):
        list(sampler.sample(REQUESTS, OPTIONS, 2))


def test_a_server_that_is_not_up_is_named_with_the_command(word_tokenizer) -> None:
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9 within.*vllm serve MODEL"):
        VLLMServerSampler("http://127.0.0.1:9", lambda: None, word_tokenizer, None, timeout_s=0)


def test_the_record_says_what_the_server_says_of_itself(build, adapter) -> None:
    record = build(lambda: adapter("first", 1)).engine_record
    assert record == {
        "engine": "vllm server", "version": "0.32.0", "model": "base", "dtype": None,
        "quantization": None,
    }  # fmt: skip


def test_an_answer_that_stops_in_the_middle_leaves_no_socket_open(
    word_tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(vllm_server, "_WAIT_S", 0.0)
    monkeypatch.setattr(vllm_server, "_REPLY_PATIENCE_S", 0.1)
    stopped = threading.Event()

    class Stops(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if self.path != "/health":
                self.send_header("Content-Length", "100")
            self.end_headers()
            if self.path != "/health":
                stopped.wait(60)

        def log_message(self, *args) -> None:
            pass

    url, stop = start(Stops)
    gc.collect()  # sockets of others aren't closed in the meantime

    def ask() -> str:
        try:
            VLLMServerSampler(url, lambda: None, word_tokenizer, None, timeout_s=ENDS_S)
        except ConnectionError as error:
            kept = error  # in a cycle with this call, as in a thread that hands it on
            return str(kept)
        return ""

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        try:
            assert "timed out" in ask()
        finally:
            stopped.set()
            stop()
        gc.collect()
    assert not [w for w in caught if "socket" in str(w.message)]
