"""What renders a run's prompts is fixed when the run begins, and what can't be rendered is said."""

import logging
from datetime import datetime

import pytest
from datasets import Dataset, load_from_disk
from transformers import TrainerCallback
from transformers.utils import chat_template_utils

from trl_selfplay.rollouts import rendering
from trl_selfplay.rollouts.record import load_rollouts

# Single digits, words of the word tokenizer.
DATED = (
    "{{ strftime_now('%-d') }} {% for m in messages %}{{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)


@pytest.fixture
def set_day(monkeypatch):
    """Return a function that sets the day that templates and the package see."""

    def set_day(day):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime(2024, 2, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        monkeypatch.setattr(rendering, "datetime", Clock)

    return set_day


class Killed(Exception):
    pass


class StopAtTraining(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        raise Killed


def chats(rows, *columns):
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": row["prompt"]}], **{c: row[c] for c in columns}}
            for row in rows
        ]
    )


def all_right(completions, **kwargs):
    return [1.0] * len(completions)


def shards(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_a_run_resumed_after_midnight_keeps_its_samples(
    build_star, sums, word_tokenizer, set_day, tmp_path, caplog
) -> None:
    word_tokenizer.chat_template = DATED
    data = {
        "train_dataset": chats(sums(12), "solution"),
        "eval_dataset": chats(sums(6, 30), "solution"),
        "rationalize": False,
        "num_rounds": 1,
        "reward_funcs": all_right,
    }
    set_day(3)
    first = build_star(**data, callbacks=[StopAtTraining()])
    with pytest.raises(Killed):
        first.train()
    before = shards(tmp_path / "run")
    set_day(4)
    resumed = build_star(**data)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert "planned" not in caplog.text
    after = shards(tmp_path / "run")
    assert {path: after[path] for path in before} == before
    sampled = [r for path in after if path.parent.name in ("samples", "evaluation")
               for r in load_rollouts(path)]  # fmt: skip
    assert {r.prompt.split()[0] for r in sampled} == {"3"}
    other = build_star("other", **data)
    assert other.self_play.formatter.start.day == 4  # a run of its own has its own time


def test_spin_pairs_are_of_one_prompt_however_long_the_run(
    build_spin, answers, word_tokenizer, set_day, tmp_path
) -> None:
    """Completions are tokenized at construction, prompts sampled from anew in each round."""
    word_tokenizer.chat_template = DATED
    rows = answers(12).map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"].strip()}],
        },
        remove_columns=["prompt", "completion"],
    )

    class NextDay(TrainerCallback):
        def on_round_begin(self, args, state, control, round_index, **kwargs):
            set_day(4 + round_index)

    set_day(3)
    build_spin(train_dataset=rows, num_rounds=2, callbacks=[NextDay()]).train()
    for index in range(2):
        folder = tmp_path / "run" / "_rounds" / f"round-{index:03d}"
        pairs = load_from_disk(str(folder / "dataset"))
        scored = {tuple(ids) for ids in pairs["prompt_ids"]}
        sampled = {
            r.prompt_ids
            for path in (folder / "samples").glob("*.parquet")
            for r in load_rollouts(path)
        }
        assert scored <= sampled
        assert {word_tokenizer.decode(ids[0]) for ids in sampled} == {"3"}


def test_a_run_does_not_go_on_with_another_chat_template(
    build_star, sums, word_tokenizer, tmp_path
) -> None:
    word_tokenizer.chat_template = DATED
    data = {
        "train_dataset": chats(sums(12), "solution"),
        "rationalize": False,
        "num_rounds": 1,
        "reward_funcs": all_right,
    }
    with pytest.raises(Killed):
        build_star(**data, callbacks=[StopAtTraining()]).train()
    word_tokenizer.chat_template = DATED + " "
    with pytest.raises(ValueError, match="the chat template is not the one"):
        build_star(**data).train(resume_from_checkpoint=True)


def test_prompts_longer_than_a_training_row_are_refused_at_construction(build_star, sums) -> None:
    rows = [*sums(8), {"prompt": "Q 1 + 2 + 3 + 4 + 5 = ?", "solution": "5"}]
    with pytest.raises(ValueError, match=r"1 of 9 prompts of `train_dataset`.*\(rows 8\)"):
        build_star(train_dataset=Dataset.from_list(rows), max_length=10)


def test_completions_that_training_has_no_room_for_are_said_before_and_counted_after(
    build_star, caplog
) -> None:
    trainer = build_star(
        max_length=9,
        num_rounds=1,
        rationalize=False,
        reward_funcs=all_right,
    )
    assert "Set max_length=14 to keep all" in caplog.text
    trainer.train()
    funnel = trainer.run.lines[0]["funnel"]
    assert funnel["too_long"] > 0
    total = funnel["too_long"] + funnel["kept"]
    assert f"{funnel['too_long']} of {total} completions that could have been" in caplog.text


def test_a_solution_is_needed_by_hints_and_by_functions_that_take_it(build_star, sums) -> None:
    prompts = sums(12).remove_columns("solution")
    with pytest.raises(ValueError, match=r"no column 'solution'.*rationalize=True"):
        build_star(train_dataset=prompts)
    with pytest.raises(ValueError, match=r"contains_solution.*'solution'"):
        build_star(train_dataset=prompts, rationalize=False)

    def has_digit(completions, **kwargs):
        return [float(any(c.isdigit() for c in text)) for text in completions]

    trainer = build_star(
        train_dataset=prompts, rationalize=False, reward_funcs=has_digit, num_rounds=1
    )
    trainer.train()
    assert trainer.run.lines[0]["examples"] > 0


def test_a_stop_string_may_be_one_text(build_star) -> None:
    assert build_star(stop_strings="so").args.stop_strings == ["so"]
    with pytest.raises(ValueError, match=r"stop_strings.*empty"):
        build_star(stop_strings=["so", ""])


@pytest.mark.parametrize("name", ["tokenize", "tools", "add_generation_prompt", "chat_template"])
def test_arguments_that_rendering_passes_itself_are_refused(build_star, name) -> None:
    with pytest.raises(ValueError, match=f"chat_template_kwargs has '{name}'"):
        build_star(chat_template_kwargs={name: False})


def test_control_tokens_in_prompts_are_said_and_can_be_split(build_star, sums, caplog) -> None:
    rows = [*sums(8), {"prompt": "Q <eos> = ?", "solution": "5"}]
    data = {"train_dataset": Dataset.from_list(rows)}
    build_star(**data)
    assert "`train_dataset`: 1 of 9 rows have special tokens" in caplog.text
    # The tokenizer of these tests knows <eos> as a word too, so that nothing can be split.
    with pytest.raises(ValueError, match="vocabulary of plain text has '<eos>' too"):
        build_star(**data, sanitize_control_tokens=True)
    built = build_star(sanitize_control_tokens=True)
    assert built.self_play.formatter.sanitize_control_tokens
