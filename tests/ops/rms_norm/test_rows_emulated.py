"""The CUDA kernel of the norms of several rows on a CPU, by an emulator."""

import pytest
import torch

from cats.errors import UnsupportedModelError
from cats.ops.cuda.arguments import address
from cats.ops.cuda.residual import Residual
from tests.ops.emulator import emulated_kernels, needs_emulator

pytestmark = needs_emulator
BF16, F16 = torch.bfloat16, torch.float16


def norm_of(x, weight, offset):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + offset)


@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "dtype", "offset"), [(1, 8, BF16, 0), (3, 520, F16, 1), (16, 4104, BF16, 1)]
)
def test_output_is_that_of_the_formula(monkeypatch, rows, width, dtype, offset, has_delta):
    from cats.ops.rms_norm import rows as norm

    base, delta = torch.randn(rows, width), torch.randn(rows, width)
    weight, delta_weight = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    total, out = torch.full_like(base, torch.nan), torch.full((rows, width), torch.nan, dtype=dtype)
    x = Residual(base=address(base), weight=address(weight), epsilon=1e-5, weight_offset=offset)
    if has_delta:
        x.delta, x.delta_weight = address(delta), address(delta_weight)
        x.sum = address(total)
    with emulated_kernels(monkeypatch):
        launch = norm.launch(x, out)
        launch.function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    expected = base.double()
    if has_delta:
        expected = expected + norm_of(delta.double(), delta_weight, offset)
        torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    tolerance = {BF16: 1e-2, F16: 2e-3}[dtype]
    torch.testing.assert_close(
        out.double(), norm_of(expected, weight, offset), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(("width", "reason"), [(20, "multiple of 16 bytes"), (20000, "at most")])
def test_rows_that_do_not_fit_are_refused(monkeypatch, width, reason):
    from cats.ops.rms_norm import rows as norm

    with emulated_kernels(monkeypatch), pytest.raises(UnsupportedModelError, match=reason):
        norm.launch(Residual(), torch.zeros(2, width, dtype=BF16))
