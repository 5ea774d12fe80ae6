"""Students of runs with tools: what a tool said is never a target (RA-2), and no tool is asked (RA-14)."""

from collections import Counter

import pytest
import trl
from bigram_policy import (
    CHAT_STEPS,
    END,
    TEXT_STEPS,
    bigram_model,
    family_template,
    word_tokenizer,
)
from datasets import Dataset, load_from_disk
from patience import ENDS_S
from plain_tools import add
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_selfplay import ReSTEMConfig, ReSTEMTrainer
from trl_selfplay.rollouts.stored import load_kept

SETTINGS = {
    "num_rounds": 1, "num_generations": 6, "temperature": 1.0, "max_completion_length": 60,
    "max_steps": 2, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    "bf16": False, "gradient_checkpointing": False, "num_generations_eval": 0, "deduplicate": False,
    "reward_threshold": 0.0, "max_per_prompt": None, "few_shot_in_training": False,
}  # fmt: skip


def byte_tokenizer(template=None) -> PreTrainedTokenizerFast:
    """A token a byte, and the control tokens of Qwen's templates."""
    special = ["<pad>", END, "<unk>", "<|im_start|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token=END, unk_token="<unk>",
        extra_special_tokens=["<|im_start|>"], chat_template=template, padding_side="left",
    )  # fmt: skip


def likes_all(completions, **kwargs):
    return [1.0] * len(completions)


def rows_of(chat, first=0):
    prompts = [f"Q {i} + 4 = ?" for i in range(first, first + 3)]
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict({"prompt": prompts, "solution": ["yes"] * 3})


@pytest.fixture
def build(tmp_path, tiny_model):
    """Return a function that builds a trainer with a student whose tokenizer is given."""

    def build_one(chat, tokenizer=None):
        policys = word_tokenizer(family_template("qwen2_5") if chat else None)
        given = {}
        if tokenizer is not None:
            folder = tmp_path / "small"
            tiny_model(tokenizer, hidden_size=16, max_position_embeddings=4096).save_pretrained(
                folder
            )
            tokenizer.save_pretrained(folder)
            given = {"student_model": str(folder), "student_args": {"max_length": None}}
        return ReSTEMTrainer(
            bigram_model(policys, CHAT_STEPS if chat else TEXT_STEPS),
            ReSTEMConfig(str(tmp_path / "run"), tool_deadline=ENDS_S, **SETTINGS), processing_class=policys,
            train_dataset=rows_of(chat), eval_dataset=rows_of(chat, 5), reward_funcs=likes_all,
            tools=[add], **given,
        )  # fmt: skip

    return build_one


def stored_rows(folder):
    found = load_from_disk(str(folder / "_rounds" / "round-000" / "dataset")).to_list()
    return sorted((row["input_ids"], row["labels"]) for row in found)


def refuse(*args):
    raise AssertionError("a sampler or a tool was asked")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["react, same tokens", "react", "chat", "chat, template without tools"]
)
def test_a_student_learns_trajectories_without_what_tools_said(build, tmp_path, case) -> None:
    """RA-2 and RA-14; the whole text is what the student's template renders of the conversation."""
    chat = case.startswith("chat")
    build(chat).train()
    tokenizer = byte_tokenizer(family_template("qwen3") if chat else None)
    if case == "react, same tokens":
        tokenizer = word_tokenizer()
    if case == "chat, template without tools":
        tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
        with pytest.raises(
            ValueError, match=r"the chat template of .*small.* doesn't render tools"
        ):
            build(chat, tokenizer)
        return
    trainer = build(chat, tokenizer)
    trainer.self_play.collector.sampler.sample = refuse
    trainer.train(resume_from_checkpoint=True)
    of_policy, of_student = (stored_rows(tmp_path / name) for name in ("run", "run/student"))
    if case == "react, same tokens":
        assert of_student == of_policy
        return
    kept = load_kept(trainer.run.folder(0))
    prompts = {row.prompt_id: row.prompt for row in trainer.self_play.rows}
    learnt = Counter()
    for ids, labels in of_student:
        pieces = ["", ""]
        for token, label in zip(ids, labels, strict=True):
            pieces[label != -100] += tokenizer.decode([token])
        learnt[tuple(pieces)] += 1
    if chat:
        whole = Counter(
            tokenizer.apply_chat_template(
                [*prompts[r.prompt_id], *r.messages],
                tools=[add],
                tokenize=False,
                chat_template=trl.get_training_chat_template(tokenizer),  # Qwen3's drops thoughts
            ).rstrip("\n")
            for r in kept
        )
        assert Counter(map(tokenizer.decode, (ids for ids, _ in of_student))) == whole
        assert sum("<tool_response>\n7\n</tool_response>" in masked for masked, _ in learnt)
    assert sum("7" in masked for masked, _ in learnt)
    for own in (own for _, own in learnt):
        assert "7" not in own
        assert own.endswith(END)
    called = sum(n for (_, own), n in learnt.items() if "add" in own)
    assert called == sum(r.completion_mask is not None for r in kept) > 0
