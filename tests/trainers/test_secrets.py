"""Secrets given by every door: none may reach a file, a line that is printed, a tracker or an error."""

import copy
import dataclasses
import logging
import os
import pickle
import traceback
from functools import partial
from pathlib import Path

import pytest
import transformers
from bigram_policy import CHAT_STEPS, bigram_model, family_template, word_tokenizer
from chat_server import serving
from datasets import Dataset
from patience import ENDS_S
from tiny_rewards import contains_solution
from told_tools import add
from transformers import TrainerCallback

from trl_selfplay import (
    QuietSTaRConfig,
    QuietSTaRTrainer,
    ReSTEMConfig,
    ReSTEMTrainer,
    STaRConfig,
)
from trl_selfplay.inspection.export import export_run
from trl_selfplay.inspection.html_report import write_report
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rewards import JudgeReward
from trl_selfplay.rollouts.stored import load_samples

SECRET = "Canary-7f3-"
VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "TRL_SELFPLAY_JUDGE_KEY")
DOORS = {
    "hub_token": f"{SECRET}0",
    "model_init_kwargs": {"token": f"{SECRET}1"},
    "chat_template_kwargs": {
        "api_key": f"{SECRET}2",
        "of": [{"password": f"{SECRET}3"}],
        "address": f"https://me:{SECRET}4@host?token={SECRET}5",
    },
    "vllm_server_base_url": f"http://me:{SECRET}6@host:8000",
}


class Fails(TrainerCallback):
    """Raises at an event of the trainer's."""

    def __init__(self, event):
        setattr(self, event, self.fail)

    def fail(self, *args, **kwargs):
        raise RuntimeError("by request")


def graded(completions, solution, api_key, **kwargs):
    return contains_solution(completions, solution)


def likes_all(completions, **kwargs):
    return [1.0] * len(completions)


def broken(completions, **kwargs):
    raise RuntimeError("by request")


@pytest.fixture
def heard(caplog, capfd, monkeypatch):
    """All that is printed and logged, at the finest level; secrets are in the environment too."""
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{SECRET}{name}")
    caplog.set_level(logging.DEBUG)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_debug()

    def read() -> str:
        printed = capfd.readouterr()
        return caplog.text + printed.out + printed.err

    yield read
    transformers.logging.set_verbosity(level)


def files_with_secrets(*folders):
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if SECRET.encode() in path.read_bytes()]


def test_a_run_leaves_no_secret_in_files_trackers_or_output(
    build_star, sums, tmp_path, saved_tiny_model, heard
) -> None:
    pytest.importorskip("trackio")
    pytest.importorskip("tensorboard")

    with serving(lambda question: "Rating: 1") as server:
        judge = JudgeReward(
            "m", base_url=server.url, api_key=f"{SECRET}7", cache=tmp_path / "cache"
        )
        build = partial(
            build_star, model=str(saved_tiny_model), eval_dataset=sums(2, first=40), save_steps=1,
            save_strategy="steps", reward_funcs=[judge, partial(graded, api_key=f"{SECRET}8")],
            eval_reward_funcs=contains_solution, reward_weights=[0.0, 1.0],
            report_to=["tensorboard", "trackio"], project=f"p{tmp_path.name}", log_completions=True,
            processing_class=None,
        )  # fmt: skip
        trainer = build(num_rounds=1, **DOORS)
        args = trainer.args
        assert SECRET not in f"{args} {args!r} {args.to_json_string()} {args.to_sanitized_dict()}"
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        # Another secret is no other run.
        again = build(num_rounds=2, **{**DOORS, "chat_template_kwargs": {
            **DOORS["chat_template_kwargs"], "api_key": f"{SECRET}9"}})  # fmt: skip
        again.train(resume_from_checkpoint=True)
        assert {h["Authorization"] for h in server.headers} == {f"Bearer {SECRET}7"}
    folder = tmp_path / "run"
    write_report(folder, tmp_path / "report.html")
    export_run(RunFolder.open(folder), "sft", tmp_path / "rows.jsonl")
    assert trainer.args.hub_token == DOORS["hub_token"]  # for the Hub itself
    assert SECRET not in heard()
    assert files_with_secrets(tmp_path, os.environ["TRACKIO_DIR"]) == []


@pytest.mark.parametrize(
    "fault",
    [
        "grading",
        pytest.param("on_step_end", marks=pytest.mark.slow),
        pytest.param("on_save", marks=pytest.mark.slow),
        pytest.param("on_round_end", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_fails_tells_no_secret(
    build_star, tmp_path, saved_tiny_model, heard, fault
) -> None:
    funcs = broken if fault == "grading" else contains_solution
    trainer = build_star(
        model=str(saved_tiny_model), num_rounds=1, save_steps=1, save_strategy="steps",
        callbacks=[] if fault == "grading" else [Fails(fault)], reward_funcs=funcs, **DOORS,
    )  # fmt: skip
    with pytest.raises((RuntimeError, ValueError)) as failure:
        trainer.train()
    told = "".join(traceback.format_exception(failure.value))
    assert "by request" in told
    assert SECRET not in told + heard()
    assert files_with_secrets(tmp_path) == []


def test_a_tool_s_keys_and_addresses_stay_its_own(tmp_path, heard) -> None:
    """Those that it holds, and those that its errors tell by their look."""
    error = f"401 for https://me:{SECRET}1@host/?token={SECRET}2"
    tokenizer = word_tokenizer(family_template("qwen2_5"))
    prompts = [[{"role": "user", "content": f"Q {i} = ?"}] for i in range(3)]
    args = ReSTEMConfig(
        str(tmp_path / "run"), num_rounds=1, num_generations=4, temperature=1.0, top_k=0, max_steps=1,
        max_completion_length=60, report_to=[], use_cpu=True, bf16=False, log_completions=True,
        gradient_checkpointing=False, reward_threshold=0.0, few_shot_in_training=False,
        tool_deadline=ENDS_S,
    )  # fmt: skip
    trainer = ReSTEMTrainer(
        bigram_model(tokenizer, CHAT_STEPS), args, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts, "solution": ["yes"] * 3}),
        reward_funcs=likes_all, tools=[partial(add, api_key=f"{SECRET}0", error=error)],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    write_report(tmp_path / "run", tmp_path / "report.html")
    told = {m["content"] for r in load_samples(trainer.run.folder(0)) for m in r.messages[1:2]}
    assert told == {"Error: LookupError: 401 for https://(not shown)@host/?token=(not shown)"}
    assert SECRET not in heard()
    assert files_with_secrets(tmp_path) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"hub_token": [f"{SECRET}0"]},
        {"hub_tokn": f"{SECRET}0"},
        {"model_init_kwargs": f"token: {SECRET}0"},
        {"model_init_kwargs": [{"token": f"{SECRET}0"}]},
        {"model_init_kwargs": f'{{"token": "{SECRET}0"'},
        {"dataset_kwargs": {"token": f"{SECRET}0"}},
        {"liger_kernel_config": {"token": f"{SECRET}0"}},
        {"optim_args": f"token={SECRET}0,"},
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": f"ftp://u:{SECRET}0@h"},
        {"log_completions_hub_repo": f"https://u:{SECRET}0@h/x"},
    ],
    ids=str,
)
def test_an_error_about_a_field_tells_no_secret(fields, tmp_path, heard) -> None:
    with pytest.raises((ValueError, TypeError)) as failure:
        STaRConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)
    assert SECRET not in str(failure.value) + heard()
    assert any(name in str(failure.value) for name in fields)


def test_copies_of_a_config_keep_its_secrets_and_pickles_lose_them(tmp_path) -> None:
    args = STaRConfig(str(tmp_path), use_cpu=True, bf16=False, **DOORS)
    for twin in (copy.copy(args), copy.deepcopy(args), dataclasses.replace(args)):
        assert {name: getattr(twin, name) for name in DOORS} == DOORS
    assert copy.copy(args).model_init_kwargs is args.model_init_kwargs
    assert copy.deepcopy(args).model_init_kwargs is not args.model_init_kwargs
    pickled = pickle.dumps(args)
    assert SECRET.encode() not in pickled
    loaded = pickle.loads(pickled)
    assert (loaded.hub_token, loaded.model_init_kwargs) == (None, {})
    assert loaded.learning_rate == args.learning_rate


@pytest.mark.slow
@pytest.mark.parametrize("build", ["build_spin", "build_irpo", "build_rest_em"])
def test_the_other_trainers_leave_no_secret_either(
    build, request, tmp_path, saved_tiny_model, heard
) -> None:
    build = request.getfixturevalue(build)
    trainer = build(
        model=str(saved_tiny_model), num_rounds=1, report_to=["tensorboard"], save_steps=1,
        save_strategy="steps", **DOORS,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert SECRET not in heard() + repr(trainer.args)
    assert files_with_secrets(tmp_path) == []


@pytest.mark.slow
def test_quiet_star_leaves_no_secret(sums, tmp_path, saved_tiny_model, heard) -> None:
    doors = {name: DOORS[name] for name in ("hub_token", "model_init_kwargs")}
    args = QuietSTaRConfig(
        str(tmp_path / "run"), max_steps=1, save_steps=1, num_thoughts=2, thought_length=2,
        per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to=["tensorboard"],
        gradient_checkpointing=False, disable_tqdm=True, **doors,
    )  # fmt: skip
    rows = sums(8).rename_column("prompt", "text").select_columns("text")
    trainer = QuietSTaRTrainer(str(saved_tiny_model), args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert SECRET not in heard() + repr(args) + str(args)
    assert files_with_secrets(tmp_path) == []
