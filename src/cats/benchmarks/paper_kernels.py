"""The paper's own kernel design in Triton, as a baseline: three kernels, one token.

Written from the description in arXiv:2404.08763 (section on the custom kernel): a dense gate
product with activation and mask, a product with the kept rows of up, and a product with the kept
columns of down, stored transposed, whose partial sums meet in atomic additions.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

# The fastest of a few tile sizes on an H200.
_GATE = dict(ROWS=8, COLUMNS=512, num_warps=4)
_UP = dict(ROWS=1, COLUMNS=1024, num_warps=4)
_DOWN = dict(ROWS=128, COLUMNS=256, num_warps=4)


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, thresholds: Tensor) -> Tensor:
    """SiLU gated MLP of one token; arguments as :func:`cats.ops.gated_mlp`, ``x`` ``[1, D]``."""
    F, D = gate.shape
    activated = torch.empty(F, dtype=torch.float32, device=x.device)
    hidden = torch.empty(F, dtype=torch.float32, device=x.device)
    sums = torch.empty(D, dtype=torch.float32, device=x.device)

    _gate[(triton.cdiv(F, _GATE["ROWS"]),)](x, gate, thresholds, activated, sums, D, F, **_GATE)
    _up[(triton.cdiv(F, _UP["ROWS"]),)](x, up, activated, hidden, D, F, **_UP)
    tiles = triton.cdiv(F, _DOWN["ROWS"]), triton.cdiv(D, _DOWN["COLUMNS"])
    _down[tiles](hidden, down, sums, D, F, **_DOWN)
    return sums.to(x.dtype)[None]


@triton.jit
def _gate(x, gate, thresholds, activated, sums, D, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``activated[f] = silu(gate @ x)`` where it is kept, else 0; clears ``sums`` on the way."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < F
    for column in range(tl.program_id(0), D, tl.num_programs(0)):
        tl.store(sums + column, 0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = exists[:, None] & (columns < D)[None, :]
        w = tl.load(gate + rows[:, None] * D + columns[None, :], mask=mask, other=0)
        v = tl.load(x + columns, mask=columns < D, other=0)
        total += w.to(tl.float32) * v.to(tl.float32)[None, :]
    g = tl.sum(total, axis=1)
    a = g / (1 + tl.exp(-g))
    t = tl.load(thresholds + rows, mask=exists, other=0)
    tl.store(activated + rows, tl.where(tl.abs(a) < t, 0.0, a), mask=exists)


@triton.jit
def _up(x, up, activated, hidden, D, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``hidden = activated * (up @ x)``; rows of dropped neurons are not read."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < F
    a = tl.load(activated + rows, mask=exists, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if tl.max((a != 0).to(tl.int32), axis=0) > 0:
        for start in range(0, D, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            mask = (a != 0)[:, None] & (columns < D)[None, :]
            w = tl.load(up + rows[:, None] * D + columns[None, :], mask=mask, other=0)
            v = tl.load(x + columns, mask=columns < D, other=0)
            total += w.to(tl.float32) * v.to(tl.float32)[None, :]
    tl.store(hidden + rows, a * tl.sum(total, axis=1), mask=exists)


@triton.jit
def _down(hidden, down, sums, D, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``sums += hidden @ down.T`` tile by tile; columns of dropped neurons are not read."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    h = tl.load(hidden + rows, mask=rows < F, other=0)
    mask = (h != 0)[:, None] & (columns < D)[None, :]
    w = tl.load(down + rows[:, None] * D + columns[None, :], mask=mask, other=0)
    tl.atomic_add(
        sums + columns,
        tl.sum(w.to(tl.float32) * h[:, None], axis=0),
        mask=columns < D,
        sem="relaxed",
    )
