"""Quantised layers whose codes are packed for kernels, instead of the plain tensors."""

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

from cats import fingerprint
from cats.errors import UnsupportedModelError
from cats.ops.quantised import RowLayout, ZeroMode
from cats.weights import Packed, Quantised, QuantisedLinear, nbytes, weight_of
from cats.weights.placement import has_weights
from cats.weights.quantised import PLAIN
from tests.quantised import KINDS, make

ROWS, COLUMNS = 12, 72
FORMS = {
    "int8 rows": dict(bits=8, zero=128),
    "int8 groups": dict(bits=8, group_size=32, zero=128, scale_dtype=torch.bfloat16),
    "int4": dict(bits=4, group_size=32, zero=8),
    "int4 zeros": dict(bits=4, group_size=64, zeros=True, scale_dtype=torch.float16),
    "int4 shifts": dict(bits=4, group_size=32, shifts=True),
}
PACKINGS = {"rows": QuantisedLinear.pack_rows_, "columns": QuantisedLinear.pack_columns_}


@pytest.fixture(params=FORMS)
def plain(request):
    """A layer that is not packed."""
    weight = make(ROWS, COLUMNS, **FORMS[request.param], arithmetic=torch.bfloat16)
    return QuantisedLinear(weight, torch.randn(ROWS))


@pytest.fixture(params=PACKINGS)
def packed(request, plain):
    """The same layer, packed."""
    return PACKINGS[request.param](copy.deepcopy(plain))


def test_the_numbers_and_tensors_are_the_same(plain, packed):
    stored = weight_of(packed)
    assert isinstance(stored, Packed)
    assert torch.equal(stored.dequantised(), plain.matrix.dequantised())
    for name in PLAIN:
        found, wanted = getattr(packed.matrix, name), getattr(plain.matrix, name)
        assert (found is None) == (wanted is None)
        assert found is None or (torch.equal(found, wanted) and found.dtype == wanted.dtype)
    assert packed.matrix.group_size == plain.matrix.group_size
    mine = stored.bytes, stored.row_bytes, stored.column_bytes, stored.shape, stored.dtype
    theirs = weight_of(plain)
    assert mine == (theirs.bytes, theirs.row_bytes, theirs.column_bytes, theirs.shape, theirs.dtype)
    assert stored.order == ("rows" if isinstance(packed.layout, RowLayout) else "columns")
    assert repr(stored).startswith(repr(theirs)[:-1])


def test_no_second_copy_of_the_codes_stays(plain, packed):
    assert set(packed._buffers) <= {"packed", "packed_scales", "packed_extras"}
    assert {id(t) for t in packed.buffers()} == {id(t) for t in weight_of(packed).tensors}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_matrices_take_at_most_two_percent_more(packing, bits):
    group = dict(bits=4, group_size=128, zero=8) if bits == 4 else dict(bits=8, zero=128)
    shape = (256, 14336) if packing == "rows" else (4096, 512)
    layer = QuantisedLinear(make(*shape, **group, scale_dtype=torch.bfloat16))
    before = sum(map(nbytes, layer.buffers()))
    PACKINGS[packing](layer)
    assert before <= sum(map(nbytes, layer.buffers())) <= 1.02 * before


def test_a_packed_layer_computes_what_a_plain_one_does(plain, packed):
    # kernels do not round to the arithmetic of the format
    plain.arithmetic = packed.arithmetic = torch.float32
    x = torch.randn(2, 3, COLUMNS)
    torch.testing.assert_close(packed(x), plain(x))
    assert packed(x[0, 0]).shape == (ROWS,)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), plain(x))
    with pytest.raises((RuntimeError, ValueError)):
        packed(torch.randn(4, COLUMNS // 2))
    with pytest.raises(RuntimeError, match="dtype"):
        packed(x.double())


@pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
def test_a_layer_without_bias_is_packed_and_saved(pack):
    plain = QuantisedLinear(make(ROWS, COLUMNS, **FORMS["int4"]))
    packed, x = pack(copy.deepcopy(plain)), torch.randn(COLUMNS)
    torch.testing.assert_close(packed(x), plain(x))
    packed.load_state_dict(plain.state_dict())
    assert list(packed.state_dict()) == ["codes", "scales"]


def test_gradients_are_those_of_a_plain_layer(plain, packed):
    plain.arithmetic = packed.arithmetic = torch.float32
    grads = []
    for layer in (plain, packed):
        x = torch.linspace(-1, 1, 4 * COLUMNS).view(4, COLUMNS).requires_grad_()
        y = layer(x)
        grads.append(torch.autograd.grad(y.square().sum(), (x, layer.bias)))
    torch.testing.assert_close(*grads)


def test_unpacked_layers_are_as_before(plain, packed):
    assert packed.unpack_() is packed
    assert packed.layout is None
    assert list(packed.state_dict()) == list(plain.state_dict())
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])
    assert isinstance(weight_of(packed), Quantised)


def test_packing_twice_keeps_the_tensors_and_the_other_order_takes_over(plain):
    layer = plain.pack_rows_()
    before = layer._buffers["packed"]
    assert layer.pack_rows_()._buffers["packed"] is before
    numbers = layer.matrix.dequantised()
    layer.pack_columns_()
    assert torch.equal(layer.matrix.dequantised(), numbers)
    assert weight_of(layer).order == "columns"


def test_saved_tensors_are_the_plain_ones(plain, packed):
    found, wanted = packed.state_dict(prefix="a."), plain.state_dict(prefix="a.")
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_loading_writes_into_the_packed_memory(plain, packed):
    other = QuantisedLinear(
        dataclasses.replace(plain.matrix, codes=plain.codes ^ 0x55, scales=plain.scales * 2),
        torch.zeros(ROWS),
    )
    addresses = [t.data_ptr() for t in packed.buffers()]
    versions = [t._version for t in packed.buffers()]
    for assign in (False, True):
        packed.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(packed.matrix.dequantised(), other.matrix.dequantised())
        assert torch.equal(packed.bias, other.bias)
    assert [t.data_ptr() for t in packed.buffers()] == addresses
    assert packed._buffers["packed"]._version > versions[0]


def test_a_saved_state_does_not_change_with_the_layer(packed):
    state = packed.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items() if name != "bias"}
    with torch.no_grad():
        for buffer in packed.buffers():
            buffer.zero_()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_assigned_scales_bring_their_dtype(plain, packed, dtype):
    changed = {"scales": plain.scales.to(dtype)}
    if plain.shifts is not None:
        changed["shifts"] = plain.shifts.to(dtype)
    other = QuantisedLinear(dataclasses.replace(plain.matrix, **changed), torch.zeros(ROWS))
    packed.load_state_dict(other.state_dict(), assign=True)
    assert packed.matrix.scales.dtype == dtype
    assert torch.equal(packed.matrix.dequantised(), other.matrix.dequantised())


def test_a_state_that_does_not_fit_is_refused(packed):
    state = packed.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*scales"):
        packed.load_state_dict({k: v for k, v in state.items() if k != "scales"})
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        packed.load_state_dict(state | {"codes": state["codes"][1:]})


def test_copies_and_pickles_stay_packed(packed):
    torch.save(packed, file := io.BytesIO())
    file.seek(0)
    x = torch.randn(COLUMNS)
    for other in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert other.layout == packed.layout
        assert torch.equal(other(x), packed(x))
        assert fingerprint.of_model(other) == fingerprint.of_model(packed)


def test_a_fingerprint_does_not_depend_on_the_packing(plain, packed):
    assert fingerprint.of_model(packed) == fingerprint.of_model(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_converts_the_numbers_only(plain, packed, dtype):
    packed.to(dtype)
    assert packed.dtype == dtype
    assert torch.equal(packed.matrix.dequantised(), plain.to(dtype).matrix.dequantised())
    x = torch.randn(COLUMNS, dtype=dtype)
    torch.testing.assert_close(packed(x), plain(x), rtol=0.02, atol=0.02)
    assert packed.unpack_().scales.dtype == plain.scales.dtype


def test_tensors_move_to_another_device_and_come_back_filled(plain, packed):
    packed.to("meta")
    assert {t.device.type for t in packed.buffers()} == {"meta"}
    assert weight_of(packed).shape == (ROWS, COLUMNS)
    assert not has_weights(packed)
    assert packed.qweight.is_meta
    packed.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(packed.matrix.dequantised(), plain.matrix.dequantised())


@pytest.mark.parametrize("name", PLAIN)
def test_plain_tensors_of_a_packed_layer_are_neither_read_nor_written(packed, name):
    with pytest.raises(AttributeError, match=rf"no {name} of its own.*unpack_\(\)"):
        getattr(packed, name)
    with pytest.raises(AttributeError, match=rf"no {name} of its own.*unpack_\(\)"):
        setattr(packed, name, torch.zeros(3))
    assert not hasattr(packed, name)
    packed.unpack_()
    assert hasattr(packed, name)


def test_a_write_into_packed_codes_is_seen(packed):
    x = torch.randn(COLUMNS)
    before = packed(x)
    packed._buffers["packed"][:, 0] ^= 0x11
    assert not torch.equal(packed(x), before)


def test_some_rows_are_the_same_memory(plain):
    stored = weight_of(plain.pack_rows_())
    part = stored.part(2, 11).part(1, 3)
    assert part.shape == (2, COLUMNS)
    assert part.tensors[0].data_ptr() == stored.tensors[0][3].data_ptr()
    assert torch.equal(part.dequantised(), stored.dequantised()[3:5])
    with pytest.raises(UnsupportedModelError, match="packed by columns"):
        weight_of(plain.pack_columns_()).part(0, 4)


@pytest.mark.parametrize(("group_size", "expected"), [(256, 128), (192, 64), (96, 32), (640, 0)])
def test_large_groups_become_smaller_ones_with_the_same_scale(group_size, expected):
    layer = QuantisedLinear(make(8, 640, bits=4, zeros=True, group_size=group_size))
    plain = copy.deepcopy(layer)
    layer.pack_rows_()
    assert (layer.layout.group_size, layer.layout.zero_mode) == (expected, ZeroMode.ZEROS)
    assert torch.equal(weight_of(layer).dequantised(), plain.matrix.dequantised())
    assert weight_of(layer).bytes == weight_of(plain).bytes
    assert torch.equal(layer.unpack_().scales, plain.scales)
    assert torch.equal(layer.zeros, plain.zeros)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("float8", {}, "the head is <float8.*no kernel here reads float8 codes"),
        ("int4 ordered", {}, r"the head .* in another order \(desc_act\)"),
        ("int4", {"group_size": 8}, "the head .* groups of 8.* multiple of 16"),
        ("int4 zeros", {"shifts": True}, "the head has zero points and shifts"),
    ],
)
def test_layouts_that_no_kernel_reads_stay_plain(kind, changes, message):
    layer = QuantisedLinear(make(ROWS, COLUMNS, **KINDS[kind] | changes))
    before = layer.codes
    with pytest.raises(UnsupportedModelError, match=message):
        layer.pack_rows_("the head")
    assert layer.codes is before
    if "group" not in message:
        with pytest.raises(UnsupportedModelError, match=message):
            layer.pack_columns_("the head")


def test_columns_of_an_odd_number_of_outputs_stay_plain():
    layer = QuantisedLinear(make(7, COLUMNS, **KINDS["int4"]))
    with pytest.raises(UnsupportedModelError, match=r"down is .*a multiple of 4 outputs"):
        layer.pack_columns_("down")
    assert layer.layout is None


def test_layers_of_earlier_releases_have_no_layout(plain):
    state = dict(plain.__dict__)
    state.pop("layout", None)
    old = QuantisedLinear.__new__(QuantisedLinear)
    old.__setstate__(state)
    assert old.layout is None
    assert torch.equal(old(torch.ones(COLUMNS)), plain(torch.ones(COLUMNS)))


def test_nan_in_a_scale_survives_packing(packed):
    layer = packed.unpack_()
    layer.scales[3, 0] = torch.nan
    x = torch.rand(COLUMNS)
    for pack in PACKINGS.values():
        assert pack(layer)(x).isfinite().tolist() == [row != 3 for row in range(ROWS)]


def test_modules_without_codes_are_not_packed():
    assert Packed.of(nn.Linear(3, 4)) is None
    assert Packed.of(QuantisedLinear(make(3, 4))) is None
