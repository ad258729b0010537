"""The struct of ``residual.cuh``."""

import ctypes

from cats.ops.cuda.arguments import Arguments, Pointer

__all__ = ["Residual"]


class Residual(Arguments):
    """``struct Residual`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("base", Pointer),
        ("delta", Pointer),
        ("delta_weight", Pointer),
        ("sum", Pointer),
        ("weight", Pointer),
        ("epsilon", ctypes.c_float),
        ("weight_offset", ctypes.c_float),
    )
