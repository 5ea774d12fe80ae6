import pytest
import torch
from naive_thoughts import naive_scores

from trl_selfplay import QuietSTaRModel
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE
from trl_selfplay.trainers.quiet_star.objective import ObjectiveSums
from trl_selfplay.trainers.quiet_star.observation import (
    HelpfulThought,
    ThoughtScores,
    describe_thoughts,
    measure_gains,
    most_helpful,
    plot_gains,
    thought_sums,
)
from trl_selfplay.trainers.quiet_star.sampling import (
    SampledThoughts,
    ThinkingColumns,
    can_think,
    choose_columns,
    sample_thoughts,
    thought_keys,
)
from trl_selfplay.trainers.quiet_star.storage import ThoughtSettings


@pytest.fixture
def batch():
    """One row, three columns of which the last isn't real, two thoughts, two tokens ahead."""
    talk = torch.tensor([[[[-1.0, -1.0], [-3.0, -1.0]], [[-2.0, -2.0], [-2.5, -2.5]]]])
    talk = torch.cat([talk, torch.zeros(1, 1, 2, 2)], 1)
    base = torch.tensor([[[-2.0, -1.5], [-1.0, -2.0], [0.0, 0.0]]])
    advantage = torch.tensor([[[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]]])
    weights = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9]).view(1, 2, 2, 2)
    weights = torch.cat([weights, torch.zeros(1, 1, 2, 2)], 1)
    scores = ThoughtScores(base, talk, torch.zeros(1, 3, 2), advantage, weights)
    columns = torch.tensor([[0, 1, 1]])
    thinking = ThinkingColumns(columns, torch.tensor([[True, True, False]]), columns)
    tokens = torch.tensor([[[4, 5], [4, 5], [6, 7], [8, 9], [0, 0], [0, 0]]])
    entropies = torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0, 9.0]])
    return scores, thinking, SampledThoughts(tokens, entropies)


def test_the_logged_numbers_of_a_worked_example(batch) -> None:
    scores, thinking, thoughts = batch
    sums = ObjectiveSums(torch.tensor(6.0), torch.tensor(3.75), torch.tensor(0.5))
    rows = thought_sums(scores, sums, torch.tensor(3), thinking, thoughts)
    logged = {n.removeprefix("thought/"): (a / b).item() for n, (a, b) in rows.items()}
    # gains of the thoughts: 1.5 and -0.5, then -1 and -2
    assert logged == pytest.approx(
        {
            "base_loss": 2.0, "talk_loss": 1.875, "policy_loss": 0.25, "gain": -0.25,
            "reward": -0.5, "helped": 0.5, "advantage": 0.375, "reinforced": 0.5,
            "spread": 0.75, "entropy": 2.5, "all_equal": 0.5, "weight_mean": 0.375,
            "weight_p05": 0.035, "weight_p50": 0.35, "weight_p95": 0.795, "weight_min": 0.0,
            "weight_max": 0.9,
        }, abs=1e-6,
    )  # fmt: skip


def test_batches_without_thoughts_have_the_same_names_and_count_nothing(batch) -> None:
    scores, thinking, thoughts = batch
    nothing = ThinkingColumns(thinking.columns, thinking.is_real & False, thinking.positions)
    sums = ObjectiveSums(*torch.zeros(3).unbind())
    empty = thought_sums(scores, sums, torch.tensor(0), nothing, thoughts)
    full = thought_sums(scores, sums, torch.tensor(3), thinking, thoughts)
    assert list(empty) == list(full)
    assert all(denominator == 0 for _, denominator in empty.values())


def test_the_thoughts_that_helped_most_come_first(batch) -> None:
    scores, thinking, thoughts = batch
    ids = torch.tensor([[11, 12, 13, 14]])
    found = most_helpful(ids, torch.ones_like(ids), thinking, thoughts, scores.gains(), 2, limit=5)
    assert found == [
        HelpfulThought((11,), (4, 5), (12, 13), 1.5),
        HelpfulThought((11, 12), (6, 7), (13, 14), -1.0),
    ]


def test_a_thought_is_shown_between_its_texts(word_tokenizer) -> None:
    ids = word_tokenizer("Q 1 + 2 so 3 yes")["input_ids"]
    thought = HelpfulThought(tuple(ids[:4]), tuple(ids[4:6]), tuple(ids[6:]), 0.456)
    assert describe_thoughts([thought], word_tokenizer) == "+0.46 nats  …'Q 1 + 2' ⟨'so 3'⟩ 'yes'"


def test_a_thought_cant_act_on_a_terminal(byte_tokenizer) -> None:
    ids = byte_tokenizer("\x1b[2J")["input_ids"]
    thought = HelpfulThought(tuple(ids), tuple(ids), tuple(ids), 1.0)
    shown = describe_thoughts([thought], byte_tokenizer)
    assert shown.count(r"\x1b[2J") == 3
    assert "\x1b" not in shown


def test_gains_along_a_text_are_those_of_its_thoughts(family_model, text, tmp_path) -> None:
    causal_lm = family_model()
    model = QuietSTaRModel(causal_lm, ThoughtSettings(3))
    row = text.ids[0]
    gains = measure_gains(model, row.tolist(), num_thoughts=2, seed=4)
    mask = torch.ones_like(row[None])
    thinking = choose_columns(can_think(row[None], mask, 1), mask, 1.0, 4, 0, "eval", [0])
    anchors = thinking.columns.repeat_interleave(2, 1)
    thoughts = sample_thoughts(
        causal_lm, getattr(causal_lm, ATTRIBUTE).start_and_end()[0], row[None], mask, anchors, 3,
        thought_keys(thinking, 2, 4, 0, "eval", [0]),
    )  # fmt: skip
    with torch.no_grad():
        plain = causal_lm(row[None]).logits[0].log_softmax(-1)
        for column in range(11):
            base = plain[column, row[column + 1]]
            talk = [
                naive_scores(causal_lm, row, column, thoughts.tokens[0, 2 * column + s], 1).talk
                for s in range(2)
            ]
            expected = (torch.cat(talk).mean() - base).item()
            assert gains.gains[column + 1] == pytest.approx(expected, abs=1e-4)
            assert gains.base[column + 1] == pytest.approx(base.item(), abs=1e-4)
    assert (gains.gains[0], len(gains.gains)) == (0.0, 12)
    assert gains.helpful[0].gain >= gains.helpful[-1].gain


def test_the_gain_of_thinking_is_drawn(family_model, text, word_tokenizer, tmp_path) -> None:
    model = QuietSTaRModel(family_model(vocab_size=21), ThoughtSettings(2))
    gains = measure_gains(model, word_tokenizer("Q 1 + 2 = ? so 3 yes")["input_ids"])
    plot_gains(gains, word_tokenizer, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").read_bytes()[:4] == b"\x89PNG"
