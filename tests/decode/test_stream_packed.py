"""Quantised matrices of a model, packed in place for the stream engine."""

import re

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, Phi3Config

from cats.decode.marks import Marks
from cats.decode.stream.packed import pack_, runs_of_layout
from cats.decode.stream.spec import read_spec
from cats.errors import UnsupportedModelError
from cats.weights import Packed, QuantisedLinear
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
        ("int4", "v_proj", {"group_size": 8}, "v of layer 0 .* groups of 8.* multiple of 16"),
        ("int4 zeros", "lm_head", {"shifts": True}, "the head has zero points and shifts"),
        ("int4", "gate", {}, "gate, up and down of layer 0 are <int4.*expected all of them"),
        ("int4", "down", {}, "gate, up and down of layer 0 are .*expected all of them"),
    ],
)
def test_matrices_that_no_kernel_reads_are_refused_by_name(kind, only, changes, message):
    model = quantised_model(kind, only, **changes)
    before = {name: id(buffer) for name, buffer in model.named_buffers()}
    with pytest.raises(UnsupportedModelError, match=message):
        pack_(read_spec(model), [])
    # nothing was packed before it was refused
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == before


def test_gate_and_up_of_two_kinds_are_refused():
    model = quantised_model("int4", "mlp")
    quantise_(make_dense(model, "up_proj"), "int8 rows", "up_proj")
    with pytest.raises(
        UnsupportedModelError, match=r"gate and up of layer 0 .* in two ways: <int4"
    ):
        pack_(read_spec(model), [])


def make_dense(model, only):
    """The model with new linear layers instead of the quantised ones of this name."""
    for name, module in list(model.named_modules()):
        if re.search(f"{only}$", name):
            rows, columns = module.matrix.shape
            model.set_submodule(name, torch.nn.Linear(columns, rows, bias=False))
    return model


def test_layers_hold_their_codes_once_and_are_named_to_be_unpacked():
    model = quantised_model("int4 zeros", group_size=32)
    numbers = {n: m.matrix.dequantised() for n, m in quantised_layers(model)}
    plain = [StorageWeakRef(b.untyped_storage()) for b in model.buffers() if b.ndim == 2]
    layers = []
    spec = pack_(read_spec(model), layers)
    assert {id(layer()) for layer in layers} == {id(m) for _, m in quantised_layers(model)}
    # of the model and of its description there is one copy, and none of the plain tensors
    assert all(storage.expired() for storage in plain)
    in_spec = {t.untyped_storage().data_ptr() for t in tensors_of(spec)}
    assert stored_bytes(model).keys() == in_spec
    for name, layer in quantised_layers(model):
        assert layer.layout is not None
        assert torch.equal(layer.matrix.dequantised(), numbers[name])
    again = []
    pack_(read_spec(model), again)
    assert not again


@pytest.mark.parametrize("config", [LlamaConfig, Phi3Config])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("int4", dict(group_size=128, scale_dtype=torch.bfloat16)), ("int8 rows", {})],
)
def test_a_packed_model_takes_two_percent_more_than_its_codes(config, kind, changes):
    heads = dict(num_attention_heads=16, num_key_value_heads=4, head_dim=128)
    sizes = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=1, **heads)
    model = quantise_(make_model(config, **sizes), kind, "layers", **changes)
    before = sum(stored_bytes(model).values())
    pack_(read_spec(model), [])
    assert before <= sum(stored_bytes(model).values()) <= 1.02 * before


def quantised_layers(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, QuantisedLinear)]


def stored_bytes(model):
    """Address of each quantised tensor to its bytes."""
    return {
        b.untyped_storage().data_ptr(): b.untyped_storage().nbytes()
        for _, layer in quantised_layers(model)
        for b in layer.buffers()
    }


def tensors_of(spec):
    return [tensor for linear in linears_of(spec) for tensor in linear.matrix.tensors]


def linears_of(spec):
    """All linear layers of a spec."""
    for layer in spec.layers:
        yield from (layer.q, layer.k, layer.v, layer.o)
        yield from (layer.mlp.gate, layer.mlp.up, layer.mlp.down)
    yield spec.head


@pytest.mark.parametrize("config", [LlamaConfig, Phi3Config])
def test_parts_of_stacked_layers_are_parts_of_their_packed_rows(config):
    model = make_model(config, hidden_size=64, intermediate_size=160)
    quantise_(model, "int4", group_size=32)
    spec = read_spec(model)
    wanted = [linear.matrix.dequantised() for linear in linears_of(spec)]
    found = [linear.matrix for linear in linears_of(pack_(spec, []))]
    assert {type(matrix) for matrix in found} == {Packed}
    assert all(torch.equal(m.dequantised(), n) for m, n in zip(found, wanted, strict=True))


def test_neighbours_of_one_layout_share_a_launch():
    model = quantise_(
        quantised_model("int8 rows", "0.self_attn.v"), "int4", "1.self", group_size=32
    )
    spec = read_spec(quantise_(model, "int4", "0.self", group_size=32))
    first, second = pack_(spec, []).layers
    dense = read_spec(make_model()).layers[0]
    assert list(runs_of_layout((first.q, first.k, first.v))) == [(first.q, first.k), (first.v,)]
    q, k, v = second.q, second.k, second.v
    assert list(runs_of_layout((q, k, v))) == [(q, k, v)]
    assert list(runs_of_layout((q, dense.k, v))) == [(q,), (dense.k,), (v,)]


def test_dense_matrices_stay_as_they_are():
    spec = read_spec(quantised_model("int4", "mlp"))
    layer = spec.layers[0]
    mine = pack_(spec, []).layers[0]
    assert [mine.q, mine.k, mine.v, mine.o] == [layer.q, layer.k, layer.v, layer.o]


def test_marks_see_that_a_layer_is_packed_and_what_is_loaded_into_it():
    model = quantised_model("int4")
    plain = Marks.of(model)
    pack_(read_spec(model), [])
    packed = Marks.of(model)
    assert packed.structure != plain.structure
    assert Marks.of(model).structure == packed.structure
    assert Marks.of(model).content == packed.content
    model.load_state_dict(model.state_dict())
    loaded = Marks.of(model)
    assert (loaded.structure, loaded.content) != (packed.structure, packed.content)
    assert "model.layers.1.mlp.up_proj.packed" in packed.changed(loaded).values()
    # the same memory: nothing that was captured must be made anew
    assert loaded.structure == packed.structure
