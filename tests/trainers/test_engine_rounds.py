"""Whole runs over an engine that reads its weights from disk: whose samples, whose weights."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch
from engines import VLLM_PYTHON, StandIn, needs_vllm
from folder_engine import FolderEngine
from lora_server import serving_adapters
from peft import LoraConfig
from tiny_rewards import contains_solution
from transformers import BitsAndBytesConfig, TrainerCallback

from trl_selfplay.generation.checked_sampler import EngineChangedError
from trl_selfplay.generation.engine_agreement import EngineMismatchError
from trl_selfplay.rewards import JudgeReward
from trl_selfplay.rollouts.record import load_rollouts

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}
ENGINE = {"use_vllm": True, "vllm_python": "/bin/true"}  # its engine is replaced


@pytest.fixture
def engine_class(monkeypatch):
    """The engine that `use_vllm=True` starts in these tests."""

    class Engine(FolderEngine):
        engines = []  # noqa: RUF012

    module = types.SimpleNamespace(VLLMSampler=Engine)
    monkeypatch.setitem(sys.modules, "trl_selfplay.generation.vllm_sampler", module)
    return Engine


@pytest.fixture
def build(build_star, engine_class):
    """Build a STaR run that samples with the engine."""

    def build(folder="run", **changes):
        return build_star(folder, **ENGINE, **changes)

    return build


def samples(trainer, pattern):
    return [
        rollout
        for path in sorted(trainer.run.root.glob(pattern))
        for rollout in load_rollouts(path)
    ]


def tokens(trainer, pattern):
    return [r.completion_ids for r in samples(trainer, pattern)]


@pytest.mark.parametrize(
    ("peft_config", "start_from"),
    [
        pytest.param(LoraConfig(**LORA), "base", id="lora"),
        pytest.param(LoraConfig(**LORA), "previous", id="previous", marks=pytest.mark.slow),
        pytest.param(None, "base", id="full", marks=pytest.mark.slow),
    ],
)
def test_a_run_over_an_engine_equals_one_in_process(
    build, build_star, sums, peft_config, start_from, engine_class
) -> None:
    """The samples of every phase are a function of the weights: the engine had the right ones."""
    settings = {
        "peft_config": peft_config, "eval_dataset": sums(3, first=20), "start_from": start_from,
    }  # fmt: skip
    trainers = [build_star("in-process", **settings), build("engine", **settings)]
    for trainer in trainers:
        trainer.train()
    for pattern in ("*/samples/*.parquet", "*/evaluation/*.parquet"):
        expected = tokens(trainers[0], pattern)
        assert expected
        assert tokens(trainers[1], pattern) == expected
    # Before training, after round 0 (for round 1 as well), after round 1.
    [engine] = engine_class.engines
    assert engine.starts == 3
    assert len({weights.version for weights in engine.handed}) == 3


@pytest.mark.slow
def test_the_policy_judges_with_the_weights_that_it_is_to_have(
    build, build_star, engine_class
) -> None:
    """Amid a phase the engine gets the initial weights and then the current ones again."""
    form = {
        "template": "{prompt} {completion} so", "verdict": r".*?(\d).*", "scale": (0, 9),
        "temperature": 1.0, "max_completion_length": 20, "weights": "initial",
    }  # fmt: skip
    settings = {
        "peft_config": LoraConfig(**LORA), "reward_weights": [1.0, 0.5], "reward_threshold": 0.4,
        "num_rounds": 3,
    }  # fmt: skip
    trainers = []
    for builder, folder in ((build_star, "in-process"), (build, "engine")):
        judge = JudgeReward("policy", **form)
        trainers.append(builder(folder, reward_funcs=[contains_solution, judge], **settings))
        trainers[-1].train()
    for pattern in ("*/samples/*.parquet", "*/judgements/*.parquet"):
        expected = tokens(trainers[0], pattern)
        assert expected
        assert tokens(trainers[1], pattern) == expected


@pytest.mark.slow
def test_methods_of_pairs_sample_with_the_engine_as_well(
    build_spin, build_irpo, engine_class
) -> None:
    for name, builder in (("spin", build_spin), ("irpo", build_irpo)):
        trainers = [
            builder(f"{name}-in-process", peft_config=LoraConfig(**LORA)),
            builder(f"{name}-engine", peft_config=LoraConfig(**LORA), **ENGINE),
        ]
        for trainer in trainers:
            trainer.train()
        expected = tokens(trainers[0], "*/samples/*.parquet")
        assert expected
        assert tokens(trainers[1], "*/samples/*.parquet") == expected
        # The device is the trainer's alone while reference log-probs are computed.
        assert engine_class.engines[-1].releases > engine_class.engines[-1].starts


def test_a_stale_adapter_stops_the_run_before_anything_is_kept(build, engine_class) -> None:
    engine_class.is_stale = True
    trainer = build(peft_config=LoraConfig(**LORA), learning_rate=3e-3, bf16=False)
    # Rounding as large as in bfloat16 would be let pass: the adapter of the last round is not.
    trainer.self_play.collector.sampler._limit = 10.0
    with pytest.raises(EngineMismatchError, match="weights of the last hand-over"):
        trainer.train()
    assert samples(trainer, "round-000/samples/*.parquet")
    assert not list(trainer.run.root.glob("round-001/samples/*.parquet"))


def test_an_engine_with_another_base_stops_the_run(
    build, engine_class, saved_tiny_model, tiny_model, word_tokenizer
) -> None:
    trainer = build(model=str(saved_tiny_model), peft_config=LoraConfig(**LORA))
    other = tiny_model(word_tokenizer, seed=5)
    other.save_pretrained(saved_tiny_model)
    with pytest.raises(EngineMismatchError, match="another policy"):
        trainer.train()
    assert not list(trainer.run.root.glob("round-000/samples/*.parquet"))


def test_the_engine_and_its_gap_stand_in_shards_line_and_report(build, capsys) -> None:
    trainer = build(peft_config=LoraConfig(**LORA))
    trainer.train()
    for line in trainer.run.lines:
        engine = line["engine"]
        assert (engine["engine"], engine["version"], engine["dtype"]) == ("folder", "1", "float32")
        assert 0.0 <= engine["agreement"]["gap"] < 1e-4
        folder = trainer.run.folder(line["round"]) / "samples"
        stored = json.loads((folder / "engines.json").read_text())
        assert set(stored) == {path.stem for path in folder.glob("[0-9]*.parquet")}
        assert engine in stored.values()
    assert trainer.run.lines[0]["engine"]["agreement"]["nearer_to"] == "not told"
    assert trainer.run.lines[1]["engine"]["agreement"]["nearer_to"] == "current"
    shown = " ".join(capsys.readouterr().out.split())
    assert "engine gap: nats per token between the log-probs of the engine that samples" in shown
    assert "vLLM" not in shown  # any engine's


@pytest.mark.slow
def test_a_trainer_in_four_bits_shows_its_gap_to_the_engine(build, saved_chat_model) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    trainer = build(
        model=str(saved_chat_model), peft_config=LoraConfig(**LORA),
        model_init_kwargs={"quantization_config": quantization, "dtype": "float32"},
    )  # fmt: skip
    trainer.train()
    agreement = trainer.run.lines[1]["engine"]["agreement"]
    assert agreement["limit"] == 1.0
    assert 1e-4 < agreement["gap"] < 1.0


def interrupted(trainer):
    """Play round 0 and stop in round 1, before it samples."""

    class Stop(TrainerCallback):
        def on_round_begin(self, args, state, control, round_index, **kwargs):
            control.should_training_stop = round_index == 1

    trainer.add_callback(Stop())
    trainer.train()


def test_another_engine_amid_a_run_needs_the_flag(build, engine_class, caplog) -> None:
    settings = {"peft_config": LoraConfig(**LORA)}
    interrupted(build(**settings))
    engine_class.version = "2"
    with pytest.raises(EngineChangedError, match="allow_engine_change=True"):
        build(**settings).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"change with allow_engine_change=True:\n  vllm_dtype"):
        build(vllm_dtype="bfloat16", **settings).train(resume_from_checkpoint=True)
    trainer = build(allow_engine_change=True, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert [line["engine"]["version"] for line in trainer.run.lines] == ["1", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["in-process", "engine"])
def test_between_an_engine_and_this_process_a_run_changes_with_the_flag_alone(
    build, build_star, first
) -> None:
    settings = {"peft_config": LoraConfig(**LORA)}
    builders = [build_star, build] if first == "in-process" else [build, build_star]
    interrupted(builders[0](**settings))
    with pytest.raises(ValueError, match=r"change with allow_engine_change=True:\n  use_vllm"):
        builders[1](**settings).train(resume_from_checkpoint=True)
    builders[1](allow_engine_change=True, **settings).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_held_out_scores_before_a_run_leave_its_folder_empty(build, sums) -> None:
    trainer = build(eval_dataset=sums(3, first=20))
    trainer.evaluate()
    assert not trainer.run.root.exists()
    trainer.train()


@pytest.fixture
def lora_server(saved_tiny_model, word_tokenizer):
    with serving_adapters(saved_tiny_model, word_tokenizer) as server:
        yield server


@pytest.mark.slow
def test_a_server_samples_with_each_round_s_adapter(
    build_star, saved_tiny_model, lora_server
) -> None:
    settings = {"model": str(saved_tiny_model), "peft_config": LoraConfig(**LORA)}
    trainer = build_star(
        "server",
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=lora_server.url,
        **settings,
    )
    trainer.train()
    expected = build_star("in-process", **settings)
    expected.train()
    # With streams of 63 bits, about half of the keys are the same.
    found, own = (tokens(t, "round-000/samples/0*.parquet") for t in (trainer, expected))
    same = sum(a == b for a, b in zip(found, own, strict=True))
    assert same > len(own) // 4
    assert trainer.run.lines[1]["engine"]["agreement"]["nearer_to"] == "current"
    assert lora_server.adapters == {}


@pytest.mark.slow
def test_a_server_that_ignores_the_new_adapter_is_found_out(
    build_star, saved_tiny_model, lora_server
) -> None:
    lora_server.ignores_adapters = True
    trainer = build_star(
        "server", use_vllm=True, vllm_mode="server", vllm_server_base_url=lora_server.url,
        model=str(saved_tiny_model), peft_config=LoraConfig(**LORA), learning_rate=3e-3,
    )  # fmt: skip
    with pytest.raises(EngineMismatchError, match="weights of the last hand-over"):
        trainer.train()


def test_a_server_is_refused_where_it_can_not_load_what_trains(build_star, lora_server) -> None:
    with pytest.raises(ValueError, match="all weights are trained"):
        build_star(use_vllm=True, vllm_mode="server", vllm_server_base_url=lora_server.url)


def test_a_random_text_is_not_the_policy_s(
    build_star, tmp_path, monkeypatch, tiny_model, byte_tokenizer
) -> None:
    """The worker as it is, over a stand-in for vLLM that has no model."""
    stand_in = StandIn(tmp_path, monkeypatch)
    trainer = build_star(
        model=tiny_model(byte_tokenizer), processing_class=byte_tokenizer, use_vllm=True,
        vllm_python=stand_in.python,
    )  # fmt: skip
    with pytest.raises(EngineMismatchError, match="another policy"):
        trainer.train()
    assert not list(trainer.run.root.glob("*/samples/*.parquet"))
    [note] = stand_in.notes("engine")
    assert not psutil.pid_exists(note["pid"])


@pytest.fixture
def vllm_model(tmp_path, tiny_model, word_tokenizer) -> Path:
    """A folder with a model whose heads vLLM takes."""
    folder = tmp_path / "vllm-model"
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny_model(word_tokenizer, vocab_size=64, **sizes).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


def check_lines(trainer, limit):
    first, second = (line["engine"]["agreement"] for line in trainer.run.lines)
    assert max(first["gap"], second["gap"]) < 1e-5
    assert (first["limit"], second["nearer_to"]) == (limit, "current")


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("use_dora", [False, True], ids=["adapter", "copy"])
def test_vllm_has_each_round_s_weights(build_star, vllm_model, use_dora) -> None:
    trainer = build_star(
        model=str(vllm_model), peft_config=LoraConfig(**LORA, use_dora=use_dora), use_vllm=True,
        vllm_python=VLLM_PYTHON, vllm_max_model_length=64, top_k=10, temperature=0.8,
    )  # fmt: skip
    trainer.train()
    check_lines(trainer, limit=1e-3)


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
def test_a_vllm_server_has_each_round_s_weights(build_star, vllm_model, tmp_path) -> None:
    url = "http://127.0.0.1:8765"
    command = [
        VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", vllm_model,
        "--host", "127.0.0.1", "--port", "8765", "--enable-lora", "--max-lora-rank", "8",
        "--logprobs-mode", "processed_logprobs", "--enforce-eager", "--dtype", "float32",
        "--max-model-len", "64", "--max-num-seqs", "16",
    ]  # fmt: skip
    environment = {
        **os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": "",
    }  # fmt: skip
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        trainer = build_star(
            model=str(vllm_model), peft_config=LoraConfig(**LORA), use_vllm=True,
            vllm_mode="server", vllm_server_base_url=url, top_k=10, temperature=0.8,
        )  # fmt: skip
        trainer.train()
        check_lines(trainer, limit=0.05)
    finally:
        server.terminate()
        server.wait()
