"""``cats::packed_linear``: its definition, its gradients, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from cats.errors import BackendError, ShapeError
from cats.ops.packed_linear import PackedLinearArguments, packed_linear
from cats.ops.packed_linear.backends import BACKENDS
from cats.ops.quantised import RowLayout, ZeroMode, pack_rows
from tests.quantised import make

KINDS = {
    "int8 rows": dict(bits=8, zero=128),
    "int4": dict(bits=4, group_size=32, zero=8, scale_dtype=torch.bfloat16),
    "int4 zeros": dict(bits=4, group_size=64, zeros=True),
    "int8 shifts": dict(bits=8, group_size=32, shifts=True, scale_dtype=torch.float16),
}


def make_packed(rows, columns, kind, **fields):
    """A quantised matrix, its packed rows, and their layout."""
    matrix = make(rows, columns, **KINDS[kind], **fields)
    mode = ZeroMode.CONSTANT if matrix.shifts is None else ZeroMode.SHIFTS
    layout = RowLayout(
        bits=matrix.bits,
        columns=columns,
        group_size=0 if matrix.groups == 1 else matrix.group_size,
        scale_dtype=matrix.scales.dtype,
        zero_mode=mode if matrix.zeros is None else ZeroMode.ZEROS,
        zero=matrix.zero,
    )
    tables = dict(zeros=matrix.zeros, shifts=matrix.shifts)
    return matrix, pack_rows(layout, matrix.codes, matrix.scales, **tables), layout


@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 67, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_computes_a_linear_layer_of_the_numbers(kind, columns, arithmetic):
    matrix, rows, layout = make_packed(7, columns, kind, arithmetic=arithmetic)
    x, bias = torch.randn(3, columns), torch.randn(7)
    options = dict(layout=layout, arithmetic=arithmetic, backend="dense")
    found = packed_linear(x, rows, bias, **options)
    assert torch.equal(found, F.linear(x, matrix.dequantised(), bias))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_numbers(kind):
    matrix, rows, layout = make_packed(7, 67, kind)
    x, bias = torch.randn(3, 67, requires_grad=True), torch.randn(7, requires_grad=True)
    found = packed_linear(x, rows, bias, layout=layout, backend="dense")
    wanted = F.linear(x, matrix.dequantised(), bias)
    grad = torch.randn_like(found)
    for ours, theirs in zip(
        *(torch.autograd.grad(y, (x, bias), grad) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_backward_pass_keeps_codes_alone():
    _, rows, layout = make_packed(7, 67, "int4")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed_linear(torch.randn(3, 67, requires_grad=True), rows, layout=layout)
    assert [t.data_ptr() for t in kept] == [rows.data_ptr()]


def test_torch_accepts_the_operator():
    _, rows, layout = make_packed(7, 67, "int4")
    arguments = torch.randn(3, 67), rows, None, list(layout.numbers), torch.float32, "dense"
    torch.library.opcheck(torch.ops.cats.packed_linear.default, arguments)


@pytest.mark.parametrize("mode", ZeroMode)
def test_a_layout_is_known_by_its_numbers(mode):
    zero = 0 if mode == ZeroMode.ZEROS else 5
    layout = RowLayout(
        bits=4,
        columns=67,
        group_size=32,
        scale_dtype=torch.bfloat16,
        zero_mode=mode,
        zero=zero,
    )
    assert RowLayout.of(list(layout.numbers)) == layout


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[:, :-1], r"expected x \[B, 67\]"),
        ("x", lambda x: x[0], r"expected x \[B, 67\]"),
        ("x", lambda x: x.int(), "floating point"),
        ("x", lambda x: x.t().contiguous().t(), "x must be contiguous"),
        ("rows", lambda r: r[:, 1:], r"expected rows \[\*, 96\]"),
        ("rows", lambda r: r.char(), "torch.int8"),
        ("rows", lambda r: r[::2], "rows must be contiguous"),
        ("rows", lambda r: r.to("meta"), "on meta"),
        ("bias", lambda b: b[1:], r"expected bias \[7\]"),
        ("bias", lambda b: b.half(), "torch.float16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(name, change, message):
    _, rows, layout = make_packed(7, 67, "int4")
    tensors = dict(x=torch.randn(3, 67), rows=rows, bias=torch.randn(7))
    tensors[name] = change(tensors[name])
    with pytest.raises(ShapeError, match=message):
        PackedLinearArguments(**tensors, layout=layout, arithmetic=torch.float32).check()


def test_backends_are_named_or_refused():
    _, rows, layout = make_packed(7, 67, "int4")
    with pytest.raises(BackendError, match="must be auto or one of dense"):
        packed_linear(torch.randn(3, 67), rows, layout=layout, backend="fastest")
    assert tuple(BACKENDS.states()) == BACKENDS.names
    assert BACKENDS.states()["dense"] == "live"
