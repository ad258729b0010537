"""The backends of ``cats::packed_linear``."""

from cats.ops.choosing import Backends
from cats.ops.packed_linear.arguments import PackedLinearArguments

__all__ = ["BACKENDS"]

BACKENDS: Backends[PackedLinearArguments] = Backends(
    "packed_linear",
    package="cats.ops.packed_linear",
    names=("dense", "cpu", "triton"),
    order={"cuda": ("triton", "dense"), "cpu": ("cpu", "dense")},
)
