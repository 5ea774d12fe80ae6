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
from trl_selfplay.rewards import JudgeReward
from trl_selfplay.trainers.student import StudentTrainer


@pytest.fixture
def save_small_model(tmp_path, tiny_model):
    """Return a function that saves a smaller model with a tokenizer and returns its folder."""

    def save(tokenizer, **changes) -> str:
        folder = tmp_path / "small-model"
        changes = {"hidden_size": 16, "num_hidden_layers": 1, **changes}
        tiny_model(tokenizer, seed=7, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def small_model(save_small_model, word_tokenizer) -> str:
    return save_small_model(word_tokenizer)


def rows_of(folder: Path, index: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rows = load_from_disk(str(folder / "_rounds" / f"round-{index:03d}" / "dataset")).to_list()
    return sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def refuse_sampling(trainer) -> None:
    def sample(*args):
        raise AssertionError("the policy's sampler was asked")

    trainer.self_play.collector.sampler.sample = sample


def test_a_finished_run_trains_a_student_without_a_generation_call(
    build_rest_em, small_model, tmp_path, sums, gold_answers
) -> None:
    """RA-14: its rows are those of the last round, history and human completions included."""
    settings = {
        "num_generations": 8, "history_rounds": 1, "gold_dataset": gold_answers(8), "gold_ratio": 0.5,
        "eval_dataset": sums(4, first=20), "num_generations_eval": 0, "save_strategy": "no",
    }  # fmt: skip
    trainer = build_rest_em(**settings)
    with pytest.raises(ValueError, match=r"needs a `student_model`"):
        trainer.train_student()
    trainer.train()
    funnel = RunFolder.open(tmp_path / "run").lines[1]["funnel"]
    assert funnel["gold"]
    assert funnel["history"]
    trainer = build_rest_em(student_model=small_model, **settings)
    refuse_sampling(trainer)
    trainer.train(resume_from_checkpoint=True)
    student = tmp_path / "run" / "student"
    assert rows_of(student, 0) == rows_of(tmp_path / "run", 1)
    run = RunFolder.open(student)
    assert run.rounds == []
    (line,) = run.lines
    for scores in (line["eval_before"], line["eval"]):
        assert scores["eval_accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    before, after = load_file(f"{small_model}/model.safetensors"), weights_of(student)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


class StopAt(TrainerCallback):
    """Ends a training at a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_goes_on_leaves_an_earlier_student_alone(
    build_rest_em, small_model, tmp_path, sums
) -> None:
    """A student of unfinished rounds, by `train_student()`; and what is no run of these prompts."""
    trainer = build_rest_em(num_rounds=2, student_model=small_model)
    with pytest.raises((ValueError, FileNotFoundError), match=r"no folder `_rounds`"):
        trainer.train_student()
    build_rest_em(num_rounds=1).train()
    refuse_sampling(trainer)
    trainer.train_student()
    student = tmp_path / "run" / "student"
    assert rows_of(student, 0) == rows_of(tmp_path / "run", 0)
    before = weights_of(student)
    with pytest.raises(ValueError, match=r"holds a student that was trained on other examples"):
        build_rest_em(num_rounds=2, student_model=small_model).train(resume_from_checkpoint=True)
    assert len(RunFolder.open(tmp_path / "run").lines) == 2
    after = weights_of(student)
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = build_rest_em(
        train_dataset=sums(12, first=40), student_model=small_model,
        student_args={"output_dir": str(tmp_path / "other")},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"prompts that .* has examples of are not in"):
        other.train_student()


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


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"student_model": "./nowhere/at/all"}, FileNotFoundError, r"student_model='./nowhere"),
        ({"student_model": 3}, TypeError, r"student_model is a int; give its Hub id or folder"),
        ({"student_args": {"max_steps": 1}}, ValueError, r"student_args.*without a `student_model`"),
        ({"student_model": "x", "student_args": {"steps": 1}}, TypeError, r"steps"),
        ({"student_model": "x", "student_args": 1e-3}, TypeError, r"give a trl.SFTConfig"),
        ({"student_model": "x", "student_args": {"bf16": True}}, ValueError, r"Set both alike"),
        ({"student_model": "x", "student_args": {"temperature_eval": 0.5, "max_steps": 1, "num_rounds": 5}},
         ValueError, r"student_args has temperature_eval=0.5, num_rounds=5: a student plays no rounds"),
        ({"student_model": "x", "student_args": {"max_completion_length": 8, "greater_is_better": False}},
         ValueError, r"student_args has greater_is_better=False: .* for both"),
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


def test_a_student_that_would_judge_itself_is_refused(build_rest_em, small_model, sums) -> None:
    judge = JudgeReward(
        "policy", template="{completion} so", verdict=r"(\d)", scale=(0, 9), max_completion_length=4
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"a student would judge itself"):
        build_rest_em(
            student_model=small_model, reward_funcs=judge, eval_dataset=sums(2, first=20)
        )  # fmt: skip


def test_a_student_with_another_tokenizer_learns_the_same_texts(
    build_rest_em, save_small_model, byte_tokenizer, word_tokenizer, tmp_path
) -> None:
    """Prompts and completions, tokenized once, with the loss on the completion and its end alone."""
    args = SFTConfig(
        str(tmp_path / "elsewhere"), max_steps=2, learning_rate=5e-3, report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=False, per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    small = save_small_model(byte_tokenizer)
    build_rest_em(num_rounds=1, student_model=small, student_args=args).train()

    def texts(folder: Path, tokenizer) -> list[tuple[str, str]]:
        def decode(ids) -> str:
            return tokenizer.decode([i for i in ids if i != -100], skip_special_tokens=True)

        return sorted((decode(ids), decode(labels).strip()) for ids, labels in rows_of(folder, 0))

    student = tmp_path / "elsewhere"
    assert texts(student, byte_tokenizer) == texts(tmp_path / "run", word_tokenizer)
    for ids, labels in rows_of(student, 0):
        assert ids[-1] == labels[-1] == byte_tokenizer.eos_token_id
    (line,) = RunFolder.open(student).lines
    assert (line["steps"], line["learning_rate"]) == (2, 5e-3)  # settings of its own
    assert "Self-distillation" in (student / "README.md").read_text()
    assert not (tmp_path / "run" / "student").exists()


def test_a_student_with_a_smaller_context_learns_what_fits(
    build_rest_em, save_small_model, word_tokenizer, tmp_path, sums, caplog
) -> None:
    """What doesn't is counted; its held-out completions are shorter, too."""
    heldout = {"eval_dataset": sums(4, first=20), "num_generations_eval": 0}
    settings = {"num_rounds": 1, "num_generations": 8, **heldout}
    build_rest_em(**settings).train()
    rows = rows_of(tmp_path / "run", 0)
    prompt = max(labels.count(-100) for _, labels in rows)
    context = prompt + 4
    small = save_small_model(word_tokenizer, max_position_embeddings=context)
    long = sum(len(ids) > context for ids, _ in rows)
    assert 0 < long < len(rows)
    build_rest_em(student_model=small, **settings).train(resume_from_checkpoint=True)
    assert f"{long} of {len(rows)} examples are longer than max_length={context}" in caplog.text
    assert "holds 4 tokens after the longest held-out prompt" in caplog.text
    (line,) = RunFolder.open(tmp_path / "run" / "student").lines
    assert line["funnel"]["too_long"] == long
    assert line["examples"] == len(rows) - long
