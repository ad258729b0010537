"""Which backend runs a call of ``cats::gated_experts``: one module each, beside this one."""

from cats.ops.choosing import Backends
from cats.ops.experts.arguments import ExpertsArguments

__all__ = ["BACKENDS"]

BACKENDS: Backends[ExpertsArguments] = Backends(
    "gated_experts",
    package="cats.ops.experts",
    names=("reference", "dense", "cpu", "triton"),
    order={"cuda": ("triton", "dense"), "cpu": ("cpu", "dense")},
)
