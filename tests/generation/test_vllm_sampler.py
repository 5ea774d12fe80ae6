"""The sampler over a vLLM engine, with the worker as it is and a stand-in for vLLM behind it."""

import itertools
import math
from pathlib import Path
from select import select

import pytest
import torch
from engines import StandIn, stand_in_text

from trl_selfplay.generation.checked_sampler import CheckedSampler
from trl_selfplay.generation.engine import EngineSettings, EngineWeights
from trl_selfplay.generation.engine_agreement import EngineMismatchError
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.vllm_process import EngineProcess
from trl_selfplay.generation.vllm_sampler import EngineFailure, VLLMSampler

EOS = 1
OPTIONS = SamplingOptions(60, eos_token_ids=(EOS,), return_logprobs=True)


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


@pytest.fixture
def build(stand_in, tokenizer, build_model):
    """Build samplers that are released at the end: `build(export=…, **settings)`."""
    built = []

    def build_one(export=None, model=None, announce=print, **settings) -> VLLMSampler:
        settings = {"python": stand_in.python, "max_num_seqs": 8, **settings}
        sampler = VLLMSampler(
            settings=EngineSettings(**settings),
            export=export or (lambda: EngineWeights("a-model", None, 0, "first")),
            tokenizer=tokenizer,
            traits=describe_model(model or build_model()),
            announce=announce,
        )
        built.append(sampler)
        return sampler

    yield build_one
    for sampler in built:
        sampler.release()


@pytest.fixture(scope="module")
def tokens_of():
    """The text of the stand-in."""
    return stand_in_text()


def requests(count: int, length: int = 5) -> list[SampleRequest]:
    """Four samples a prompt, with keys of all 64 bits."""
    return [
        SampleRequest((3 + i // 4,) * length, (0x9E3779B97F4A7C15 * (i + 1)) % 2**64)
        for i in range(count)
    ]


def expected(request, tokens_of, options=OPTIONS, limit=None, adapter="") -> tuple[int, ...]:
    seed = request.stream_key & (2**63 - 1)
    source = tokens_of(request.prompt_ids, seed, adapter)
    ids = []
    while len(ids) < (limit or options.max_completion_length):
        ids.append(next(source))
        if ids[-1] in options.eos_token_ids:
            break
    return tuple(ids)


def test_a_line_is_said_before_an_engine_starts_and_after(build) -> None:
    said = []
    sampler = build(announce=said.append)
    assert said == []
    list(sampler.sample(requests(4), OPTIONS, batch_size=8))
    assert said[0] == "starting a vLLM engine with a-model: takes up to minutes"
    assert said[1].startswith("vLLM 0.")
    assert said[1].endswith(" s")
    assert len(said) == 2


def test_each_request_gets_its_own_completion_in_any_batch(build, tokens_of) -> None:
    sampler, wanted = build(), requests(40)
    batches = [list(sampler.sample(wanted, OPTIONS, size)) for size in (1, 7, 64)]
    for batch in batches:
        assert sorted(index for index, _ in batch) == list(range(40))
        for index, completion in batch:
            ids = expected(wanted[index], tokens_of)
            assert completion.completion_ids == ids
            assert completion.finish == ("eos" if ids[-1] == EOS else "length")
            assert completion.logprob == pytest.approx(-len(ids) * math.log(259))
    assert {c.finish for _, c in batches[0]} == {"eos", "length"}


def test_one_engine_serves_a_phase_and_the_next_phase_has_another(build, stand_in) -> None:
    sampler = build()
    assert sampler.engine_record is None
    for _ in range(2):
        assert len(list(sampler.sample(requests(4), OPTIONS, 4))) == 4
        assert len(list(sampler.sample(requests(4), OPTIONS, 4))) == 4
        sampler.release()
        sampler.release()
    assert len(stand_in.notes("engine")) == 2
    record = {"engine": "vllm", "version": "0.32.0", "dtype": "float32", "quantization": None}
    assert sampler.engine_record == record


def test_no_engine_is_started_without_requests(build, stand_in) -> None:
    assert list(build().sample([], OPTIONS, 4)) == []
    assert stand_in.notes("engine") == []


def test_samples_of_a_prompt_enter_the_engine_together(build, stand_in) -> None:
    list(build().sample(requests(12)[::-1], OPTIONS, 16))
    prompts = [tuple(note["prompt"]) for note in stand_in.notes("request")]
    assert len(list(itertools.groupby(prompts))) == 3


@pytest.mark.parametrize("stop_strings", [(), ("k", "x", "z")])
def test_tokens_are_told_as_the_engine_gives_them(build, stop_strings) -> None:
    told = []
    options = SamplingOptions(60, eos_token_ids=(EOS,), stop_strings=stop_strings)
    sampled = list(build().sample(requests(12), options, 12, told.append))
    num_tokens = sum(len(completion.completion_ids) for _, completion in sampled)
    assert sum(told) == num_tokens
    assert (len(told) > 12) == bool(stop_strings)


def test_a_stop_string_ends_a_completion_with_its_token(build, stand_in, tokenizer, tokens_of):
    sampler, wanted = build(), requests(12)
    options = SamplingOptions(200, eos_token_ids=(EOS,), stop_strings=("k", "x", "z"))
    stopped = 0
    for index, completion in sampler.sample(wanted, options, 12):
        ids = expected(wanted[index], tokens_of, options)
        texts = [tokenizer.decode([token]) for token in ids]
        ends = [i for i, text in enumerate(texts) if any(s in text for s in options.stop_strings)]
        if ends:
            ids = ids[: ends[0] + 1]
            stopped += 1
        assert completion.completion_ids == ids
        assert completion.finish == ("stop" if ends else "eos" if ids[-1] == EOS else "length")
        assert completion.logprob is None
    assert stopped > 0
    list(sampler.sample(wanted[:1], OPTIONS, 1))  # behind the last abort
    assert sum(len(note["abort"]) for note in stand_in.notes("abort")) == stopped


def test_a_completion_ends_where_the_context_does(build, build_model, tokens_of) -> None:
    sampler = build(model=build_model(max_position_embeddings=40))
    wanted = requests(8, length=30)
    for index, completion in sampler.sample(wanted, OPTIONS, 8):
        assert completion.completion_ids == expected(wanted[index], tokens_of, limit=10)
    with pytest.raises(ValueError, match="context of 40"):
        list(sampler.sample(requests(1, length=40), OPTIONS, 8))


def test_requests_may_follow_from_completions(build, stand_in, tokens_of) -> None:
    sampler = build()
    first, given, done = requests(6), [], {}

    def turns():
        yield from first
        given.extend(first)
        for _ in range(6):
            while not done:
                yield None
            index, completion = done.popitem()
            given.append(SampleRequest((*given[index].prompt_ids, *completion.completion_ids), 7))
            yield given[-1]

    got = {}
    for index, completion in sampler.sample(turns(), OPTIONS, 8):
        got[index] = completion
        if index < 6:
            done[index] = completion
    assert len(got) == 12
    for index, completion in got.items():
        assert completion.completion_ids == expected(given[index], tokens_of)


def test_an_iterator_that_waits_for_nothing_is_an_error(build) -> None:
    with pytest.raises(RuntimeError, match="gave None while no completion was in progress"):
        list(build().sample(iter([None]), OPTIONS, 8))


def test_a_closed_iterator_leaves_the_engine_free_for_others(build, stand_in, tokens_of) -> None:
    sampler, wanted = build(), requests(16)
    completions = sampler.sample(wanted, OPTIONS, 16)
    next(completions)
    with pytest.raises(RuntimeError, match="one `sample` at a time"):
        next(sampler.sample(wanted, OPTIONS, 16))
    completions.close()
    for index, completion in sampler.sample(wanted, OPTIONS, 4):
        assert completion.completion_ids == expected(wanted[index], tokens_of)
    assert len(stand_in.notes("engine")) == 1


def test_ids_outside_the_vocabulary_are_excluded(
    build, build_model, tokenizer, monkeypatch
) -> None:
    """The stand-in draws from 259 ids, of which this tokenizer knows ten."""
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {str(i): i for i in range(10)})
    sampler = build(model=build_model(vocab_size=300))
    options = SamplingOptions(60, eos_token_ids=(20,))
    completions = [c for _, c in sampler.sample(requests(40), options, 40)]
    drawn = {token for completion in completions for token in completion.completion_ids}
    assert drawn == {*range(10), 20}


def test_more_ids_than_a_gpu_can_exclude_are_an_error(build_model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {str(i): i for i in range(10)})

    def build_with(count: int, device: str) -> None:
        traits = describe_model(build_model(vocab_size=count))
        VLLMSampler(EngineSettings(), lambda: None, tokenizer, traits, device)

    build_with(1034, "cuda")
    build_with(1035, "cpu")
    with pytest.raises(ValueError, match=r"1025 of the model's 1035 ids.*resize_token_embeddings"):
        build_with(1035, "cuda")


def test_a_new_version_of_the_adapter_is_another_adapter(build, stand_in, tokens_of, tmp_path):
    current = {}

    def train(version: str) -> None:
        folder = tmp_path / "adapter"  # always the same one
        folder.mkdir(exist_ok=True)
        Path(folder, "name").write_text(version)
        current["weights"] = EngineWeights("a-model", folder, 24, version)

    train("first")
    sampler, wanted = build(lambda: current["weights"]), requests(4)
    for version in ("first", "second", "second", "third"):
        train(version)
        for index, completion in sampler.sample(wanted, OPTIONS, 4):
            ids = expected(wanted[index], tokens_of, adapter=version)
            assert completion.completion_ids == ids
    sampler.release()
    train("fourth")
    list(sampler.sample(wanted, OPTIONS, 4))
    numbers = [note["number"] for note in stand_in.notes("request")]
    assert numbers == [n for n in (1, 2, 2, 3, 4) for _ in range(4)]
    engines = [note["engine"] for note in stand_in.notes("engine")]
    assert len(engines) == 2
    assert all(e["enable_lora"] and e["max_lora_rank"] == 32 for e in engines)


def test_another_model_has_another_engine(build, stand_in) -> None:
    models = iter(["first", "first", "second"])
    sampler = build(lambda: EngineWeights(next(models), None, 0, "same"))
    for _ in range(3):
        list(sampler.sample(requests(2), OPTIONS, 4))
    assert [note["engine"]["model"] for note in stand_in.notes("engine")] == ["first", "second"]


def test_arguments_reach_the_engine(build, stand_in) -> None:
    sampler = build(
        dtype="float16", quantization="fp8", max_model_length=99, engine_arguments={"seed": 5}
    )
    list(sampler.sample(requests(1), OPTIONS, 4))
    (note,) = stand_in.notes("engine")
    given = note["engine"]
    assert given["dtype"] == "float16"
    assert given["quantization"] == "fp8"
    assert given["max_model_len"] == 99
    assert given["seed"] == 5
    assert given["generation_config"] == "vllm"
    assert given["logprobs_mode"] == "processed_logprobs"
    assert given["enable_prefix_caching"]
    assert "enable_lora" not in given


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (SamplingOptions(0), {}, "max_completion_length"),
        (SamplingOptions(5, temperature=0.001), {}, "temperature is 0.001"),
        (SamplingOptions(50), {"max_model_length": 40}, "takes 40"),
    ],
)
def test_what_the_engine_cannot_do_is_an_error_before_it_starts(
    build, stand_in, options, settings, message
) -> None:
    with pytest.raises(ValueError, match=message):
        list(build(**settings).sample(requests(4), options, 4))
    assert stand_in.notes("engine") == []


def test_sequences_longer_than_the_engine_found_room_for_are_an_error(build) -> None:
    sampler = build(engine_arguments={"max_model_len": 50})
    with pytest.raises(ValueError, match="takes 50"):
        list(sampler.sample(requests(1), OPTIONS, 4))


def test_lengths_at_which_rotary_frequencies_change_are_an_error(build, build_model) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    sampler = build(model=build_model(max_position_embeddings=64, rope_parameters=rope))
    with pytest.raises(ValueError, match="may pass 64"):
        list(sampler.sample(requests(1), OPTIONS, 4))


def test_nan_is_an_error(build, stand_in) -> None:
    stand_in.plan(then="nan")
    with pytest.raises(RuntimeError, match="is NaN in the vLLM engine"):
        list(build().sample(requests(4), OPTIONS, 4))


def test_a_completion_that_the_engine_cuts_short_is_an_error(build, stand_in) -> None:
    stand_in.plan(at=10, then="stop")
    with pytest.raises(RuntimeError, match="after 10 of 60 tokens, without EOS"):
        list(build().sample(requests(1), OPTIONS, 1))


def lose_patience_with_hanging_engines(stand_in, monkeypatch) -> None:
    """Give an engine that hangs half a second, and none that is merely slow."""
    receive, seen = EngineProcess.receive, []

    def receive_in_time(process):
        while not (process._inbox or select([process._answers], [], [], 0.01)[0]):
            process._write()
            if len(wrong := stand_in.notes("wrong")) > len(seen):
                seen[:] = wrong
                if wrong[-1]["wrong"] == "hang":
                    process._patience_s = 0.5
                    break
        return receive(process)

    monkeypatch.setattr(EngineProcess, "receive", receive_in_time)


@pytest.mark.parametrize("fault", ["die", "hang", "memory"])
def test_a_failed_engine_is_replaced_once_and_nothing_is_lost(
    build, stand_in, tokens_of, fault, caplog, monkeypatch
) -> None:
    stand_in.plan(at=30, then=fault)
    lose_patience_with_hanging_engines(stand_in, monkeypatch)
    sampler, wanted = build(), requests(24)
    options = SamplingOptions(60, eos_token_ids=tuple(range(1, 9)), return_logprobs=True)
    got = list(sampler.sample(wanted, options, 8))
    assert sorted(index for index, _ in got) == list(range(24))
    for index, completion in got:
        assert completion.completion_ids == expected(wanted[index], tokens_of, options)
    what = {
        "die": "was ended by SIGKILL",
        "hang": "did not finish a step within 0.5 s",
        "memory": "CUDA out of memory",
    }[fault]
    assert what in caplog.text
    assert {"die": "Segmentation fault", "hang": "waiting for", "memory": "loading the"}[
        fault
    ] in caplog.text
    first, second = [note["engine"] for note in stand_in.notes("engine")]
    assert second["max_num_seqs"] == first["max_num_seqs"] // 2
    assert second["gpu_memory_utilization"] < first["gpu_memory_utilization"]
    # What was finished before the failure isn't sampled again.
    assert len(stand_in.notes("request")) < 2 * 24
    sampler.release()
    list(sampler.sample(wanted[:1], options, 8))
    third = stand_in.notes("engine")[2]["engine"]
    next_phase = second if fault == "memory" else first
    assert third["max_num_seqs"] == next_phase["max_num_seqs"]
    assert third["gpu_memory_utilization"] == next_phase["gpu_memory_utilization"]


class Weights:
    """Weights that stay as they are."""

    def __call__(self) -> EngineWeights:
        return EngineWeights("a-model", None, 0, "first")

    def forget(self) -> None:
        pass

    def previous(self) -> None:
        return None


@pytest.mark.parametrize("replacement_agrees", [True, False])
def test_a_replacement_is_checked_before_its_completions_pass(
    build, stand_in, tokens_of, tmp_path, replacement_agrees
) -> None:
    stand_in.plan(at=40, then="die")  # behind what a check samples
    checks, got, wanted = [], {}, requests(24)

    def score(completions, options):
        checks.append(len(got))
        is_wrong = len(checks) > 1 and not replacement_agrees
        return [(-9.0 if is_wrong else -math.log(259)) * len(ids) for _, ids in completions]

    weights = Weights()
    engine = build(weights)
    sampler = CheckedSampler(engine, weights, score, 1e-3, tmp_path / "engine.json")

    def sample() -> None:
        for index, completion in sampler.sample(wanted, OPTIONS, 8):
            got[index] = completion

    if replacement_agrees:
        sample()
        assert sorted(got) == list(range(24))
    else:
        with pytest.raises(EngineMismatchError):
            sample()
        assert len(got) == checks[1] < 24
    assert len(checks) == 2
    assert len(stand_in.notes("engine")) == 2
    for index, completion in got.items():
        assert completion.completion_ids == expected(wanted[index], tokens_of)


def test_a_second_failure_in_a_phase_is_an_error_with_the_last_lines(build, stand_in) -> None:
    stand_in.plan(at=30, then="die", times=3)
    sampler = build()
    got = []
    with pytest.raises(EngineFailure, match=r"(?s)SIGKILL.*loading.*Segmentation fault"):
        got.extend(sampler.sample(requests(16), OPTIONS, 4))
    assert len(stand_in.notes("engine")) == 2
    sampler.release()
    # The next phase may fail once again.
    assert len(list(sampler.sample(requests(16), OPTIONS, 4))) == 16
    assert len(stand_in.notes("engine")) == 4


def test_an_error_that_less_memory_does_not_cure_is_not_tried_again(build, stand_in) -> None:
    stand_in.plan(at=5, then="raise")
    with pytest.raises(EngineFailure, match="ValueError: an index is out of range"):
        list(build().sample(requests(4), OPTIONS, 4))
    assert len(stand_in.notes("engine")) == 1


def test_memory_that_does_not_suffice_to_start_is_tried_with_less(build, stand_in) -> None:
    stand_in.plan(start="memory", fits=4)
    assert len(list(build(max_num_seqs=8).sample(requests(8), OPTIONS, 8))) == 8
    sampler = build(max_num_seqs=16)
    with pytest.raises(EngineFailure, match="out of memory"):
        list(sampler.sample(requests(8), OPTIONS, 8))


def test_memory_of_the_device_that_stays_taken_is_an_error(build, monkeypatch) -> None:
    """A CUDA device isn't at hand here: its numbers are made up."""
    free = iter([10 * 2**30, 10 * 2**30, 7 * 2**30, 9.9 * 2**30, 10 * 2**30, 10 * 2**30])
    later = 8 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free, later), 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    sampler = build()
    sampler._device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    list(sampler.sample(requests(1), OPTIONS, 1))
    sampler.release()
    list(sampler.sample(requests(1), OPTIONS, 1))
    monkeypatch.setattr("trl_selfplay.generation.vllm_sampler._MEMORY_PATIENCE_S", 0.3)
    with pytest.raises(RuntimeError, match=r"2\.0 GiB more of cuda:0 are in use than before"):
        sampler.release()
    sampler._device = torch.device("cpu")
