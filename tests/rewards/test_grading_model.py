import pytest
import torch
from torch import nn

from trl_selfplay.rewards.grading_model import GradingModel, token_batches
from trl_selfplay.rewards.scoring import Scorer


class Witness(nn.Linear):
    """A model that writes down where it is sent."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.sent: list[str] = []

    def to(self, device):
        self.sent.append(str(device))
        return super().to(device)


class Grader:
    """A reward function with a model of its own."""

    def __init__(self, model, device=None) -> None:
        self.grading_model = GradingModel(model, device)

    def __call__(self, completions, **kwargs):
        model = self.grading_model.ready()
        return model(torch.ones(len(completions), 2))[:, 0].tolist()


def test_the_batches_hold_each_sequence_once_and_the_longest_first() -> None:
    lengths = [3, 1, 9, 2, 3, 0]
    for most in (1, 4, 6, 9, 100):
        batches = list(token_batches(lengths, most))
        assert sorted(i for batch in batches for i in batch) == list(range(6))
        assert batches[0][0] == 2
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= most
    assert list(token_batches([], 8)) == []


def test_a_model_grades_on_the_trainer_s_device_unless_another_was_chosen() -> None:
    """`cpu:0` is another name of the CPU, so that a move to it can be seen without a second device."""
    free, chosen = Witness(), Witness()
    scorer = Scorer([Grader(free), Grader(chosen, "cpu")], device="cpu:0")
    assert free.sent == []  # not before it is needed
    scorer.score(["?"], ["!"], [[]], {})
    assert (free.sent, chosen.sent) == (["cpu:0"], [])


def test_a_model_stays_where_it_is_without_a_trainer() -> None:
    model = Witness()
    grader = Grader(model)
    grader(["!"])
    Scorer(grader).park_models()
    grader(["!"])
    assert model.sent == []


def test_the_model_is_in_eval_mode() -> None:
    model = nn.Dropout().train()
    GradingModel(model)
    assert not model.training


@pytest.mark.parametrize("trait", [{"is_quantized": True}, {"hf_device_map": {"a": 0, "b": 1}}])
def test_models_that_cannot_be_moved_stay_where_they_are(trait) -> None:
    model = Witness()
    for name, value in trait.items():
        setattr(model, name, value)
    grading_model = GradingModel(model, "cpu:0")
    assert grading_model.ready() is model
    grading_model.park()
    assert model.sent == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_parked_model_leaves_the_device_and_comes_back_alike() -> None:
    model = nn.Linear(1024, 1024)
    weight = model.weight.detach().clone()
    grading_model = GradingModel(model, "cuda")
    before = torch.cuda.memory_allocated()
    assert grading_model.ready().weight.device.type == "cuda"
    assert torch.cuda.memory_allocated() - before >= weight.numel() * 4
    grading_model.park()
    assert grading_model.device.type == "cpu"
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(grading_model.ready().weight.cpu(), weight)
