import math

import pytest
import torch

from cats.functional import ACTIVATIONS, cats_activation, keep_mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_value_equal_to_threshold_is_kept(dtype):
    x = torch.tensor([0.25, -0.25, 0.125, -0.125, 0.0], dtype=dtype)
    assert keep_mask(x, 0.25).tolist() == [True, True, False, False, False]


def test_nan_is_kept_and_shows():
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.1])
    assert keep_mask(x, math.inf).tolist() == [True, True, True, False]
    assert cats_activation(x, 1.0).isnan().tolist() == [True, False, False, False]


def test_zero_threshold_keeps_everything():
    assert keep_mask(torch.tensor([0.0, -0.0, 1e-45]), 0.0).all()


def test_bfloat16_is_compared_in_float32():
    # in bfloat16 this threshold rounds to 1.0, and 1.0 would be kept
    x = torch.tensor([1.0], dtype=torch.bfloat16)
    threshold = torch.tensor(1.001)
    assert not keep_mask(x, threshold).any()
    assert (x.abs() >= threshold.bfloat16()).all()


def test_float64_is_compared_in_float64():
    x = torch.tensor([0.5 - 1e-12], dtype=torch.float64)
    assert x.float() >= 0.5
    assert not keep_mask(x, torch.tensor(0.5)).any()


def test_threshold_of_each_neuron_meets_its_neuron():
    x = torch.ones(2, 3, 4)
    kept = keep_mask(x, torch.tensor([0.5, 1.0, 1.5, 2.0]))
    assert torch.equal(kept, torch.tensor([True, True, False, False]).expand(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kept_values_are_unchanged_bit_for_bit(dtype):
    x = torch.randn(1000).to(dtype)
    y = cats_activation(x, 0.5)
    kept = x.float().abs() >= 0.5
    assert y.dtype == dtype
    assert torch.equal(y[kept], x[kept])
    assert (y[~kept] == 0).all()
    assert 0 < kept.sum() < 1000


def test_gradient_is_one_where_kept_and_zero_where_dropped():
    x = torch.tensor([0.1, -0.5, 2.0], requires_grad=True)
    cats_activation(x, 0.5).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_agrees_with_float64_formula(name):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    expected = {
        "silu": x / (1 + (-x).exp()),
        "gelu": x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": x * (1 + inner.tanh()) / 2,
        "relu": x.clamp(min=0),
    }[name]
    torch.testing.assert_close(ACTIVATIONS[name](x), expected, rtol=1e-12, atol=1e-12)
