"""The reference is the package compressed-tensors: its compressors pack and unpack."""

import re

import pytest
import torch

from cats.formats.compressed_tensors import CompressedTensors
from cats.weights.quantised import FLOAT8
from tests.formats.layers import layer, read_and_write, refusal, same_bits

pytest.importorskip("compressed_tensors", reason="the format's own library")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

ROWS, COLUMNS = 12, 64


def scheme(format_, **weights):
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", **weights}
    return QuantizationScheme(targets=["Linear"], weights=args, format=format_)


def config(scheme):
    block = {"targets": scheme.targets, "weights": scheme.weights.model_dump(mode="json")}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": block},
    }


def compress(scheme, rows=ROWS, columns=COLUMNS, dtype=torch.float32, seed=0):
    """The tensors that the library stores for a random matrix."""
    generator = torch.Generator().manual_seed(seed)
    args = scheme.weights
    matrix = torch.randn(rows, columns, generator=generator).to(dtype)
    wide = {"group": args.group_size, "block": (args.block_structure or [0, 0])[1]}.get(
        args.strategy, columns
    )
    high = {"tensor": rows, "block": (args.block_structure or [1])[0]}.get(args.strategy, 1)
    shape = (-(-rows // high), -(-columns // wide))
    if args.strategy == "tensor":
        shape = (1,)
    top = 448 if args.type == "float" else 2 ** (args.num_bits - 1)
    scale = (torch.rand(shape, generator=generator) * 2 + 1).div(top).to(dtype)
    tensors = {"weight": matrix, "weight_scale": scale}
    if not args.symmetric:
        low = -(2 ** (args.num_bits - 1))
        points = torch.randint(low, -low, shape, generator=generator)
        tensors["weight_zero_point"] = points.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.compress(tensors, scheme)


CASES = {
    "int4 groups": ("pack-quantized", dict(strategy="group", group_size=16)),
    "int4 rows": ("pack-quantized", dict()),
    "int4 zeros": ("pack-quantized", dict(strategy="group", group_size=16, symmetric=False)),
    "int4 row zeros": ("pack-quantized", dict(symmetric=False)),
    "int8 groups": ("pack-quantized", dict(num_bits=8, strategy="group", group_size=16)),
    "int8 zeros": (
        "pack-quantized",
        dict(num_bits=8, strategy="group", group_size=16, symmetric=False),
    ),
    "int8 rows": ("int-quantized", dict(num_bits=8)),
    "int8 row zeros": ("int-quantized", dict(num_bits=8, symmetric=False)),
    "int8 matrix": ("int-quantized", dict(num_bits=8, strategy="tensor")),
    "int4 numbers": ("int-quantized", dict(strategy="group", group_size=16)),
    "float8 rows": ("float-quantized", dict(num_bits=8, type="float")),
    "float8 matrix": ("float-quantized", dict(num_bits=8, type="float", strategy="tensor")),
    "float8 blocks": (
        "float-quantized",
        dict(num_bits=8, type="float", strategy="block", block_structure=[8, 16]),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_library(case, dtype):
    format_, weights = CASES[case]
    how = scheme(format_, **weights)
    tensors = compress(how, dtype=dtype)
    compressor = BaseCompressor.get_value_from_registry(format_)
    expected = compressor.decompress(tensors, how)["weight"]
    assert expected.dtype == dtype
    stored = layer(tensors, ROWS, COLUMNS, dtype=dtype)
    weight = read_and_write(CompressedTensors(config(how)), stored)
    assert same_bits(weight.dequantised(), expected)
    assert weight.bits == how.weights.num_bits


@pytest.mark.parametrize("columns", [1, 7, 33])
@pytest.mark.parametrize("case", ["int4 rows", "int4 row zeros", "int8 rows", "float8 rows"])
def test_odd_sizes(case, columns):
    format_, weights = CASES[case]
    how = scheme(format_, **weights)
    tensors = compress(how, rows=13, columns=columns)
    expected = BaseCompressor.get_value_from_registry(format_).decompress(tensors, how)["weight"]
    weight = read_and_write(CompressedTensors(config(how)), layer(tensors, 13, columns))
    assert same_bits(weight.dequantised(), expected)


def test_scales_of_activations_are_kept():
    how = scheme("int-quantized", num_bits=8)
    tensors = compress(how) | {"input_scale": torch.ones(1), "input_zero_point": torch.ones(1)}
    read_and_write(CompressedTensors(config(how)), layer(tensors, ROWS, COLUMNS))


def test_symmetric_codes_have_one_zero_point():
    how = scheme("pack-quantized", strategy="group", group_size=16)
    weight = CompressedTensors(config(how)).read(layer(compress(how), ROWS, COLUMNS))
    assert (weight.zeros, weight.zero) == (None, 8)


def test_float8_codes_stay_as_they_are():
    how = scheme("float-quantized", num_bits=8, type="float")
    tensors = compress(how)
    weight = CompressedTensors(config(how)).read(layer(tensors, ROWS, COLUMNS))
    assert weight.codes.dtype == FLOAT8
    assert weight.codes.data_ptr() == tensors["weight"].data_ptr()


def test_columns_in_the_order_of_activations():
    """Releases after 0.12 write no order; this is how earlier ones stored it."""
    how = scheme("pack-quantized", strategy="group", group_size=16, symmetric=False)
    tensors = compress(how)
    groups = torch.arange(COLUMNS)[torch.randperm(COLUMNS)] // 16
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    # stored columns are sorted by group, read, and put back
    order = groups.argsort(stable=True)
    sorted_ = dict(tensors)
    plain = CompressedTensors(config(how)).read(layer(tensors, ROWS, COLUMNS))
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )

    codes = unpack_from_int32(tensors["weight_packed"], 4, (ROWS, COLUMNS))
    sorted_["weight_packed"] = pack_to_int32(codes[:, order], 4)
    expected = compressor.decompress(sorted_, how)["weight"][:, order.argsort()]
    tensors["weight_g_idx"] = groups.int()
    weight = read_and_write(CompressedTensors(config(how)), layer(tensors, ROWS, COLUMNS))
    assert same_bits(weight.dequantised(), expected)
    assert not torch.equal(weight.dequantised(), plain.dequantised())
    tensors["weight_g_idx"] = torch.full((COLUMNS,), -1, dtype=torch.int32)
    unordered = read_and_write(CompressedTensors(config(how)), layer(tensors, ROWS, COLUMNS))
    assert unordered.column_order is None


def test_layers_have_the_scheme_of_their_group():
    groups = {
        "heavy": {
            "targets": ["re:.*down_proj$"],
            "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True},
        },
        "light": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "strategy": "channel", "symmetric": True},
        },
    }
    both = CompressedTensors({"format": "pack-quantized", "config_groups": groups})
    for name, bits in (("model.layers.0.mlp.down_proj", 8), ("model.layers.0.mlp.up_proj", 4)):
        tensors = compress(scheme("pack-quantized", num_bits=bits))
        assert both.read(layer(tensors, ROWS, COLUMNS, name=name)).bits == bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight_scale"), "has no weight_scale"),
        (lambda t: t.pop("weight_shape"), "has no weight_shape"),
        (lambda t: t.update(weight_packed=t["weight_packed"][:, :-1]), r"int32 \[12, 7\]"),
        (lambda t: t.update(weight_packed=t["weight_packed"].long()), "weight_packed int64"),
        (lambda t: t.update(weight_scale=t["weight_scale"][:-1]), r"\[11, 4\], expected"),
        (lambda t: t.update(weight_scale=t["weight_scale"].int()), "weight_scale int32"),
        (lambda t: t.update(weight_shape=torch.tensor([12, 65])), r"weight_shape \[12, 65\]"),
        (lambda t: t.update(weight_zero_point=t["weight_zero_point"][:1]), r"\[1, 4\]"),
        (lambda t: t.update(weight_g_idx=torch.arange(64)), "groups 0 to 63, expected 0 to 3"),
        (lambda t: t.update(weight_g_idx=torch.zeros(64).int()), "cannot be laid out"),
    ],
)
def test_damaged_tensors_are_refused(change, message):
    how = scheme("pack-quantized", strategy="group", group_size=16, symmetric=False)
    tensors = compress(how)
    change(tensors)
    assert re.search(message, refusal(CompressedTensors(config(how)), tensors, ROWS, COLUMNS))


def test_codes_of_four_bits_in_bytes_are_checked():
    how = scheme("int-quantized", strategy="group", group_size=16)
    tensors = compress(how)
    tensors["weight"][3, 5] = 8
    assert "8, expected -8 to 7" in refusal(CompressedTensors(config(how)), tensors, ROWS, COLUMNS)


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, {}, "nvfp4"),
        ({"kv_cache_scheme": {"num_bits": 8}}, {}, "kv_cache"),
        ({"config_groups": {}}, {}, "no config_groups"),
        ({}, {"num_bits": 3}, "int3"),
        ({}, {"type": "float"}, "float4"),
        ({}, {"strategy": "token"}, "token"),
        ({}, {"strategy": "group", "group_size": -1}, "groups of -1"),
    ],
)
def test_other_kinds_are_left_to_transformers(changes, weights, message):
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": args}}
    with pytest.raises(ValueError, match=message):
        CompressedTensors({"format": "pack-quantized", "config_groups": groups, **changes})
