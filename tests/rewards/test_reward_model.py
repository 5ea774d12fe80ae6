import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from trl_selfplay.rewards.reward_model import RewardModel
from trl_selfplay.rewards.scoring import Scorer


@pytest.fixture
def classifier(word_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(word_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=12, num_labels=1,
        pad_token_id=word_tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


PROMPTS = ["Q 1 ", "Q 1 + 2 = ? ", "Q "]
COMPLETIONS = ["A 3", "so 3 4 5", "no"]


def score(scorer, prompts=PROMPTS, completions=COMPLETIONS):
    return [r[0] for r in scorer.score(prompts, completions, [[]] * len(prompts), {})]


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_do_not_depend_on_padding_or_company(classifier, word_tokenizer, side) -> None:
    """VF-15: each equals the classifier alone on that text."""
    word_tokenizer.padding_side = side
    scores = score(Scorer(classifier, reward_processing_classes=word_tokenizer))
    for prompt, completion, found in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        ids = word_tokenizer(prompt + completion, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = classifier(input_ids=ids).logits[0, 0].item()
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_text_beyond_the_context_is_no_verdict(classifier, word_tokenizer) -> None:
    judge = RewardModel(classifier, word_tokenizer)
    scores = judge(["Q " * 12, "", "Q "], ["A", "", "A"])
    assert [score is None for score in scores] == [True, True, False]
    assert scores.causes == {
        0: "the text is longer than the reward model's context",
        1: "the text is empty",
    }


def test_batches_hold_at_most_so_many_tokens_and_change_no_score(
    classifier, word_tokenizer, monkeypatch
) -> None:
    """VF-5: eleven texts of 1 to 11 words, as many together as fit."""
    prompts, completions = ["Q "] * 11, ["5 " * count for count in range(11)]
    sizes = []
    forward = classifier.forward
    monkeypatch.setattr(
        classifier, "forward", lambda **kwargs: sizes.append(kwargs["input_ids"].shape) or forward(**kwargs)
    )  # fmt: skip
    expected = RewardModel(classifier, word_tokenizer)(prompts, completions)
    assert sizes == [(11, 11)]
    for most in (1, 22, 40):
        sizes.clear()
        judge = RewardModel(classifier, word_tokenizer, max_tokens_per_batch=most)
        assert judge(prompts, completions) == pytest.approx(expected, abs=1e-4)
        assert sum(rows for rows, _ in sizes) == 11
        assert all(rows == 1 or rows * length <= most for rows, length in sizes)
    with pytest.raises(ValueError, match="max_tokens_per_batch=0"):
        RewardModel(classifier, word_tokenizer, max_tokens_per_batch=0)


def test_a_model_is_taken_by_path(classifier, word_tokenizer, tmp_path) -> None:
    folder = tmp_path / "critic"
    classifier.save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    by_path = Scorer([str(folder)])
    assert by_path.names == ("critic",)
    given = Scorer(classifier, reward_processing_classes=word_tokenizer)
    assert score(by_path) == pytest.approx(score(given), abs=1e-5)


def test_a_classifier_with_two_labels_is_refused(word_tokenizer, tmp_path) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=2)  # fmt: skip
    two_labels = LlamaForSequenceClassification(config)
    with pytest.raises(ValueError, match="2 labels"):
        Scorer(two_labels, reward_processing_classes=word_tokenizer)
    two_labels.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"'{tmp_path}' has 2 labels"):
        Scorer(str(tmp_path))


def test_a_checkpoint_without_a_trained_head_is_refused(word_tokenizer, tmp_path) -> None:
    """Its scores would come from the random numbers that a head begins with."""
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks trained weights \(score.weight\)"):
        Scorer(str(tmp_path))


@pytest.mark.parametrize("eos", ["4", None])
def test_without_a_padding_token_the_score_is_read_at_the_last_token(
    classifier, word_tokenizer, eos
) -> None:
    """Also where that is EOS; each equals the classifier alone, which reads the last token."""
    word_tokenizer.pad_token, word_tokenizer.eos_token = None, eos
    classifier.config.pad_token_id = None
    texts = ["Q 1 4", "Q 1 + 2 4", "Q", "Q 4 4 4"]
    scores = RewardModel(classifier, word_tokenizer)(["Q "] * 4, texts)
    assert word_tokenizer.pad_token is None
    classifier.config.pad_token_id = None
    for text, found in zip(texts, scores, strict=True):
        ids = word_tokenizer("Q " + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = classifier(input_ids=ids).logits[0, 0].item()
        assert found == pytest.approx(expected, abs=1e-4)


def test_chats_are_rendered_with_the_model_s_own_template(classifier, word_tokenizer) -> None:
    """And scored without the tokens that the tokenizer would add to plain text."""
    word_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} ? {% endfor %}"
    prompts = [[{"role": "user", "content": "Q 1"}], [{"role": "user", "content": "Q 1 + 2"}]]
    completions = [[{"role": "assistant", "content": c}] for c in ("A 3", "so 3")]
    scorer = Scorer(classifier, reward_processing_classes=word_tokenizer)
    same = score(scorer, ["Q 1 ? ", "Q 1 + 2 ? "], ["A 3 ? ", "so 3 ? "])
    assert score(scorer, prompts, completions) == pytest.approx(same, abs=1e-5)


def test_the_tokenizer_s_limit_counts_too(classifier, word_tokenizer) -> None:
    """As for models with positions that no token can take."""
    word_tokenizer.model_max_length = 4
    scorer = Scorer(classifier, reward_processing_classes=word_tokenizer)
    scores = score(scorer, ["Q 1 ", "Q 1 "], ["A 3", "A 3 4"])
    assert scores[0] is not None
    assert scores[1] is None


def test_each_model_is_one_of_several_functions(classifier, word_tokenizer) -> None:
    def ones(completions, **kwargs):
        return [1.0] * len(completions)

    scorer = Scorer(
        [ones, classifier],
        reward_weights=[2.0, 1.0],
        reward_processing_classes=[None, word_tokenizer],
    )
    rewards = scorer.score(PROMPTS, COMPLETIONS, [[]] * 3, {})
    alone = score(Scorer(classifier, reward_processing_classes=word_tokenizer))
    assert [r[0] for r in rewards] == [1.0] * 3
    assert [scorer.weighted(r) for r in rewards] == pytest.approx([2.0 + a for a in alone])


def test_a_token_opens_the_model_s_repository_and_appears_nowhere(
    classifier, word_tokenizer, tmp_path, caplog
) -> None:
    """Neither in what a failure says nor in the log; the tokenizer is opened with it too."""
    secret = "hf_" + "s" * 30
    classifier.save_pretrained(tmp_path / "critic")
    scorer_arguments = {"model_init_kwargs": {"token": secret, "trust_remote_code": False}}
    with pytest.raises(Exception, match=r"tokenizer|vocab|Tokenizer") as without_tokenizer:
        Scorer(str(tmp_path / "critic"), **scorer_arguments)
    word_tokenizer.save_pretrained(tmp_path / "critic")
    scorer = Scorer(str(tmp_path / "critic"), **scorer_arguments)
    assert score(scorer, ["Q "], ["A"])[0] is not None
    with pytest.raises(OSError, match=r"connect|nothing") as without_model:
        Scorer("nobody/nothing", **scorer_arguments)
    for failure in (without_tokenizer, without_model):
        assert secret not in str(failure.value)
    assert secret not in caplog.text
