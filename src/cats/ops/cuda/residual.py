"""The struct of ``residual.cuh``."""

import ctypes

from cats.ops.cuda.arguments import Arguments, Pointer

__all__ = ["Residual"]


class Residual(Arguments):
    """What a kernel reads of the residual stream, and the norms on the way; see the source."""

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
