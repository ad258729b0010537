"""The backends of ``cats::packed_gated_mlp``."""

from cats.ops.choosing import Backends
from cats.ops.packed_mlp.arguments import PackedMLPArguments

__all__ = ["BACKENDS"]

BACKENDS: Backends[PackedMLPArguments] = Backends(
    "packed_gated_mlp",
    package="cats.ops.packed_mlp",
    names=("reference", "dense", "cpu", "triton", "cuda"),
    order={"cuda": ("cuda", "triton", "dense"), "cpu": ("cpu", "dense")},
)
