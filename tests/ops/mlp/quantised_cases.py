"""Quantised MLPs for tests of ``quantised_mlp.cu``, and what they must give."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cats.functional import ACTIVATIONS
from cats.ops.cuda.arguments import address
from cats.ops.cuda.residual import Residual
from cats.ops.quantised import ColumnLayout, PackedColumns, PackedRows, ZeroMode, pack_columns
from cats.weights.quantised import packed
from tests.ops.linear.quantised_cases import constant_zero, make_layout, make_matrix

EPSILON = 1e-5


@dataclass
class Case:
    base: Tensor  # the residual stream, [D]
    norm: Tensor
    gate: PackedRows
    up: PackedRows
    down: PackedColumns
    thresholds: Tensor
    biases: tuple[Tensor | None, Tensor | None]
    activation: str
    output: Tensor  # float64, [D]
    dtype: torch.dtype


def make_down(bits, outputs, neurons, group_size, zero_mode, scale_dtype, device="cpu"):
    """A packed ``down`` and its numbers, ``[outputs, neurons]``, float64."""
    high = 2**bits
    layout = ColumnLayout(
        bits=bits,
        outputs=outputs,
        group_size=group_size,
        scale_dtype=scale_dtype,
        zero_mode=zero_mode,
        zero=constant_zero(bits, zero_mode),
    )
    codes = torch.randint(0, high, (outputs, neurons), dtype=torch.uint8, device=device)
    shape = outputs, layout.groups_of(neurons)
    unit = 4 / high / neurons**0.5
    scales = ((torch.rand(shape, device=device) + 0.5) * unit).to(scale_dtype)
    zeros = torch.randint(0, high, shape, dtype=torch.uint8, device=device)
    zeros = zeros if zero_mode == ZeroMode.ZEROS else None
    shifts = (torch.randn(shape, device=device) * unit).to(scale_dtype)
    shifts = shifts if zero_mode == ZeroMode.SHIFTS else None

    def wide(table):
        size = group_size or neurons
        return table.double().repeat_interleave(size, dim=1)[:, :neurons]

    values = (codes.double() - (layout.zero if zeros is None else wide(zeros))) * wide(scales)
    if shifts is not None:
        values += wide(shifts)
    stored = codes if bits == 8 else packed(codes)
    return pack_columns(layout, stored, scales, neurons=neurons, zeros=zeros, shifts=shifts), values


def make_mlp(
    *,
    bits,
    hidden,
    neurons,
    group_size=32,
    down_bits=None,
    zero_mode=ZeroMode.CONSTANT,
    scale_dtype=torch.float16,
    activation="silu",
    sparsity=0.5,
    biases=False,
    up_size=1.0,
    bad_gate_scale=None,
    dtype=torch.float32,
    device="cpu",
):
    """Random weights; thresholds drop a share of the neurons, and no neuron is close to its own."""
    layout = make_layout(bits, hidden, group_size, zero_mode, scale_dtype)
    scales = None
    if bad_gate_scale is not None:
        scales = torch.rand(neurons, layout.groups).to(scale_dtype) / 100
        scales[neurons // 2, -1] = bad_gate_scale
    gate = make_matrix(layout, neurons, scales=scales, device=device)
    up_layout = layout if up_size == 1 else replace(layout, scale_dtype=torch.float32)
    if up_size != 1:
        gate = make_matrix(up_layout, neurons, device=device)
        scales = torch.full((neurons, layout.groups), 4 / 2**bits / hidden**0.5 * up_size)
        up = make_matrix(up_layout, neurons, scales=scales.to(device), device=device)
    else:
        up = make_matrix(layout, neurons, device=device)
    down, down_values = make_down(
        down_bits or bits, hidden, neurons, group_size, zero_mode, scale_dtype, device
    )
    base = 3 * torch.randn(hidden, device=device)
    norm = (torch.rand(hidden, device=device) + 0.5).to(dtype)
    added = [torch.randn(neurons, device=device).to(dtype) if biases else None for _ in range(2)]
    x = base.double() * torch.rsqrt(base.double().square().mean() + EPSILON) * norm.double()
    parts = [m.values @ x + (0 if b is None else b) for m, b in zip((gate, up), added, strict=True)]
    act = ACTIVATIONS[activation](parts[0])
    sizes = act.abs().nan_to_num(1e30).sort().values
    # midway between two neurons, so that 16-bit fixed point moves none over its threshold
    count = int(sparsity * neurons)
    gaps = sizes[1:] - sizes[:-1]
    best = max(range(max(count - 8, 0), min(count + 8, neurons - 1)), key=lambda i: gaps[i].item())
    threshold = 0.0 if sparsity == 0 else float(sizes[best] + sizes[best + 1]) / 2
    kept = act.where(~(act.abs() < threshold), 0)
    output = down_values @ (kept * parts[1]).where(kept != 0, 0)
    thresholds = torch.full((neurons,), threshold, device=device)
    return Case(
        base=base,
        norm=norm,
        gate=gate.packed,
        up=up.packed,
        down=down,
        thresholds=thresholds,
        biases=(added[0], added[1]),
        activation=activation,
        output=output,
        dtype=dtype,
    )


def run(mlp, case, *, multiprocessors=2, stream=0, **changes):
    """What the kernel adds to zeros, float64."""
    sums = torch.zeros_like(case.base)
    residual = Residual(
        base=address(case.base), weight=address(case.norm), epsilon=EPSILON, weight_offset=0
    )
    matrices = dict(gate=case.gate, up=case.up, down=case.down) | changes
    launch = mlp.launch(
        x=residual,
        **matrices,
        thresholds=case.thresholds,
        activation=case.activation,
        gate_bias=case.biases[0],
        up_bias=case.biases[1],
        dtype=case.dtype,
        sums=sums,
        multiprocessors=multiprocessors,
    )
    launch.function.launch(launch.arguments, blocks=launch.blocks, stream=stream, dependent=True)
    return sums.double()


def check(found, case):
    error = (found - case.output).norm() / case.output.norm()
    assert error < 1e-3, f"{error:.1e}"
