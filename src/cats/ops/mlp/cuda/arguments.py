"""The struct of ``gated_mlp.cu``."""

import ctypes

from cats.ops.cuda.arguments import Arguments, Pointer
from cats.ops.cuda.residual import Residual

__all__ = ["MLPArguments"]


class MLPArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("x", Pointer),
        ("router", Pointer),
        ("other", Pointer),
        ("down", Pointer),
        ("thresholds", Pointer),
        ("product_thresholds", Pointer),
        ("router_bias", Pointer),
        ("other_bias", Pointer),
        ("down_bias", Pointer),
        ("out", Pointer),
        ("sums", Pointer),
        ("partials", Pointer),
        ("counters", Pointer),
        ("neurons", ctypes.c_int),
        ("fixed_runs", ctypes.c_int),
        ("long_tickets", ctypes.c_int),
        ("short_rows", ctypes.c_int),
        ("gate_is_router", ctypes.c_int),
        ("request_early", ctypes.c_int),
        ("residual", Residual),
    )
