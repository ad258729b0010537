"""The CPU kernel of ``cats::rms_norm``."""

import pytest
import torch

from cats.ops.rms_norm.cpu import refuses
from tests.ops.cases import needs_cpu_kernels, tolerance

DTYPES = [torch.float32, torch.bfloat16]


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 1, 31), (1, 2, 3, 576)])
def test_rms_norm_matches(shape, dtype):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    # rounded before the weight is multiplied
    expected = (exact.to(dtype).double() * weight.double()).to(dtype)
    with torch.inference_mode():
        actual = torch.ops.cats.rms_norm.default(x, weight, 1e-3)
    torch.testing.assert_close(actual, expected, **tolerance("cpu", dtype))


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rms_norm_shows_nan_and_inf(dtype, value):
    x, one = torch.randn(2, 1, 1, 6, dtype=dtype), torch.ones(6, dtype=dtype)
    x[1, 0, 0, 4] = value
    with torch.inference_mode():
        normed = torch.ops.cats.rms_norm.default(x, one, 1e-5)
    assert normed[0].isfinite().all()
    assert normed[1, 0, 0, 4].isnan()


@needs_cpu_kernels
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_rms_norm_passes_opcheck(needs_gradient):
    x, weight = torch.randn(2, 3, 1, 8, requires_grad=needs_gradient), torch.randn(8)
    torch.library.opcheck(torch.ops.cats.rms_norm.default, (x, weight, 1e-5))


@needs_cpu_kernels
def test_rms_norm_of_what_does_not_fit_is_an_error():
    x = torch.randn(2, 3, 1, 8)
    with torch.inference_mode():
        assert refuses(x, torch.ones(8)) is None
        for bad in (x.half(), x[..., ::2], x[..., :7].contiguous()):
            assert refuses(bad, torch.ones(8)) is not None
            with pytest.raises(RuntimeError, match="cats::rms_norm: expected contiguous x"):
                torch.ops.cats.rms_norm.default(bad, torch.ones(8), 1e-5)
