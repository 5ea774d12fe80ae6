"""What TRL's own trainers make of exported rows."""

from collections import Counter

import pyarrow.parquet as pq
import pytest
from bigram_policy import CHAT_STEPS, TEXT_STEPS, bigram_model, family_template, word_tokenizer
from datasets import Dataset, load_dataset, load_from_disk
from patience import ENDS_S
from plain_tools import add, look_up
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer, STaRConfig, STaRTrainer
from trl_selfplay.inspection.export import export_run
from trl_selfplay.inspection.run_folder import RunFolder

pytestmark = pytest.mark.slow

PRINTABLE = [chr(code) for code in range(33, 127)]
SETTINGS = {
    "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False, "use_cpu": True,
    "bf16": False, "max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no",
    "logging_steps": 1, "learning_rate": 1e-2,
}  # fmt: skip


def has_even_length(completions, **kwargs):
    """A reward that half of a random model's completions get."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text) % 2 == 0) for text in texts]


@pytest.fixture(params=["text", "chat"])
def run(request, tmp_path, tiny_model, chat_tokenizer):
    """A STaR run of one round, whose prompts are text or messages; its completions end by chance."""
    prompts = [f"Q{i}" for i in range(12)]
    if request.param == "chat":
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    trainer = STaRTrainer(
        tiny_model(chat_tokenizer),
        STaRConfig(
            str(tmp_path / "run"), num_rounds=1, num_generations=32, max_completion_length=16,
            rationalize=False, temperature=1.0, tool_deadline=ENDS_S, stop_strings=PRINTABLE, **SETTINGS,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts, "solution": ["x"] * 12}),
        processing_class=chat_tokenizer,
        reward_funcs=has_even_length,
    )  # fmt: skip
    trainer.train()
    return RunFolder.open(tmp_path / "run")


def load(run, kind, tmp_path):
    path = tmp_path / f"{kind}.jsonl"
    assert export_run(run, kind, path) > 1
    return load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "c"))


def test_trl_tokenizes_an_exported_row_as_it_was_trained_on(
    run, tmp_path, tiny_model, chat_tokenizer
) -> None:
    trained, theirs = tokens_of_rows(run, tmp_path, tiny_model(chat_tokenizer), chat_tokenizer)
    assert trained.total() > 10
    assert not trained - theirs


def tokens_of_rows(run, tmp_path, model, tokenizer):
    """Return the counted tokens and labels that a run trained on where text can tell them, and TRL's."""
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path / "sft"), **SETTINGS),
        train_dataset=load(run, "sft", tmp_path),
        processing_class=tokenizer,
    )

    def as_tokens(dataset):
        return Counter((tuple(row["input_ids"]), tuple(row["labels"])) for row in dataset)

    # A random model also writes what text can't tell: bytes that aren't UTF-8, and special tokens.
    trained = Counter(
        {
            (ids, labels): count
            for (ids, labels), count in as_tokens(
                load_from_disk(str(run.folder(0) / "dataset"))
            ).items()
            if "\ufffd" not in tokenizer.decode(ids)
            and not {tokenizer.pad_token_id, tokenizer.unk_token_id} & {*ids}
        }
    )
    return trained, as_tokens(trainer.train_dataset)


def test_trl_adds_the_line_break_of_a_template_behind_the_last_turn(
    tmp_path, tiny_model, byte_tokenizer
) -> None:
    byte_tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    byte_tokenizer.chat_template = family_template("qwen2_5")
    trainer = STaRTrainer(
        tiny_model(byte_tokenizer),
        STaRConfig(
            str(tmp_path / "run"), num_rounds=1, num_generations=8, max_completion_length=16,
            rationalize=False, temperature=1.0, tool_deadline=ENDS_S, stop_strings=PRINTABLE, max_length=None, **SETTINGS,
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": f"Q{i}"}] for i in range(6)]}
        ),
        processing_class=byte_tokenizer,
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
    )  # fmt: skip
    trainer.train()
    run = RunFolder.open(tmp_path / "run")
    trained, theirs = tokens_of_rows(run, tmp_path, tiny_model(byte_tokenizer), byte_tokenizer)
    (line_break,) = byte_tokenizer.encode("\n", add_special_tokens=False)
    assert trained.total() > 10
    longer = Counter(
        {
            ((*ids, line_break), (*labels, line_break)): count
            for (ids, labels), count in trained.items()
        }
    )
    assert not longer - theirs


def test_rows_are_what_rounds_with_history_trained_on(tmp_path, tiny_model, word_tokenizer) -> None:
    trainer = ReSTEMTrainer(
        tiny_model(word_tokenizer),
        ReSTEMConfig(
            str(tmp_path / "run"), num_rounds=2, history_rounds=1, max_per_prompt=1,
            num_generations=12, max_completion_length=8, temperature=1.0, stop_strings=["Q", "so"],
            **SETTINGS,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"Q {i} + 1 =" for i in range(10)]}),
        processing_class=word_tokenizer,
        reward_funcs=has_even_length,
    )  # fmt: skip
    trainer.train()
    run, eos = RunFolder.open(tmp_path / "run"), word_tokenizer.eos_token_id
    tokens = {
        (r.round_index, r.prompt_id, r.sample_index): (*r.prompt_ids, *r.completion_ids)
        for index in run.rounds
        for r, _ in run.rollouts(index)
    }
    assert [r.round_index for r, outcome in run.history(1) if outcome == "capped"]
    for index in run.rounds:
        rows = load_from_disk(str(run.folder(index) / "dataset"))
        trained = Counter(tuple(i for i in row["input_ids"] if i != eos) for row in rows)
        export_run(run, "sft", tmp_path / "rows.parquet", rounds=[index], overwrite=True)
        keys = pq.read_table(tmp_path / "rows.parquet").select(
            ["round", "prompt_id", "sample_index"]
        )
        exported = Counter(
            tuple(i for i in tokens[tuple(key.values())] if i != eos) for key in keys.to_pylist()
        )
        assert exported == trained


def test_trl_trains_on_every_kind(run, tmp_path, tiny_model, chat_tokenizer) -> None:
    tiny_model(chat_tokenizer).save_pretrained(tmp_path / "model")
    trainers = {
        "sft": (SFTTrainer, SFTConfig),
        "dpo": (DPOTrainer, DPOConfig),
        "kto": (KTOTrainer, KTOConfig),
    }
    for kind, (trainer_class, config_class) in trainers.items():
        trainer = trainer_class(
            model=str(tmp_path / "model"),
            args=config_class(str(tmp_path / f"run-{kind}"), **SETTINGS),
            train_dataset=load(run, kind, tmp_path),
            processing_class=chat_tokenizer,
        )
        trainer.train()
        assert trainer.state.log_history[0]["grad_norm"] > 0.0


def prompts_of(run, trainer, rows):
    """Return what TRL's trainer takes for the prompt of each row, and what the run did."""
    theirs, sampled = [], {r.prompt_id: r.prompt_ids for r, _ in run.rollouts(0)}
    for row in trainer.train_dataset:
        theirs.append(tuple(row["input_ids"][: sum(label == -100 for label in row["labels"])]))
    return theirs, [sampled[prompt_id] for prompt_id in rows["prompt_id"]]


@pytest.mark.parametrize(
    ("family", "eos"),
    [("llama3_1", "<|eot_id|>"), ("qwen3", "<|im_end|>"), ("gptoss", "<|return|>")],
)
def test_trl_shows_the_tools_of_a_run_in_the_same_tokens(
    tmp_path, tiny_model, byte_tokenizer, family, eos
) -> None:
    """Two tools, so that a table would give each schema the arguments of both."""
    byte_tokenizer.add_special_tokens({"eos_token": eos})
    byte_tokenizer.chat_template = family_template(family)
    prompts = [[{"role": "user", "content": f"Q{i}"}] for i in range(3)]
    trainer = STaRTrainer(
        tiny_model(byte_tokenizer, max_position_embeddings=4096),
        STaRConfig(
            str(tmp_path / "run"), num_rounds=1, num_generations=8, max_completion_length=16,
            rationalize=False, temperature=1.0, tool_deadline=ENDS_S, stop_strings=PRINTABLE, max_length=None, **SETTINGS,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=byte_tokenizer,
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
        tools=[add, look_up],
    )  # fmt: skip
    trainer.train()
    run = RunFolder.open(tmp_path / "run")
    rows = load(run, "sft", tmp_path)
    again = SFTTrainer(
        tiny_model(byte_tokenizer, max_position_embeddings=4096),
        SFTConfig(str(tmp_path / "sft"), max_length=None, **SETTINGS),
        train_dataset=rows,
        processing_class=byte_tokenizer,
    )
    theirs, ours = prompts_of(run, again, rows)
    assert theirs == ours
    assert "look_up" in byte_tokenizer.decode(ours[0])


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "words"])
def test_trl_trains_on_trajectories_and_on_prompts_that_tell_of_tools(tmp_path, chat) -> None:
    tokenizer = word_tokenizer(family_template("qwen2_5") if chat else None)
    steps = CHAT_STEPS if chat else TEXT_STEPS
    texts = [f"Q {i} + 4 = ?" for i in range(3)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts

    def answers(completions, **kwargs):  # in text prompts, results have no place
        return [float(chat or "Action" not in text) for text in completions]

    trainer = STaRTrainer(
        bigram_model(tokenizer, steps),
        STaRConfig(
            str(tmp_path / "run"), num_rounds=1, num_generations=8, max_completion_length=60,
            rationalize=False, temperature=1.0, tool_deadline=ENDS_S, **SETTINGS,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        reward_funcs=answers,
        tools=[add],
    )  # fmt: skip
    trainer.train()
    run = RunFolder.open(tmp_path / "run")
    rows = load(run, "sft", tmp_path)
    again = SFTTrainer(
        bigram_model(tokenizer, steps),
        SFTConfig(str(tmp_path / "sft"), **SETTINGS),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    theirs, ours = prompts_of(run, again, rows)
    if chat:  # in a tokenizer of words, a prompt's last token joins the completion's first
        ours = [ids[:-1] for ids in ours]
    assert theirs == ours
    assert any("tool_calls" in str(row["completion"]) for row in rows) == chat
    again.train()
    assert again.state.log_history[0]["grad_norm"] > 0.0


def test_trl_trains_on_the_dataset_of_a_round_where_no_form_has_a_place_for_trajectories(
    tmp_path,
) -> None:
    """With text prompts: the tokens of the run, and no loss on results."""
    tokenizer = word_tokenizer()
    trainer = STaRTrainer(
        bigram_model(tokenizer, TEXT_STEPS),
        STaRConfig(
            str(tmp_path / "run"), num_rounds=1, num_generations=8, max_completion_length=60,
            rationalize=False, temperature=1.0, tool_deadline=ENDS_S, **SETTINGS,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"Q {i} + 4 = ?" for i in range(3)]}),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **kwargs: [float("Action" in c) for c in completions],
        tools=[add],
    )  # fmt: skip
    trainer.train()
    with pytest.raises(
        ValueError, match=r"datasets\.load_from_disk of `_rounds/round-000/dataset`"
    ):
        export_run(RunFolder.open(tmp_path / "run"), "sft", tmp_path / "rows.jsonl")
    again = SFTTrainer(
        bigram_model(tokenizer, TEXT_STEPS),
        SFTConfig(str(tmp_path / "sft"), **SETTINGS),
        train_dataset=load_from_disk(str(tmp_path / "run/_rounds/round-000/dataset")),
        processing_class=tokenizer,
    )
    result = tokenizer.convert_tokens_to_ids("7\n")
    batch = again.data_collator(list(again.train_dataset))
    assert (batch["labels"][batch["input_ids"] == result] == -100).all()
    assert (batch["input_ids"] == result).any()
    again.train()
    assert again.state.log_history[0]["grad_norm"] > 0.0
