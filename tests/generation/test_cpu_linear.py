from unittest import mock

import pytest
import torch
from causal_classes import build_tiny
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_selfplay.generation import cpu_linear
from trl_selfplay.generation.cpu_linear import fast_linear_layers
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def on_a_cpu_that_gains():
    """As on a CPU with AVX-512 that isn't Intel's; the operator itself runs on any."""
    with mock.patch.object(cpu_linear, "is_onednn_faster", return_value=True):
        yield


class Products:
    """Counts products by oneDNN while it calls the real operator."""

    def __init__(self, monkeypatch) -> None:
        self.count = 0
        real = torch.ops.mkldnn._linear_pointwise

        def counted(*args):
            self.count += 1
            return real(*args)

        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)


@pytest.fixture
def products(monkeypatch) -> Products:
    return Products(monkeypatch)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (2, 5, 7)])
def test_products_are_those_of_a_float64_product(shape, bias, products) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 9, bias=bias), torch.randn(shape)
    exact = x.double() @ layer.weight.double().T
    if bias:
        exact = exact + layer.bias.double()
    with fast_linear_layers(layer), torch.no_grad():
        found = layer(x)
    assert products.count == 1
    torch.testing.assert_close(found, exact.float())


@needs_onednn
def test_gradients_autocast_and_empty_batches_take_the_usual_product(products) -> None:
    layer, x = nn.Linear(7, 9), torch.randn(3, 7)
    with fast_linear_layers(layer):
        layer(x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert layer(x[:0]).shape == (0, 9)
    assert layer.weight.grad is not None
    assert products.count == 0


def test_layers_have_their_own_forward_again_after_an_error() -> None:
    layer = nn.Linear(7, 9)
    with pytest.raises(KeyError), fast_linear_layers(layer):
        raise KeyError
    assert "forward" not in vars(layer)


def test_other_precisions_and_layers_with_a_forward_of_their_own_stay() -> None:
    half, hooked = nn.Linear(7, 9, dtype=torch.bfloat16), nn.Linear(7, 9)
    hooked.forward = own = lambda x: x
    with fast_linear_layers(nn.Sequential(half, hooked)):
        assert "forward" not in vars(half)
        assert hooked.forward is own
    assert hooked.forward is own


@needs_onednn
def test_samples_are_those_of_the_usual_product(word_tokenizer, products) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build_tiny("llama"), LoraConfig(init_lora_weights=False))
    sampler = TransformersSampler(model, word_tokenizer)
    requests = [SampleRequest((5, 6, 7 + i % 3), i) for i in range(12)]
    options = SamplingOptions(max_completion_length=8)
    fast = dict(sampler.sample(requests, options, 4))
    assert products.count > 0
    with mock.patch.object(cpu_linear, "is_onednn_faster", return_value=False):
        assert dict(sampler.sample(requests, options, 4)) == fast
