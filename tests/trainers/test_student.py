"""A smaller model is trained on the stored mixture of a run (RA-14)."""

from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig

from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.trainers.student import StudentTrainer


@pytest.fixture
def small_model(tmp_path, tiny_model, word_tokenizer) -> str:
    folder = tmp_path / "small-model"
    tiny_model(word_tokenizer, seed=7, hidden_size=16, num_hidden_layers=1).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return str(folder)


def rows_of(folder: Path, index: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rows = load_from_disk(str(folder / "_rounds" / f"round-{index:03d}" / "dataset")).to_list()
    return sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)


def refuse_sampling(trainer) -> None:
    def sample(*args):
        raise AssertionError("the policy's sampler was asked")

    trainer.self_play.collector.sampler.sample = sample


def test_a_finished_run_trains_a_student_without_a_generation_call(
    build_rest_em, small_model, tmp_path, sums
) -> None:
    """RA-14: the student's rows are those of the last round, and nothing is sampled for them."""
    heldout = {"eval_dataset": sums(4, first=20), "num_generations_eval": 0}
    build_rest_em(**heldout).train()
    trainer = build_rest_em(student_model=small_model, **heldout)
    refuse_sampling(trainer)
    trainer.train(resume_from_checkpoint=True)
    student = tmp_path / "run" / "student"
    assert rows_of(student, 0) == rows_of(tmp_path / "run", 1)
    run = RunFolder.open(student)
    assert run.rounds == []
    (line,) = run.lines
    assert {line["eval_before"]["eval_accuracy"], line["eval"]["eval_accuracy"]} <= {
        *torch.arange(5).div(4).tolist()
    }
    before = load_file(f"{small_model}/model.safetensors")
    after = load_file(student / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


class StopAt(TrainerCallback):
    """Ends a training at a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_an_interrupted_student_ends_as_an_uninterrupted_one(
    build_rest_em, small_model, tmp_path, monkeypatch, peft
) -> None:
    """Bit for bit; with adapters too, whose first values are drawn."""
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], lora_dropout=0.1)
    settings = {
        "num_rounds": 1,
        "student_model": small_model,
        "student_args": {"max_steps": 4, "save_steps": 1, "num_train_epochs": 9},
        "student_peft_config": lora if peft else None,
    }
    build_rest_em("whole", **settings).train()
    whole = weights_of(tmp_path / "whole" / "student")
    trainer = build_rest_em("cut", **settings)
    build = StudentTrainer.__init__

    def build_and_interrupt(self, *args):
        build(self, *args)
        self.add_callback(StopAt(2))

    with monkeypatch.context() as patched:
        patched.setattr(StudentTrainer, "__init__", build_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    torch.manual_seed(99)  # a process that did other things before
    trainer = build_rest_em("cut", **settings)
    refuse_sampling(trainer)
    trainer.train(resume_from_checkpoint=True)
    resumed = weights_of(tmp_path / "cut" / "student")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_student_has_settings_of_its_own(build_rest_em, small_model, tmp_path) -> None:
    args = SFTConfig(
        str(tmp_path / "elsewhere"), max_steps=2, learning_rate=5e-3, report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=False, per_device_train_batch_size=2,
    )  # fmt: skip
    build_rest_em(num_rounds=1, student_model=small_model, student_args=args).train()
    (line,) = RunFolder.open(tmp_path / "elsewhere").lines
    assert (line["steps"], line["learning_rate"]) == (2, 5e-3)
    assert not (tmp_path / "run" / "student").exists()
    card = (tmp_path / "elsewhere" / "README.md").read_text()
    assert "Self-distillation" in card


def test_the_mixture_has_history_and_human_completions(
    build_rest_em, small_model, gold_answers, tmp_path
) -> None:
    """As the policy's last round had them."""
    build_rest_em(
        student_model=small_model, gold_dataset=gold_answers(8), gold_ratio=0.5, history_rounds=1,
        num_generations=8,
    ).train()  # fmt: skip
    funnel = RunFolder.open(tmp_path / "run").lines[1]["funnel"]
    assert funnel["gold"]
    assert funnel["history"]
    assert rows_of(tmp_path / "run" / "student", 0) == rows_of(tmp_path / "run", 1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"student_model": "./nowhere/at/all"}, FileNotFoundError, r"student_model='./nowhere"),
        ({"student_model": 3}, TypeError, r"student_model is a int; give its Hub id or folder"),
        ({"student_args": {"max_steps": 1}}, ValueError, r"student_args.*without a `student_model`"),
        ({"student_model": "x", "student_args": {"steps": 1}}, TypeError, r"steps"),
        ({"student_model": "x", "student_args": 1e-3}, TypeError, r"give a trl.SFTConfig"),
        ({"student_model": "x", "student_args": {"bf16": True}}, ValueError, r"Set both alike"),
        ({"student_model": "x", "loss_weighting": "reward"}, ValueError, r"loss_weighting='filter'"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work_are_refused_before_anything_is_loaded(
    build_rest_em, settings, error, message
) -> None:
    with pytest.raises(error, match=message):
        build_rest_em(**settings)


def test_the_folder_of_an_adapter_is_refused(build_rest_em, small_model) -> None:
    (Path(small_model) / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is the folder of an adapter. Merge it"):
        build_rest_em(student_model=small_model)


def test_examples_that_do_not_fit_the_student_are_counted(
    build_rest_em, small_model, tmp_path, caplog
) -> None:
    build_rest_em(num_rounds=1, num_generations=8).train()
    rows = rows_of(tmp_path / "run", 0)
    most = sorted(len(ids) for ids, _ in rows)[len(rows) // 2]
    long = sum(len(ids) > most for ids, _ in rows)
    assert 0 < long < len(rows)
    trainer = build_rest_em(
        num_rounds=1, num_generations=8, student_model=small_model,
        student_args={"max_length": most},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    assert f"{long} of {len(rows)} examples are longer than max_length={most}" in caplog.text
    (line,) = RunFolder.open(tmp_path / "run" / "student").lines
    assert line["funnel"]["too_long"] == long
    assert line["examples"] == len(rows) - long
