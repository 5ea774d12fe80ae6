"""The likelihood of completions as a reward, against plain logits."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_selfplay.rewards import VerifierReward
from trl_selfplay.rewards.scoring import Scorer

PROMPTS = ["Q 1 ", "Q 1 + 2 = ? ", "Q "]
COMPLETIONS = ["A 3", "so 3 4 5", "no"]


@pytest.fixture
def model(tiny_model, word_tokenizer):
    return tiny_model(word_tokenizer)


@pytest.fixture
def adapted(tiny_model, word_tokenizer):
    """A model with an adapter that changes it."""
    torch.manual_seed(1)
    adapted = get_peft_model(
        tiny_model(word_tokenizer), LoraConfig(r=2, target_modules="all-linear")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 1.0)
    return adapted


def token_log_probs(model, tokenizer, prompt, completion, ids=None):
    """The log-prob of each token of a completion and its end, one row alone."""
    asked = tokenizer(prompt)["input_ids"]
    answered = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id] if ids is None else ids
    both = torch.tensor([[*asked, *answered]])
    with torch.no_grad():
        logps = model.eval()(input_ids=both).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, both[0, 1:, None])[len(asked) - 1 :, 0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("most", [1, 16, 4096])
def test_the_scores_are_those_of_each_row_alone(model, word_tokenizer, side, most) -> None:
    """VF-15 and VF-5: whatever the side of padding and the batches."""
    word_tokenizer.padding_side = side
    expected = [
        token_log_probs(model, word_tokenizer, p, c)
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    total, mean = (
        VerifierReward(model, tokenizer=word_tokenizer, score=score, max_tokens_per_batch=most)
        for score in ("sum", "mean")
    )
    assert total(PROMPTS, COMPLETIONS) == pytest.approx(
        [float(e.sum()) for e in expected], abs=1e-4
    )
    assert mean(PROMPTS, COMPLETIONS) == pytest.approx(
        [float(e.mean()) for e in expected], abs=1e-4
    )


def test_the_tokens_count_and_not_the_text(model, word_tokenizer) -> None:
    """As they were sampled, also where the text would be other tokens; an end is added once."""
    three, end = word_tokenizer("3")["input_ids"], word_tokenizer.eos_token_id
    verifier = VerifierReward(model, tokenizer=word_tokenizer)
    expected = float(token_log_probs(model, word_tokenizer, "Q ", "", [*three, end]).sum())
    for ids in ([*three], [*three, end]):
        assert verifier(["Q "], ["something else"], completion_ids=[ids]) == pytest.approx(
            [expected], abs=1e-4
        )


def test_the_ratio_is_against_the_model_without_its_adapters_or_a_given_one(
    adapted, tiny_model, word_tokenizer
) -> None:
    base = tiny_model(word_tokenizer)
    expected = [
        float(token_log_probs(adapted, word_tokenizer, p, c).sum())
        - float(token_log_probs(base, word_tokenizer, p, c).sum())
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert max(map(abs, expected)) > 1e-2
    for reference in (None, base):
        verifier = VerifierReward(adapted, reference, word_tokenizer, score="ratio")
        assert verifier(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)
    same = VerifierReward(base, tiny_model(word_tokenizer), word_tokenizer, score="ratio")
    assert same(PROMPTS, COMPLETIONS) == pytest.approx([0.0] * 3, abs=1e-6)


def test_a_verifier_is_taken_by_its_folder_also_as_an_adapter(
    adapted, saved_tiny_model, word_tokenizer, tmp_path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_tiny_model)
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    word_tokenizer.save_pretrained(tmp_path / "adapter")
    for source, loaded in (
        (tmp_path / "adapter", lora),
        (saved_tiny_model, AutoModelForCausalLM.from_pretrained(saved_tiny_model)),
    ):
        scores = VerifierReward(str(source))(PROMPTS, COMPLETIONS)
        expected = VerifierReward(loaded, tokenizer=word_tokenizer)(PROMPTS, COMPLETIONS)
        assert scores == pytest.approx(expected, abs=1e-5)


def test_chats_are_rendered_with_a_generation_prompt(model, word_tokenizer) -> None:
    word_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if tools %}1 {% endif %}{% if add_generation_prompt %}so {% endif %}"
        "{% if twice %}so {% endif %}"
    )
    verifier = VerifierReward(model, tokenizer=word_tokenizer)
    chat = [[{"role": "user", "content": "Q 1"}]]
    answer = [[{"role": "assistant", "content": "A 3"}]]

    def text(prompt):
        return pytest.approx(verifier([prompt], ["A 3"]), abs=1e-5)

    assert verifier(chat, answer) == text("Q 1 so ")
    assert verifier(chat, answer, tools=[[{"name": "f"}]]) == text("Q 1 1 so ")
    assert verifier(chat, answer, chat_template_kwargs=[{"twice": True}]) == text("Q 1 so so ")
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": "A 3"}]}]]
    assert verifier(chat, parts) == text("Q 1 so ")
    silent = verifier(chat, [[{"role": "assistant", "content": None}]])
    assert silent == pytest.approx(verifier(["Q 1 so "], [""]), abs=1e-5)
    twice = VerifierReward(model, tokenizer=word_tokenizer, chat_template_kwargs={"twice": True})
    assert twice(chat, answer) == text("Q 1 so so ")


def test_a_row_beyond_the_context_is_no_verdict(tiny_model, word_tokenizer) -> None:
    model = tiny_model(word_tokenizer, max_position_embeddings=6)
    scores = VerifierReward(model, tokenizer=word_tokenizer)(["Q ", "Q "], ["A 3", "A " * 5])
    assert scores[0] is not None
    assert scores[1] is None
    assert scores.causes == {1: "prompt and completion are longer than the verifier's context"}


def test_an_empty_completion_has_the_likelihood_of_its_end(model, word_tokenizer) -> None:
    verifier = VerifierReward(model, tokenizer=word_tokenizer)
    end = [word_tokenizer.eos_token_id]
    expected = float(token_log_probs(model, word_tokenizer, "Q ", "", end).sum())
    assert verifier(["Q "], [""]) == pytest.approx([expected], abs=1e-5)
    assert verifier(["Q "], [""], completion_ids=[[]]) == pytest.approx([expected], abs=1e-5)
    assert verifier([], []) == []


def test_what_cannot_work_is_refused(model, word_tokenizer) -> None:
    for arguments, message in (
        ({"score": "median"}, "score='median'"),
        ({"score": "ratio"}, "needs a `reference`"),
        ({"reference": model}, "reads no `reference`"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0"),
    ):
        with pytest.raises(ValueError, match=message):
            VerifierReward(model, tokenizer=word_tokenizer, **arguments)
    verifier = VerifierReward(model, tokenizer=word_tokenizer)
    with pytest.raises(ValueError, match="2 completion_ids were given for 1 completions"):
        verifier(["Q "], ["A"], completion_ids=[[5], [6]])
    with pytest.raises(ValueError, match=r"token 999.*must have the verifier's tokenizer"):
        verifier(["Q "], ["A"], completion_ids=[[999]])


def test_a_verifier_is_a_reward_function_and_reads_no_other_columns(model, word_tokenizer) -> None:
    """VF-14; and the columns that it reads don't tell prompts apart."""
    from trl_selfplay.rewards.functions import columns_read

    verifier = VerifierReward(model, tokenizer=word_tokenizer)
    assert columns_read(verifier, ["prompt", "solution", "level"]) == []
    scorer = Scorer(verifier)
    assert scorer.names == ("verifier_sum",)
    ids = [[*word_tokenizer(c)["input_ids"]] for c in COMPLETIONS]
    scores = scorer.score(PROMPTS, COMPLETIONS, ids, {"solution": ["3"] * 3, "level": [1] * 3})
    assert [s for (s, *_) in scores] == pytest.approx(verifier(PROMPTS, COMPLETIONS), abs=1e-5)


def test_a_verifier_is_the_reward_of_grpo_trainer(
    model, tiny_model, word_tokenizer, tmp_path
) -> None:
    """VF-14: two steps."""
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model, VerifierReward(tiny_model(word_tokenizer), tokenizer=word_tokenizer, score="mean"),
        GRPOConfig(
            str(tmp_path / "grpo"), max_steps=2, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=4, use_cpu=True, bf16=False, report_to=[], logging_steps=1,
            gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": p, "solution": "3"} for p in PROMPTS]),
        processing_class=word_tokenizer,
    )  # fmt: skip
    trainer.train()
    means = [line["rewards/verifier_mean/mean"] for line in trainer.state.log_history[:2]]
    assert all(mean < 0.0 for mean in means)
