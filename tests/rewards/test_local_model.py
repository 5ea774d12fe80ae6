"""Replies of a local model against what `generate` gives."""

import re

import pytest
import torch
from chat_server import serving
from tokenizers import AddedToken

from trl_selfplay.rewards import JudgeReward
from trl_selfplay.rewards.local_model import LocalModel, split_control_tokens

TAG = re.compile(r"Verdict (\w{6}): <")
QUESTIONS = ["Q 1 + 2 = ?", "Q 3 + 4 = ? so 7", "Q 1 + 2 = ? no A"]


@pytest.fixture
def model(tiny_model, word_tokenizer):
    return tiny_model(word_tokenizer, seed=3)


def ask(local, *questions, temperature=0.0, max_completion_length=6):
    return local.ask(
        questions, temperature=temperature, max_completion_length=max_completion_length
    )


def generate(model, tokenizer, text):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
    new = out[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), tokenizer.eos_token_id not in new


def test_greedy_replies_equal_generate_in_any_batch(model, word_tokenizer) -> None:
    local = LocalModel(model, word_tokenizer)
    replies = ask(local, *QUESTIONS)
    expected = [generate(model, word_tokenizer, question) for question in QUESTIONS]
    assert [(r.text, r.is_cut_off) for r in replies] == expected
    assert [ask(local, question)[0] for question in QUESTIONS] == replies


def test_sampled_replies_depend_on_the_question_alone(model, word_tokenizer) -> None:
    local = LocalModel(model, word_tokenizer)
    replies = ask(local, *QUESTIONS, temperature=1.0)
    assert ask(local, *QUESTIONS[::-1], temperature=1.0) == replies[::-1]
    assert replies != ask(local, *QUESTIONS)


def test_a_question_without_room_for_the_reply_abstains(model, word_tokenizer) -> None:
    local = LocalModel(model, word_tokenizer)
    short, long = ask(local, "Q", "Q " * 507)
    assert short.text is not None
    assert (long.text, long.cause) == (None, "the question is too long for the judge")
    assert ask(local, "Q " * 507) == [long]
    assert ask(local) == []


def test_a_model_without_room_for_any_reply_is_refused(model, word_tokenizer) -> None:
    with pytest.raises(ValueError, match="context of 512 tokens"):
        JudgeReward(model, tokenizer=word_tokenizer, max_completion_length=450)


def test_a_chat_model_gets_the_question_as_the_users_message(
    tiny_model, chat_tokenizer, monkeypatch
) -> None:
    local = LocalModel(tiny_model(chat_tokenizer), chat_tokenizer)
    seen = []
    sample = local._sampler.sample
    monkeypatch.setattr(
        local._sampler,
        "sample",
        lambda requests, *args: seen.extend(requests) or sample(requests, *args),
    )
    ask(local, "a<eos>b")
    assert chat_tokenizer.decode(list(seen[0].prompt_ids)) == "<user>a< eos>b<eos><assistant>"


def test_control_tokens_in_a_question_are_split(word_tokenizer) -> None:
    assert split_control_tokens("x<eos><pad>", word_tokenizer) == "x< eos>< pad>"


def test_a_folder_judges_as_its_loaded_model_does(saved_tiny_model, word_tokenizer) -> None:
    """A form of its own, since a random model names no tag."""
    form = {"template": "{completion} so", "verdict": r".*?(\d).*", "scale": (0, 9)}
    judge = JudgeReward(str(saved_tiny_model), temperature=1.0, max_completion_length=64, **form)
    completions = ["1", "2 3", "4 + 5", "9 9", "so 8"]
    scores = judge(prompts=["Q"] * 5, completions=completions)
    assert any(score is not None for score in scores)
    assert judge(prompts=["Q"] * 5, completions=completions[::-1]) == scores[::-1]
    assert judge.identity["model"] == str(saved_tiny_model)


def test_judges_grade_for_grpo_trainer_and_the_policy_is_refused(
    tiny_model, word_tokenizer, sums, tmp_path
) -> None:
    """VF-14: two steps with a local model and a server; there is no phase for the policy to judge in."""
    from trl import GRPOConfig, GRPOTrainer

    def build(*functions):
        return GRPOTrainer(
            tiny_model(word_tokenizer), list(functions),
            GRPOConfig(
                str(tmp_path / "grpo"), max_steps=2, per_device_train_batch_size=4,
                num_generations=4, max_completion_length=8, use_cpu=True, bf16=False,
                report_to=[], logging_steps=1, gradient_checkpointing=False, save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=sums(8), processing_class=word_tokenizer,
        )  # fmt: skip

    def shorter(question):
        tag = TAG.search(question)[1]
        parts = question.split(f"--- {tag} ")
        first, second = (len(part) for part in parts if part.startswith("response"))
        return f"Verdict {tag}: {'tie' if first == second else 'A' if first < second else 'B'}"

    form = {"template": "{prompt} {completion} so", "verdict": r".*?(\d).*", "scale": (0, 9)}
    local = JudgeReward(
        tiny_model(word_tokenizer, seed=3), tokenizer=word_tokenizer, temperature=1.0,
        max_completion_length=64, **form,
    )  # fmt: skip
    local.__name__ = "local_judge"
    with serving(shorter) as server:
        pairwise = JudgeReward("m", against="samples", base_url=server.url)
        trainer = build(local, pairwise)
        trainer.train()
    steps = trainer.state.log_history[:2]
    assert all(0.0 < step["rewards/local_judge/mean"] < 1.0 for step in steps)
    assert [step["rewards/judge_reward/mean"] for step in steps] == pytest.approx([0.5, 0.5])
    assert steps[0]["judge/orders_disagree"] == 0.0
    with pytest.raises(RuntimeError, match=r"model='policy' judges .* GRPOTrainer"):
        build(JudgeReward("policy")).train()


def test_an_added_special_token_is_read_as_text_too(byte_tokenizer) -> None:
    """Chat models have tokens such as <|im_end|> that stand in no slot of their own."""
    byte_tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    split = split_control_tokens("a<|im_end|>b<eos>", byte_tokenizer)
    ids = byte_tokenizer(split, add_special_tokens=False).input_ids
    control = byte_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    assert not set(control) & set(ids)
    assert split == "a< |im_end|>b< eos>"
