"""The operator ``cats::packed_gated_mlp``: a gated MLP over packed rows and columns of codes.

``arguments.py`` checks the arguments of a call, and ``backends.py`` chooses its backend.
``reference.py`` defines the result; ``dense``, ``cpu``, ``triton`` and ``cuda`` are faster.
``cats::dequantise_columns`` writes out a packed ``down``.
"""

import torch
from torch import Tensor

from cats.errors import ShapeError
from cats.ops.gradients import without_gradient
from cats.ops.packed_mlp.arguments import PackedMLPArguments
from cats.ops.packed_mlp.backends import BACKENDS
from cats.ops.packed_mlp.dense import dequantised
from cats.ops.quantised import ColumnLayout, PackedColumns, RowLayout

__all__ = ["PackedMLPArguments", "dequantise_columns", "packed_gated_mlp"]


def packed_gated_mlp(arguments: PackedMLPArguments, backend: str = "auto") -> Tensor:
    """Sparse gated MLP over codes: see :func:`cats.ops.gated_mlp`.

    Args:
        arguments: Its operands and options.
        backend: ``"auto"``, or one of ``reference``, ``dense``, ``cpu``, ``triton`` and ``cuda``.

    Returns:
        ``[B, D]`` in the dtype of ``x``; products are summed in float32.

    Raises:
        ShapeError: If a shape, dtype or layout does not fit.
        BackendError: If ``backend`` is named and cannot run this call.
    """
    a = arguments
    operands = (
        *a[:8],
        a.rows.numbers,
        a.columns.numbers,
        *a[10:],
        backend,
    )
    if torch.is_grad_enabled() and a.x.requires_grad:
        return without_gradient(_OPERATOR, *operands)
    out: Tensor = _OPERATOR(*operands)
    return out


def dequantise_columns(
    columns: PackedColumns, arithmetic: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """The numbers of packed columns, ``[D, F]`` in ``dtype``: one operator in a trace."""
    out: Tensor = torch.ops.cats.dequantise_columns(
        columns.columns, columns.scales, columns.extras, columns.layout.numbers, arithmetic, dtype
    )
    return out


def _packed_gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    down_scales: Tensor,
    down_extras: Tensor | None,
    thresholds: Tensor,
    activation: str,
    rows: list[int],
    columns: list[int],
    arithmetic: torch.dtype,
    router: str = "gate",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    product_thresholds: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    arguments = PackedMLPArguments(
        x,
        gate,
        up,
        down,
        down_scales,
        down_extras,
        thresholds,
        activation,
        RowLayout.of(rows),
        ColumnLayout.of(columns),
        arithmetic,
        router,
        gate_bias,
        up_bias,
        down_bias,
        product_thresholds,
    )
    return BACKENDS.checked(arguments, backend)(arguments)


def _dequantise_columns(
    columns: Tensor,
    scales: Tensor,
    extras: Tensor | None,
    layout: list[int],
    arithmetic: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    packed = PackedColumns(columns, scales, extras, ColumnLayout.of(layout))
    return dequantised(packed, arithmetic, dtype)


_LIBRARY = torch.library.Library("cats", "FRAGMENT")
_LIBRARY.define(
    "packed_gated_mlp(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor down_scales, "
    "Tensor? down_extras, Tensor thresholds, str activation, int[] rows, int[] columns, "
    "ScalarType arithmetic, str router='gate', Tensor? gate_bias=None, Tensor? up_bias=None, "
    "Tensor? down_bias=None, Tensor? product_thresholds=None, str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "dequantise_columns(Tensor columns, Tensor scales, Tensor? extras, int[] layout, "
    "ScalarType arithmetic, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name, _function in (
    ("packed_gated_mlp", _packed_gated_mlp),
    ("dequantise_columns", _dequantise_columns),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    # nothing to record: codes have no gradient, and the MLP handles that of x above
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("cats::packed_gated_mlp", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *args: object, **_: object) -> Tensor:
    # torch calls this as well where only the weights are on meta
    for name, tensor in (("gate", gate), ("up", up), ("down", down)):
        if tensor.device != x.device:
            raise ShapeError(
                f"expected {name} on {x.device}, got {tensor.device}: are weights offloaded?"
            )
    return torch.empty_like(x)


@torch.library.register_fake("cats::dequantise_columns", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(
    columns: Tensor,
    scales: Tensor,
    extras: Tensor | None,
    layout: list[int],
    arithmetic: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    return columns.new_empty(ColumnLayout.of(layout).outputs, len(columns), dtype=dtype)


_OPERATOR = torch.ops.cats.packed_gated_mlp.default
