"""``cats::packed_gated_mlp``: its definition, and what it refuses."""

import pytest
import torch

from cats.errors import BackendError, ShapeError
from cats.ops import GatedMLPArguments
from cats.ops.mlp import dense, reference
from cats.ops.packed_mlp import PackedMLPArguments, dequantise_columns, packed_gated_mlp
from cats.ops.packed_mlp.backends import BACKENDS
from cats.ops.quantised import ColumnLayout, ZeroMode, pack_columns
from tests.ops.packed_linear.test_packed_linear import KINDS, make_packed

D, F = 68, 45


def make_mlp(kind="int4", *, batch=2, biases=False, products=False, **options):
    """Arguments of the operator, and those of ``cats::gated_mlp`` with the same numbers."""
    gate, gate_rows, rows = make_packed(F, D, kind, seed=1)
    up, up_rows, _ = make_packed(F, D, kind, seed=2)
    down, _, layout = make_packed(D, F, kind, seed=3)
    columns = ColumnLayout(
        bits=layout.bits,
        outputs=D,
        group_size=layout.group_size,
        scale_dtype=layout.scale_dtype,
        zero_mode=layout.zero_mode,
        zero=layout.zero,
    )
    tables = dict(zeros=down.zeros, shifts=down.shifts)
    packed = pack_columns(columns, down.codes, down.scales, neurons=F, **tables)
    x = torch.randn(batch, D)
    shared = (
        dict(
            thresholds=torch.full((F,), 0.3),
            activation="silu",
            router="gate",
            gate_bias=torch.randn(F) if biases else None,
            up_bias=torch.randn(F) if biases else None,
            down_bias=torch.randn(D) if biases else None,
            product_thresholds=torch.full((F,), 0.2) if products else None,
        )
        | options
    )
    ours = PackedMLPArguments(
        x=x,
        gate=gate_rows,
        up=up_rows,
        down=packed.columns,
        down_scales=packed.scales,
        down_extras=packed.extras,
        rows=rows,
        columns=columns,
        arithmetic=torch.float32,
        **shared,
    )
    numbers = [matrix.dequantised() for matrix in (gate, up, down)]
    return ours, GatedMLPArguments(x, *numbers, **shared)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(biases=True),
        dict(router="up", activation="gelu_tanh"),
        dict(products=True, activation="relu", biases=True),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_gated_mlp_of_the_numbers(kind, options):
    ours, theirs = make_mlp(kind, **options)
    for name, module in (("dense", dense), ("reference", reference)):
        assert torch.equal(packed_gated_mlp(ours, name), module.gated_mlp(theirs))


def test_columns_are_written_out_by_one_operator():
    ours, theirs = make_mlp()
    found = dequantise_columns(ours.packed_down, torch.float32, torch.float32)
    assert torch.equal(found, theirs.down)
    packed = ours.packed_down
    numbers = list(packed.layout.numbers)
    arguments = packed.columns, packed.scales, None, numbers, torch.float32, torch.bfloat16
    torch.library.opcheck(torch.ops.cats.dequantise_columns.default, arguments)


def test_torch_accepts_the_operator():
    a, _ = make_mlp(biases=True)
    operands = (*a[:8], list(a.rows.numbers), list(a.columns.numbers), *a[10:], "dense")
    torch.library.opcheck(torch.ops.cats.packed_gated_mlp.default, operands)


def test_it_has_no_gradient():
    ours, _ = make_mlp()
    out = packed_gated_mlp(ours._replace(x=ours.x.requires_grad_()), "dense")
    with pytest.raises(BackendError, match=r"no gradient: call cats.unfuse_"):
        out.sum().backward()


@pytest.mark.parametrize("mode", ZeroMode)
def test_a_layout_is_known_by_its_numbers(mode):
    zero = 0 if mode == ZeroMode.ZEROS else 5
    layout = ColumnLayout(
        bits=8, outputs=68, group_size=45, scale_dtype=torch.float16, zero_mode=mode, zero=zero
    )
    assert ColumnLayout.of(list(layout.numbers)) == layout


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[:, :-1], r"expected x \[B, 68\]"),
        ("gate", lambda g: g[:, 1:], r"expected gate \[\*, 96\]"),
        ("gate", lambda g: g[0], r"expected gate"),
        ("up", lambda u: u[1:].contiguous(), "gate has 45 rows of 68 columns, but up has 44"),
        ("up", lambda u: u.to("meta"), "expected up on cpu, got meta"),
        ("down", lambda d: d[1:].contiguous(), "down 44 columns of 68 outputs"),
        ("down_scales", lambda s: s[:1], r"scales must be \(\(2, 68\)"),
        ("down_scales", lambda s: s.t().contiguous().t(), "down_scales contiguous"),
        ("down_extras", lambda _: torch.zeros(2, 68), "zeros or shifts must be None"),
        ("thresholds", lambda t: t[1:], r"expected thresholds \[45\]"),
        ("thresholds", lambda t: t.double(), "torch.float64"),
        ("gate_bias", lambda b: b[1:], "expected gate_bias"),
        ("up_bias", lambda b: b.half(), "expected up_bias"),
        ("down_bias", lambda b: b[1:], "expected down_bias"),
        ("product_thresholds", lambda t: t[::2], "expected product_thresholds"),
        ("activation", lambda _: "swish", "activation must be one of"),
        ("router", lambda _: "down", "router must be one of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(name, change, message):
    arguments, _ = make_mlp(biases=True, products=True)
    changed = arguments._replace(**{name: change(getattr(arguments, name))})
    with pytest.raises(ShapeError, match=message):
        packed_gated_mlp(changed)


def test_backends_are_named_or_refused():
    ours, _ = make_mlp()
    with pytest.raises(BackendError, match="must be auto or one of reference"):
        packed_gated_mlp(ours, "fastest")
    with pytest.raises(BackendError, match=r"the backend cuda cannot run this call: .+"):
        packed_gated_mlp(ours, "cuda")
    assert tuple(BACKENDS.states()) == BACKENDS.names
