"""Quantised matrices of a model in the layouts of the kernels."""

import re

import pytest
import torch
from transformers import LlamaConfig

from cats.decode.stream.packed import packed, runs_of_layout
from cats.decode.stream.spec import read_spec
from cats.errors import UnsupportedModelError
from cats.ops.quantised import ZeroMode, unpack_columns, unpack_rows
from cats.weights import Quantised
from tests.models import make_model
from tests.quantised import quantise_


def quantised_model(kind, only="", **changes):
    model = make_model(LlamaConfig, hidden_size=64, intermediate_size=160)
    return quantise_(model, kind, only, **{"group_size": 32, **changes})


@pytest.mark.parametrize(
    ("kind", "only", "changes", "message"),
    [
        ("float8", "q_proj", {}, "q of layer 0 is <float8.*no kernel here reads float8 codes"),
        ("int4 ordered", "o_proj", {}, r"o of layer 0 .* in another order \(desc_act\)"),
        ("int4 ordered", "mlp", {}, "gate of layer 0 .* in another order"),
        ("int4", "v_proj", {"group_size": 16}, "v of layer 0 .* groups of 16.* multiple of 32"),
        ("int4 zeros", "lm_head", {"shifts": True}, "the head has zero points and shifts"),
        ("int4", "gate", {}, "gate, up and down of layer 0 are <int4.*expected all of them"),
        ("int4", "down", {}, "gate, up and down of layer 0 are .*expected all of them"),
    ],
)
def test_matrices_that_no_kernel_reads_are_refused_by_name(kind, only, changes, message):
    spec = read_spec(quantised_model(kind, only, **changes))
    with pytest.raises(UnsupportedModelError, match=message):
        packed(spec)


def test_gate_and_up_of_two_kinds_are_refused():
    model = quantised_model("int4", "mlp")
    quantise_(make_dense(model, "up_proj"), "int8 rows", "up_proj")
    with pytest.raises(
        UnsupportedModelError, match=r"gate and up of layer 0 .* in two ways: <int4"
    ):
        packed(read_spec(model))


def make_dense(model, only):
    """The model with new linear layers instead of the quantised ones of this name."""
    for name, module in list(model.named_modules()):
        if re.search(f"{only}$", name):
            rows, columns = module.matrix.shape
            model.set_submodule(name, torch.nn.Linear(columns, rows, bias=False))
    return model


@pytest.mark.parametrize(("group_size", "expected"), [(256, 128), (192, 64), (96, 32)])
def test_large_groups_become_smaller_ones_with_the_same_scale(group_size, expected):
    model = make_model(LlamaConfig, hidden_size=640, intermediate_size=64)
    quantise_(model, "int4 zeros", "q_proj", group_size=group_size)
    spec = read_spec(model)
    stored = spec.layers[1].q.matrix
    assert isinstance(stored, Quantised)
    rows = packed(spec).layers[1].q.rows
    assert (rows.layout.group_size, rows.layout.zero_mode) == (expected, ZeroMode.ZEROS)
    codes, scales, zeros, _ = unpack_rows(rows.layout, rows.rows)
    assert torch.equal(codes, stored.codes)
    for column in range(0, 640, 32):
        mine, wanted = column // expected, column // group_size
        assert torch.equal(scales[:, mine], stored.scales[:, wanted])
        assert torch.equal(zeros[:, mine], stored.zeros[:, wanted])


def test_down_keeps_its_groups():
    spec = read_spec(quantised_model("int4 shifts", "mlp", group_size=64))
    stored = spec.layers[0].mlp.down.matrix
    columns = packed(spec).layers[0].mlp.down.columns
    assert (columns.layout.group_size, len(columns.columns)) == (64, 160)
    codes, scales, zeros, shifts = unpack_columns(columns)
    assert zeros is None
    found, expected = (codes, scales, shifts), (stored.codes, stored.scales, stored.shifts)
    assert all(map(torch.equal, found, expected))


def test_neighbours_of_one_layout_share_a_launch():
    model = quantise_(
        quantised_model("int8 rows", "0.self_attn.v"), "int4", "1.self", group_size=32
    )
    first, second = packed(read_spec(quantise_(model, "int4", "0.self", group_size=32))).layers
    dense = read_spec(make_model()).layers[0]
    assert list(runs_of_layout((first.q, first.k, first.v))) == [(first.q, first.k), (first.v,)]
    q, k, v = second.q, second.k, second.v
    assert list(runs_of_layout((q, k, v))) == [(q, k, v)]
    assert list(runs_of_layout((q, dense.k, v))) == [(q,), (dense.k,), (v,)]


def test_dense_matrices_stay_as_they_are():
    spec = read_spec(quantised_model("int4", "mlp"))
    layer, mine = spec.layers[0], packed(spec).layers[0]
    assert [mine.q, mine.k, mine.v, mine.o] == [layer.q, layer.k, layer.v, layer.o]
