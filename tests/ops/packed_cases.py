"""Packed matrices and MLPs of every layout, for tests of the backends of packed operators."""

import dataclasses
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cats.functional import ACTIVATIONS, keep_mask
from cats.ops.packed_linear import PackedLinearArguments
from cats.ops.packed_mlp import PackedMLPArguments
from cats.ops.packed_mlp.reference import packed_gated_mlp as reference
from cats.ops.quantised import (
    ColumnLayout,
    PackedColumns,
    RowLayout,
    ZeroMode,
    numbers_of_rows,
    pack_columns,
    pack_rows,
)
from cats.weights import Quantised
from tests.ops.cases import BAND, thresholds_at
from tests.quantised import make

SCALE_DTYPES = torch.float16, torch.bfloat16, torch.float32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How a matrix is quantised; ``group_size`` 0 is one scale for a whole row."""

    bits: int = 4
    group_size: int = 0
    scale_dtype: torch.dtype = torch.float32
    mode: ZeroMode = ZeroMode.CONSTANT

    def __str__(self) -> str:
        dtype = str(self.scale_dtype).removeprefix("torch.")
        return f"int{self.bits}-{self.group_size}-{dtype}-{self.mode.name.lower()}"

    @property
    def zero(self) -> int:
        """The constant zero point: not the middle one, so that no kernel takes it for granted."""
        return 0 if self.mode == ZeroMode.ZEROS else 2 ** (self.bits - 1) - 1


# all bits, groups and modes, with each dtype of scales in turn
KINDS = [
    Kind(bits=bits, group_size=size, mode=mode, scale_dtype=SCALE_DTYPES[(i + i // 3) % 3])
    for i, (bits, size, mode) in enumerate(product((4, 8), (0, 32, 64, 128), ZeroMode))
]
# groups that kernels of a CPU read, and others do not
HALF_BLOCKS = [
    Kind(bits=4, group_size=16, mode=ZeroMode.SHIFTS, scale_dtype=torch.bfloat16),
    Kind(bits=8, group_size=16, mode=ZeroMode.CONSTANT),
    Kind(bits=8, group_size=16, mode=ZeroMode.ZEROS, scale_dtype=torch.float16),
]
# each of bits, groups, modes and dtypes at least once, for tests that do much more than read codes
FEW_KINDS = [KINDS[i] for i in (1, 3, 8, 9, 15, 20, 23)]


def ids(values: list[Kind]) -> list[object]:
    """Parameters of pytest with readable names."""
    return [pytest.param(value, id=str(value)) for value in values]


def make_matrix(
    rows: int,
    columns: int,
    kind: Kind,
    *,
    arithmetic: torch.dtype = torch.float32,
    seed: int = 0,
    special: bool = False,
) -> Quantised:
    """Random numbers, about unit variance over the square root of the columns.

    Args:
        special: Some scales are 0, infinite, NaN, huge or too small for a normal number, and zero
            points are the first and the last code.
    """
    matrix = make(
        rows,
        columns,
        bits=kind.bits,
        group_size=kind.group_size or columns,
        zero=kind.zero,
        zeros=kind.mode == ZeroMode.ZEROS,
        shifts=kind.mode == ZeroMode.SHIFTS,
        scale_dtype=kind.scale_dtype,
        arithmetic=arithmetic,
        seed=seed,
    )
    if special:
        values = [0, torch.inf, -torch.inf, torch.nan, 6e4, 1e-6, 1e-40, -0.0]
        flat = matrix.scales.view(-1)
        given = torch.tensor(values).to(kind.scale_dtype)[: len(flat)]
        flat[: len(given)] = given
        if matrix.zeros is not None:
            matrix.zeros.view(-1)[::3] = 0
            matrix.zeros.view(-1)[1::3] = 2**kind.bits - 1
    return matrix


def packed_rows(matrix: Quantised) -> tuple[Tensor, RowLayout]:
    """The packed rows of a matrix and their layout."""
    layout = RowLayout(
        bits=matrix.bits,
        columns=matrix.columns,
        group_size=0 if matrix.groups == 1 else matrix.group_size,
        scale_dtype=matrix.scales.dtype,
        zero_mode=_mode(matrix),
        zero=matrix.zero,
    )
    tables = dict(zeros=matrix.zeros, shifts=matrix.shifts)
    return pack_rows(layout, matrix.codes, matrix.scales, **tables), layout


def packed_columns(matrix: Quantised) -> PackedColumns:
    """The packed columns of a matrix ``[outputs, neurons]``."""
    layout = ColumnLayout(
        bits=matrix.bits,
        outputs=len(matrix.codes),
        group_size=0 if matrix.groups == 1 else matrix.group_size,
        scale_dtype=matrix.scales.dtype,
        zero_mode=_mode(matrix),
        zero=matrix.zero,
    )
    tables = dict(zeros=matrix.zeros, shifts=matrix.shifts)
    return pack_columns(layout, matrix.codes, matrix.scales, neurons=matrix.columns, **tables)


def numbers(matrix: Quantised, dtype: torch.dtype) -> Tensor:
    """What the format of the checkpoint says that the codes stand for."""
    return dataclasses.replace(matrix, dtype=dtype).dequantised()


def make_linear(
    batch: int,
    rows: int,
    columns: int,
    kind: Kind,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    bias: bool = True,
    arithmetic: torch.dtype = torch.float32,
    special: bool = False,
) -> tuple[PackedLinearArguments, Tensor]:
    """A call of ``cats::packed_linear``, and its result summed in float32, ``[B, N]`` float32."""
    matrix = make_matrix(rows, columns, kind, arithmetic=arithmetic, special=special)
    data, layout = packed_rows(matrix)
    x = torch.randn(batch, columns).to(dtype)
    offset = torch.randn(rows).to(dtype) if bias else None
    weight = numbers(matrix, dtype).float()
    expected = F.linear(x.float(), weight, None if offset is None else offset.float())
    x, data = x.to(device), data.to(device)
    offset = None if offset is None else offset.to(device)
    return PackedLinearArguments(x, data, offset, layout, arithmetic), expected.to(device)


def make_mlp(
    hidden: int,
    neurons: int,
    kind: Kind,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    batch: int = 1,
    down: Kind | None = None,
    sparsity: float = 0.5,
    product_sparsity: float | None = None,
    bias: bool = False,
    activation: str = "silu",
    router: str = "gate",
    arithmetic: torch.dtype = torch.float32,
) -> tuple[PackedMLPArguments, Tensor]:
    """A call of ``cats::packed_gated_mlp``, and its result by the definition.

    Thresholds keep a distance from every value, so that no order of sums decides what is kept.

    Args:
        hidden: A multiple of 4.
        down: The kind of ``down``; that of gate and up where it is not given.
        sparsity: Share of neurons that a token drops: 0 keeps all, 1 has infinite thresholds.
        product_sparsity: Share of kept products dropped by ``product_thresholds``; None has none.
    """
    gate, up = (make_matrix(neurons, hidden, kind, arithmetic=arithmetic, seed=i) for i in (1, 2))
    columns = packed_columns(
        make_matrix(hidden, neurons, down or kind, arithmetic=arithmetic, seed=3)
    )
    (gate_rows, layout), (up_rows, _) = packed_rows(gate), packed_rows(up)
    arguments = PackedMLPArguments(
        x=torch.randn(batch, hidden).to(dtype),
        gate=gate_rows,
        up=up_rows,
        down=columns.columns,
        down_scales=columns.scales,
        down_extras=columns.extras,
        thresholds=torch.zeros(neurons),
        activation=activation,
        rows=layout,
        columns=columns.layout,
        arithmetic=arithmetic,
        router=router,
        gate_bias=(0.5 * torch.randn(neurons)).to(dtype) if bias else None,
        up_bias=(0.5 * torch.randn(neurons)).to(dtype) if bias else None,
        down_bias=torch.randn(hidden).to(dtype) if bias else None,
    )
    band = BAND[dtype]
    thresholds = thresholds_at(
        routed_and_product(arguments)[0], sparsity, per_neuron=True, band=band
    )
    arguments = arguments._replace(thresholds=thresholds)
    if product_sparsity is not None:
        products = routed_and_product(arguments)[1]
        thresholds = thresholds_at(products, product_sparsity, per_neuron=True, band=band)
        arguments = arguments._replace(product_thresholds=thresholds)
    expected = reference(arguments).to(device)
    moved = (a.to(device) if isinstance(a, Tensor) else a for a in arguments)
    return PackedMLPArguments(*moved), expected


def routed_and_product(arguments: PackedMLPArguments) -> tuple[Tensor, Tensor]:
    """What is compared with the thresholds, and the products of what is kept; float64, ``[B, F]``.

    Products are compared with the product thresholds after this.
    """
    a, dtype = arguments, arguments.x.dtype

    def branch(rows: Tensor, bias: Tensor | None) -> Tensor:
        weight = numbers_of_rows(rows, a.rows, a.arithmetic, dtype).double()
        return F.linear(a.x.double(), weight, None if bias is None else bias.double())

    gate = ACTIVATIONS[a.activation](branch(a.gate, a.gate_bias))
    up = branch(a.up, a.up_bias)
    routed = gate if a.router == "gate" else up
    return routed, torch.where(keep_mask(routed, a.thresholds), gate * up, 0)


def _mode(matrix: Quantised) -> ZeroMode:
    if matrix.zeros is not None:
        return ZeroMode.ZEROS
    return ZeroMode.CONSTANT if matrix.shifts is None else ZeroMode.SHIFTS
