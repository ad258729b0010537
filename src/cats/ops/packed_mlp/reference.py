"""The definition of ``cats::packed_gated_mlp``: that of ``cats::gated_mlp`` on the same numbers."""

from torch import Tensor

from cats.ops.mlp import reference
from cats.ops.mlp.arguments import GatedMLPArguments
from cats.ops.packed_mlp.arguments import PackedMLPArguments
from cats.ops.quantised import numbers_of_columns, numbers_of_rows


def packed_gated_mlp(arguments: PackedMLPArguments) -> Tensor:
    """See :func:`cats.ops.packed_mlp.packed_gated_mlp`. Sums in float32."""
    a, dtype = arguments, arguments.x.dtype
    numbers = GatedMLPArguments(
        a.x,
        numbers_of_rows(a.gate, a.rows, a.arithmetic, dtype),
        numbers_of_rows(a.up, a.rows, a.arithmetic, dtype),
        numbers_of_columns(a.packed_down, a.arithmetic, dtype),
        a.thresholds,
        a.activation,
        a.router,
        a.gate_bias,
        a.up_bias,
        a.down_bias,
        a.product_thresholds,
    )
    return reference.gated_mlp(numbers)


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def refuses(arguments: PackedMLPArguments) -> str | None:
    """None: it takes every call."""
    return None
