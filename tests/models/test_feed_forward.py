"""The fused activation: closer to the exact result than stock, and only where nothing is in its way."""

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward

from longtake.models.numerics import feed_forward

NEEDS_BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)


@pytest.fixture
def ffn():
    torch.manual_seed(0)
    return FeedForward(48, inner_dim=192, activation_fn="gelu-approximate").eval().requires_grad_(False)


@pytest.fixture
def calls(monkeypatch):
    """Counts the fused kernel's calls, and lets them through."""
    counted, kernel = [], torch.ops.mkldnn._linear_pointwise

    def spy(*args):
        counted.append(1)
        return kernel(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    return counted


@NEEDS_BFLOAT16
def test_fused_result_is_no_further_from_the_exact_one_than_stock(ffn, calls):
    x = torch.randn(2, 50, 48).bfloat16()
    half = copy.deepcopy(ffn).bfloat16()
    exact = copy.deepcopy(half).double()(x.double())
    with torch.no_grad():
        fused, stock = feed_forward(half, x), half(x)
    assert len(calls) == 1 and fused.dtype == torch.bfloat16 and fused.shape == stock.shape
    errors = [(result - exact).abs().mean() for result in (fused, stock)]
    assert errors[0] <= 1.02 * errors[1]
    assert errors[0] < 0.01 * exact.abs().mean()


def test_float32_is_stock(ffn, calls):
    x = torch.randn(2, 5, 48)
    with torch.no_grad():
        assert torch.equal(feed_forward(ffn, x), ffn(x))
    assert not calls


@pytest.mark.parametrize("layer", ["subclass", "hook", "replaced forward", "gradients"])
def test_a_layer_that_somebody_changed_is_called_as_it_is(ffn, calls, layer):
    half = copy.deepcopy(ffn).bfloat16()
    proj, seen = half.net[0].proj, []
    if layer == "subclass":
        proj.__class__ = type("LoraLinear", (torch.nn.Linear,), {})
    elif layer == "hook":
        proj.register_forward_hook(lambda *_: seen.append(1))
    elif layer == "replaced forward":
        proj.forward = proj.forward
    with torch.set_grad_enabled(layer == "gradients"):
        feed_forward(half, torch.randn(1, 5, 48).bfloat16())
    assert not calls and len(seen) == (layer == "hook")
