"""The CPU kernel of ``cats::rotary``."""

import pytest
import torch

from cats.ops.rotary.cpu import refuses
from tests.ops.cases import needs_cpu_kernels

DTYPES = [torch.float32, torch.bfloat16]


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angle_batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2])
def test_rotary_gives_the_bits_of_torch(tokens, angle_batch, dtype):
    x = torch.randn(3, 5, tokens, 14, dtype=dtype)
    cos, sin = torch.randn(2, angle_batch, 1, tokens, 14, dtype=dtype)
    rotated = torch.cat([-x[..., 7:], x[..., :7]], -1)
    with torch.inference_mode():
        actual = torch.ops.cats.rotary.default(x, cos, sin)
        assert torch.equal(actual, x * cos + rotated * sin)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rotary_shows_nan_and_inf(dtype, value):
    x, angles = torch.randn(2, 1, 1, 6, dtype=dtype), torch.ones(1, 1, 1, 6, dtype=dtype)
    x[1, 0, 0, 4] = value
    with torch.inference_mode():
        turned = torch.ops.cats.rotary.default(x, angles, angles)
    assert turned[0].isfinite().all()
    assert not turned[1, 0, 0, [1, 4]].isfinite().any()
    assert turned[1, 0, 0, [0, 2, 3, 5]].isfinite().all()


@needs_cpu_kernels
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_rotary_passes_opcheck(needs_gradient):
    x = torch.randn(2, 3, 1, 8, requires_grad=needs_gradient)
    cos, sin = torch.randn(2, 2, 1, 1, 8)
    torch.library.opcheck(torch.ops.cats.rotary.default, (x, cos, sin))


@needs_cpu_kernels
def test_rotary_of_what_does_not_fit_is_an_error():
    x, cos = torch.randn(2, 3, 1, 8), torch.randn(2, 1, 1, 8)
    with torch.inference_mode():
        assert refuses(x, cos, cos) is None
        for bad in (x.half(), x[..., ::2], x[..., :7].contiguous(), x[0]):
            assert refuses(bad, cos, cos) is not None
            with pytest.raises(RuntimeError, match="cats::rotary: expected contiguous x"):
                torch.ops.cats.rotary.default(bad, cos, cos)
        for bad in (cos[:1], cos.bfloat16(), cos[..., :4].contiguous()):
            assert refuses(x, cos, bad) is not None
            with pytest.raises(RuntimeError, match="cats::rotary: expected contiguous x"):
                torch.ops.cats.rotary.default(x, cos, bad)
