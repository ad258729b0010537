"""Make Triton's interpreter compute with bfloat16 as a GPU does.

It cuts bits off where a GPU rounds, and multiplies the bits of bfloat16 as integers in ``tl.dot``.
"""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch):
    """Import it into a module of tests to have it there."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def exact_cast(self, source, target):
        types = source.dtype.scalar, target.scalar
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(_widened(source.data), tl.float32)
        return cast(self, source, target)

    def exact_dot(self, a, b, *args):
        a, b = (
            TensorHandle(_widened(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t
            for t in (a, b)
        )
        return dot(self, a, b, *args)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", exact_cast)
    for name in ("create_fp_ext", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, exact_cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", exact_dot)


def _rounded(values: np.ndarray) -> np.ndarray:
    bits = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16)
    return bits.numpy().view(np.uint16)


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
