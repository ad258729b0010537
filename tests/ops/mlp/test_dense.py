import pytest
import torch

from cats.ops.mlp import dense, triton

pytestmark = pytest.mark.skipif(
    triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}"
)


# Triton's interpreter computes with numpy, which warns of inf * 0
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", ["gate", "up"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("with_product", [False, True], ids=["", "product"])
def test_triton_product_matches_pytorch(dtype, router, activation, with_product, device):
    from cats.ops.mlp.triton.prefill import thresholded_product

    g, u = torch.randn(2, 7, 431, device=device).to(dtype).unbind()
    g[0, 0], u[1, 1], u[2, 2] = float("nan"), float("inf"), float("nan")
    thresholds = torch.full((431,), 0.2, device=device)
    thresholds[:5] = float("inf")
    product_thresholds = thresholds / 2 if with_product else None
    args = (g, u, thresholds, activation, router, product_thresholds)
    expected, actual = dense.thresholded_product(*args), thresholded_product(*args)
    # rounding may decide about products next to their threshold, and only about those
    decided = (actual == 0) == (expected == 0)
    torch.testing.assert_close(actual[decided], expected[decided], equal_nan=True)
    undecided = torch.maximum(actual.abs(), expected.abs())[~decided].float()
    assert ((undecided - 0.1).abs() < 1e-3).all()
    assert 0.05 < (expected == 0).float().mean() < 0.95


def test_dropped_neuron_ignores_an_infinite_partner(device):
    g, u = torch.full((1, 4), 0.1, device=device), torch.full((1, 4), float("inf"), device=device)
    h = dense.thresholded_product(g, u, torch.ones(4, device=device), "silu", "gate", None)
    assert torch.equal(h, torch.zeros_like(h))
