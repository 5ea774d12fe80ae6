"""The fields that choose the engine: their checks, and the settings that vLLM gets."""

import logging
import sys
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator
from engines import StandIn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_selfplay import SPINConfig, STaRConfig, VSTaRConfig
from trl_selfplay.trainers.engine_config import (
    check_engine_is_there,
    engine_settings,
    forward_dtype,
)

CPU = {"use_cpu": True, "bf16": False, "report_to": []}


def config(tmp_path, **changes):
    return STaRConfig(str(tmp_path), **{**CPU, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vllm_mode": "colocate"}, r"Use vllm_mode='phase'"),
        ({"vllm_mode": "sleep"}, r"choose 'phase' or 'server'"),
        ({"vllm_dtype": "half"}, "choose one of"),
        ({"vllm_quantization": "awq"}, "choose one of"),
        ({"vllm_gpu_memory_utilization": 0.0}, "above 0 and at most 1"),
        ({"vllm_gpu_memory_utilization": 90}, "above 0 and at most 1"),
        ({"vllm_max_model_length": 1}, "at least 2"),
        ({"vllm_tensor_parallel_size": 0}, "at least 1"),
        ({"vllm_server_port": 70000}, "at most 65535"),
        ({"vllm_mode": "server", "vllm_server_base_url": "localhost:8000"}, "is no address"),
    ],
)
def test_values_that_can_not_work_are_refused(tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, use_vllm=True, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ray_address": "ray://head:10001"}, "Ray Client"),
        ({"ray_address": "head"}, "give 'host:port'"),
        ({"ray_num_workers": 0}, "at least 1"),
        ({"ray_cpus_per_worker": 0.0}, "above 0"),
        ({"ray_gpus_per_worker": -1.0}, "at least 0"),
        ({"ray_gpus_per_worker": 1.5}, "whole ones"),
        ({"use_vllm": True, "vllm_mode": "server"}, "use_ray=True with vllm_mode='server'"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, "ray_gpus_per_worker=2"),
    ],
)
def test_values_that_can_not_work_on_ray_are_refused(tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, use_ray=True, **changes)


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"vllm_dtype": "float32"}, "vllm_dtype='float32': without effect with use_vllm=False"),
        ({"vllm_mode": "colocate"}, None),  # GRPOConfig's default
        ({"ray_num_workers": 2}, "ray_num_workers=2: without effect with use_ray=False"),
        ({"use_ray": True, "ray_num_workers": 2, "ray_address": "head:6379"}, None),
        ({"use_vllm": True, "vllm_dtype": "float32"}, None),
        (
            {"use_vllm": True, "vllm_server_port": 1},
            "vllm_server_port=1: without effect with vllm_mode='phase'",
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_quantization": "fp8"},
            "vllm_quantization='fp8': without effect with vllm_mode='server'",
        ),
    ],
)
def test_what_has_no_effect_is_told(tmp_path, caplog, changes, warned) -> None:
    with caplog.at_level(logging.WARNING):
        config(tmp_path, **changes)
    lines = [r.message for r in caplog.records if "vllm" in r.message or "ray_" in r.message]
    assert lines == [] if warned is None else lines == [f"{warned}."]


@pytest.mark.parametrize("field", ["use_vllm", "use_ray"])
def test_a_verifier_samples_nothing(tmp_path, field) -> None:
    with pytest.raises(ValueError, match=field):
        VSTaRConfig(str(tmp_path), **{field: True}, **CPU)


@pytest.mark.skipif(find_spec("ray") is not None, reason="is about environments without Ray")
def test_a_missing_ray_is_told_before_a_model_is_loaded(build_star) -> None:
    with pytest.raises(ImportError, match=r"trl-selfplay\[ray\]"):
        build_star(use_ray=True, model="no-such-model")


def test_several_training_processes_do_not_share_workers(tmp_path) -> None:
    with pytest.raises(ValueError, match="use_ray=True with 2 training processes"):
        check_engine_is_there(config(tmp_path, use_ray=True), 2)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="is about environments without vLLM")
def test_a_missing_vllm_is_told_before_a_model_is_loaded(tmp_path, build_star) -> None:
    with pytest.raises(ImportError, match=r"trl-selfplay\[vllm\].*vllm_python"):
        build_star(use_vllm=True, model="no-such-model")
    with pytest.raises(FileNotFoundError, match="vllm_python='/no/python' is no program"):
        build_star(use_vllm=True, vllm_python="/no/python", model="no-such-model")


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("none", "has no vLLM. Install it there"),
        ("0.31.2", "has vLLM 0.31.2; 0.32 or later"),
        ("0.33.0", None),
        ("unknown", None),
    ],
)
def test_another_interpreter_without_vllm_is_told_before_a_model_is_loaded(
    tmp_path, version, said
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho {version}\n")
    program.chmod(0o755)
    settings = config(tmp_path, use_vllm=True, vllm_python=str(program))
    with nullcontext() if said is None else pytest.raises(ImportError, match=said):
        check_engine_is_there(settings, 1)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="is about environments without vLLM")
def test_the_question_for_vllm_is_answered_by_an_interpreter(tmp_path, monkeypatch) -> None:
    settings = config(tmp_path, use_vllm=True, vllm_python=sys.executable)
    with pytest.raises(ImportError, match="has no vLLM"):
        check_engine_is_there(settings, 1)
    settings.vllm_python = StandIn(tmp_path, monkeypatch).python
    check_engine_is_there(settings, 1)


def test_several_processes_are_refused(tmp_path) -> None:
    settings = config(tmp_path, use_vllm=True, vllm_python="/bin/true")
    check_engine_is_there(settings, 1)
    with pytest.raises(ValueError, match="2 training processes"):
        check_engine_is_there(settings, 2)


def test_the_server_has_grpo_s_address(tmp_path) -> None:
    assert config(tmp_path).server_url == "http://0.0.0.0:8000"
    given = config(
        tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url="http://a.b:9/x"
    )
    assert given.server_url == "http://a.b:9/x"


def test_the_engine_gets_the_precision_of_the_trainer_s_forward(
    tmp_path, tiny_model, word_tokenizer
) -> None:
    settings = SPINConfig(
        str(tmp_path), use_vllm=True, vllm_python=sys.executable, vllm_max_model_length=64, **CPU
    )
    model, accelerator = tiny_model(word_tokenizer), Accelerator(cpu=True)  # as a trainer's, later
    made = engine_settings(settings, model, accelerator)
    assert (made.dtype, made.max_model_length) == ("float32", 64)
    assert (made.python, made.quantization) == (sys.executable, None)
    settings.vllm_dtype = "float16"
    settings.vllm_quantization = "fp8"
    assert engine_settings(settings, model, accelerator).dtype == "float16"
    for dtype, whose in ((None, "that of the trainer's forward"), ("float32", "vllm_dtype")):
        settings.vllm_dtype = dtype
        with pytest.raises(ValueError, match=rf"fp8.*is float32, {whose}\. Set vllm_dtype='bfl"):
            engine_settings(settings, model, accelerator)
    assert forward_dtype(model.bfloat16(), accelerator) is torch.bfloat16


def test_a_four_bit_model_computes_in_its_compute_dtype(saved_chat_model) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        saved_chat_model, quantization_config=quantization, dtype=torch.float32
    )
    assert forward_dtype(model, Accelerator(cpu=True)) is torch.bfloat16


def test_the_engine_s_context_bounds_prompts_and_completions(build_star) -> None:
    with pytest.raises(
        ValueError, match="don't fit the engine's `vllm_max_model_length` of 10 tok"
    ):
        build_star(
            use_vllm=True, vllm_python="/bin/true", vllm_max_model_length=10,
            max_completion_length=8,
        )  # fmt: skip


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch, tmp_path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    check_engine_is_there(config(tmp_path, use_vllm=True, vllm_python="~/python"), 1)
