import copy
import dataclasses
import io

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen2Config

import cats
from cats import fingerprint, weights
from cats.errors import ShapeError, UnsupportedModelError
from cats.evaluation import InputCounts, Sparse
from cats.evaluation.traffic import mean_share, token_bytes
from cats.finetuning.adapters import target_layers
from cats.model import find_gated_mlps
from cats.weights import Quantised, QuantisedLinear, weight_of
from cats.weights.placement import has_weights
from cats.weights.quantised import packed, unpacked
from tests import models
from tests.quantised import KINDS, make, quantise_


def by_hand(weight):
    """The numbers, one at a time."""
    codes = unpacked(weight.codes, weight.bits, weight.columns).to(weight.arithmetic)
    result = torch.empty(weight.shape, dtype=weight.arithmetic)
    for row in range(weight.shape[0]):
        for column in range(weight.columns):
            group = column // weight.group_size
            zero = weight.zero if weight.zeros is None else int(weight.zeros[row, group])
            number = (codes[row, column] - zero) * weight.scales[row, group].to(weight.arithmetic)
            if weight.shifts is not None:
                number = number + weight.shifts[row, group].to(weight.arithmetic)
            order = weight.column_order
            result[row, column if order is None else int(order[column])] = number
    return result.to(weight.dtype)


@pytest.mark.parametrize("columns", [1, 7, 8, 17, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_definition(kind, columns):
    weight = make(3, columns, **KINDS[kind])
    assert torch.equal(weight.dequantised(), by_hand(weight))


@pytest.mark.parametrize("arithmetic", [torch.float16, torch.bfloat16])
def test_each_operation_rounds_to_the_arithmetic_of_the_format(arithmetic):
    weight = make(3, 40, **KINDS["int4 shifts"], arithmetic=arithmetic, dtype=torch.bfloat16)
    assert weight.dequantised().dtype == torch.bfloat16
    assert torch.equal(weight.dequantised(), by_hand(weight))
    wide = dataclasses.replace(weight, arithmetic=torch.float32)
    assert not torch.equal(wide.dequantised(), weight.dequantised())


@pytest.mark.parametrize("columns", [1, 2, 9])
def test_two_codes_lie_in_a_byte_the_even_column_low(columns):
    codes = torch.randint(0, 16, (3, columns), dtype=torch.uint8)
    assert torch.equal(unpacked(packed(codes), 4, columns), codes)
    assert packed(torch.tensor([[3, 10]], dtype=torch.uint8)).tolist() == [[3 + 16 * 10]]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_part_are_the_same_memory(kind):
    weight = make(6, 16, **KINDS[kind])
    part = weight.part(2, 5).part(1, 3)
    assert part.shape == (2, 16)
    assert part.codes.data_ptr() == weight.codes[3].data_ptr()
    assert torch.equal(part.dequantised(), weight.dequantised()[3:5])
    order = torch.tensor([5, 0, 3])
    assert torch.equal(weight.rows(order).dequantised(), weight.dequantised()[order])


def test_bytes_are_those_of_codes_scales_and_zeros():
    weight = make(6, 16, **KINDS["int4 zeros"])
    assert weight.bytes == 6 * (8 + 2 * 4 + 2)
    assert (weight.row_bytes, weight.column_bytes) == (18, 6 * 18 / 16)
    assert make(6, 16, **KINDS["int4 ordered"]).bytes == weight.bytes + 16 * 8
    assert repr(weight) == "<int4 weight [6, 16], groups of 8>"
    assert repr(make(6, 16, **KINDS["float8"])) == "<float8 weight [6, 16], a scale per row>"


def test_nan_and_infinite_scales_show_in_their_row_only():
    weight = make(4, 16, **KINDS["int4"])
    weight.scales[1, 0], weight.scales[2, 1] = torch.nan, torch.inf
    layer = QuantisedLinear(weight)
    assert layer(torch.rand(16)).isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("int4", {"codes": torch.zeros(4, 9, dtype=torch.uint8)}, r"uint8 \[4, 9\], .*\[4, 8\]"),
        ("int4", {"codes": torch.zeros(4, 8, dtype=torch.int8)}, "codes is int8"),
        ("int4", {"codes": torch.zeros((), dtype=torch.uint8)}, "codes is uint8"),
        ("int4", {"scales": torch.ones(4, 3)}, r"float32 \[4, 3\], expected .* \[4, 2\]"),
        ("int4", {"scales": torch.ones(4, 2).double()}, "scales is float64"),
        ("int4", {"zeros": torch.full((4, 2), 16, dtype=torch.uint8)}, "up to 16.*below 16"),
        ("int4", {"zeros": torch.zeros(4, 2)}, "zeros is float32"),
        ("int4", {"shifts": torch.zeros(4, 2).half()}, "shifts is float16"),
        ("int4", {"zero": 16}, "zero point is 16"),
        ("int4", {"bits": 3}, "3 bits, expected 4 or 8"),
        ("int4", {"group_size": 0}, "groups of 0"),
        ("int4", {"column_order": torch.zeros(16, dtype=torch.int64)}, "each column once"),
        ("int4", {"column_order": torch.arange(1, 17)}, "each column once"),
        ("int4", {"column_order": torch.arange(15)}, r"\[15\], expected int64 \[16\]"),
        ("float8", {"zero": 1}, "no zero point"),
        ("int4", {"scales": torch.ones(4, 2, device="meta")}, "are on cpu and meta"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(kind, changes, message):
    weight = dataclasses.replace(make(4, 16, **KINDS[kind]), **changes)
    with pytest.raises(ShapeError, match=message):
        QuantisedLinear(weight, name="model.q_proj")


def test_bias_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match=r"bias is float32 \[3\].*\[4\]"):
        QuantisedLinear(make(4, 16), torch.zeros(3))


@pytest.fixture(params=KINDS)
def layer(request):
    weight = make(6, 17, **KINDS[request.param])
    return QuantisedLinear(weight, torch.randn(6))


def test_layer_computes_what_a_linear_layer_of_the_numbers_computes(layer):
    x = torch.randn(2, 3, 17)
    expected = nn.functional.linear(x, by_hand(layer.matrix), layer.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.requires_grad_()), expected)


def test_gradients_reach_inputs_and_bias_and_keep_no_matrix(layer):
    x = torch.randn(2, 3, 17, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert not [t for t in kept if t.ndim == 2]
    g = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, layer.bias), g)
    y = nn.functional.linear(x, layer.matrix.dequantised(), layer.bias)
    torch.testing.assert_close(actual, torch.autograd.grad(y, (x, layer.bias), g))


def test_gradients_under_autocast_have_the_dtype_of_the_inputs(layer):
    x = torch.randn(3, 17, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    expected = layer.matrix.dequantised().sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_converts_the_numbers_only(layer, dtype):
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    numbers = layer.matrix.dequantised()
    layer.to(dtype)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8)), name
    assert layer.bias.dtype == layer.dtype == dtype
    assert torch.equal(layer.matrix.dequantised(), numbers.to(dtype))
    assert layer(torch.randn(17, dtype=dtype)).dtype == dtype


def test_tensors_move_to_another_device_and_come_back_empty(layer):
    layer.to("meta")
    assert {t.device.type for t in (*layer.buffers(), layer.bias)} == {"meta"}
    assert weight_of(layer).shape == (6, 17)
    assert not has_weights(layer)
    assert layer.to_empty(device="cpu").codes.device.type == "cpu"


def test_state_is_saved_loaded_and_copied(layer):
    zeros = {k: torch.zeros_like(v) for k, v in layer.named_buffers() if k != "column_order"}
    again = QuantisedLinear(dataclasses.replace(layer.matrix, **zeros), torch.zeros(6))
    again.load_state_dict(layer.state_dict())
    torch.save(layer, file := io.BytesIO())
    file.seek(0)
    x = torch.randn(17)
    for other in (again, copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert fingerprint.of_model(other) == fingerprint.of_model(layer)
    again.codes.view(torch.uint8)[0, 0] ^= 1
    assert fingerprint.of_model(again) != fingerprint.of_model(layer)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_layers_on_meta_are_described(config):
    model = quantise_(models.make_model(config), "int4 ordered").to("meta")
    (first, _) = find_gated_mlps(model)
    assert first.layout is not None
    assert first.gate.matrix.shape == (models.F, 16)
    with pytest.raises(UnsupportedModelError, match="meta"):
        cats.generate(model, models.make_ids(1, 4), engine="eager", max_new_tokens=1)


# What follows needs no change anywhere else: see test_new_storage.py.


@pytest.fixture(params=["int8 rows", "int4 ordered", "int4 shifts", "float8"])
def pair(request):
    """A model whose linear layers are quantised, and a dense one with the same numbers."""
    model, dense = models.make_model(), models.make_model()
    dense.load_state_dict(model.state_dict())
    quantise_(model, request.param)
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            with torch.no_grad():
                dense.get_submodule(name).weight.copy_(module.matrix.dequantised())
    return model, dense


@pytest.fixture
def batches():
    return [models.make_ids(4, 32, seed) for seed in range(3)]


def test_mlps_are_described(pair):
    quantised, dense = (find_gated_mlps(model) for model in pair)
    for mlp, twin in zip(quantised, dense, strict=True):
        assert (mlp.name, mlp.layout) == (twin.name, twin.layout)
        assert {type(m) for m in mlp.matrices.values()} == {Quantised}
        assert torch.equal(mlp.fingerprint(), twin.fingerprint())
    assert target_layers(pair[0]) == target_layers(pair[1])


def test_thresholds_are_those_of_the_same_numbers_and_apply_to_either(pair, batches):
    quantised, dense = (cats.calibrate(m, batches, target_sparsity=0.5) for m in pair)
    for name, threshold in quantised.thresholds.items():
        torch.testing.assert_close(threshold, dense.thresholds[name], rtol=0.02, atol=0)
    model, ids = pair[0], models.make_ids(seed=9)
    before = models.logits(model, ids)
    cats.sparsify_(model, quantised)
    for share in cats.metrics.realized_sparsity(model, batches).values():
        assert share == pytest.approx(0.5, abs=0.03)
    cats.sparsify_(pair[1], quantised)
    torch.testing.assert_close(models.logits(model, ids), models.logits(pair[1], ids))
    assert torch.equal(models.logits(cats.densify_(model), ids), before)


def test_a_token_reads_codes_and_scales(pair):
    model, dense = pair
    (mlp, _) = find_gated_mlps(model)
    gate = mlp.gate.matrix
    assert mlp.bytes == sum(m.bytes for m in mlp.matrices.values())
    assert mlp.bytes_read(1) == gate.bytes
    saved = sum(
        4 * m.weight.numel() - weight_of(model.get_submodule(n)).bytes
        for n, m in dense.named_modules()
        if type(m) is nn.Linear
    )
    assert saved > 0
    assert token_bytes(model) == token_bytes(dense) - saved


def test_variants_are_evaluated(pair, batches):
    model, _ = pair
    config = cats.calibrate(model, batches, target_sparsity=0.5)
    counts = InputCounts.collect(model, batches)
    for variant in (Sparse(config), counts.uniform(1 / 2), counts.teal(1 / 2)):
        perplexity, share = variant.measure(model, batches)
        assert perplexity > 1
        assert share < 0.9, variant.label
    assert mean_share(model, {}) == 1


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_tokens_are_generated(pair, batches, engine):
    model, dense = pair
    config = cats.calibrate(model, batches, target_sparsity=0.5)
    options = dict(engine=engine, max_new_tokens=6, do_sample=False)
    ids = models.make_ids(1, 8)
    actual, wanted = (cats.generate(cats.sparsify_(m, config), ids, **options) for m in pair)
    models.assert_same_tokens(dense, actual, wanted)


def test_storages_are_asked_for_by_class():
    assert weights.STORAGES[-1] is Quantised
    assert Quantised.of(nn.Linear(3, 4)) is None
