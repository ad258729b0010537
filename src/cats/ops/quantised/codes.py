"""What layouts of packed rows and of packed columns have in common: codes, scales, zero points."""

from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from cats.errors import ShapeError, UnsupportedModelError

__all__ = ["SCALE_CODES", "SCALE_DTYPES", "CodeLayout", "ZeroMode", "check_codes", "check_given"]

# Types of scales, by the number that kernels know them by.
SCALE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SCALE_DTYPES = tuple(SCALE_CODES)


class ZeroMode(IntEnum):
    """What a row holds besides codes and scales; the macro ``ZERO_MODE``."""

    CONSTANT = 0
    """Nothing: all groups have the same zero point, and no shift."""
    ZEROS = 1
    """An integer zero point for each group."""
    SHIFTS = 2
    """A shift for each group, in the dtype of the scales; the zero point is constant."""


class CodeLayout(Protocol):
    """A layout of rows or of columns."""

    @property
    def bits(self) -> int: ...

    @property
    def scale_dtype(self) -> torch.dtype: ...

    @property
    def zero_mode(self) -> ZeroMode: ...

    @property
    def zero(self) -> int: ...


def check_codes(layout: CodeLayout, two_zeros: str) -> None:
    """Check bits, scales and zero point of a layout.

    Args:
        layout: Of rows or columns.
        two_zeros: The message where it has a constant zero point beside others.

    Raises:
        UnsupportedModelError: If no kernel reads such codes or scales.
        ShapeError: If the zero point is not a code, or is one of two.
    """
    if layout.bits not in (4, 8):
        raise UnsupportedModelError(f"codes must have 4 or 8 bits, got {layout.bits}")
    if layout.scale_dtype not in SCALE_CODES:
        raise UnsupportedModelError(
            f"scales must be float16, bfloat16 or float32, got {layout.scale_dtype}"
        )
    if not 0 <= layout.zero < 2**layout.bits:
        raise ShapeError(f"the zero point {layout.zero} is not a code of {layout.bits} bits")
    if layout.zero and layout.zero_mode == ZeroMode.ZEROS:
        raise ShapeError(two_zeros)


def check_given(layout: CodeLayout, name: str, table: Tensor | None, mode: ZeroMode) -> None:
    """Raise ShapeError for zeros or shifts that the layout does not have, or lacks."""
    if (table is not None) != (layout.zero_mode == mode):
        raise ShapeError(f"{name} must be given with {mode!r} alone")
