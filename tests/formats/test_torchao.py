"""The reference is torchao: its tensors, how it flattens them, and their ``dequantize``."""

import re

import pytest
import torch
from torch import nn

from cats.formats.torchao import TorchAO
from tests.formats.layers import layer, read_and_write, refusal, same_bits

pytest.importorskip("torchao", reason="the format's own library")
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Int4Tensor,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor
from torchao.quantization.quant_primitives import MappingType

ROWS, COLUMNS = 12, 64
NAME = "model.layers.0.mlp.up_proj"


def config(kind="Int8WeightOnlyConfig"):
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": {}}}}


def flatten(weight):
    """The tensors of a layer as torchao saves them, and a format that knows their metadata."""
    tensors, metadata = flatten_tensor_state_dict({f"{NAME}.weight": weight})
    format_ = TorchAO(config())
    format_.read_metadata(metadata)
    return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}, format_


def quantise(how, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype))
    quantize_(model, how)
    return model[0].weight


CASES = {
    "int8 rows": Int8WeightOnlyConfig(granularity=PerRow()),
    "int8 matrix": Int8WeightOnlyConfig(granularity=PerTensor()),
    "int8 groups": IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(16)),
    "int4 groups": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
    "int4 rows": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)),
    "int4 zeros": IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(16), mapping_type=MappingType.ASYMMETRIC
    ),
    "int3 groups": IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(16)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_library(case, dtype):
    stored = quantise(CASES[case], dtype)
    tensors, format_ = flatten(stored)
    weight = read_and_write(format_, layer(tensors, ROWS, COLUMNS, name=NAME, dtype=dtype))
    assert same_bits(weight.dequantised(), stored.dequantize())
    assert weight.bits == (4 if "int4" in case else 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int4_of_the_plain_layout(dtype):
    """torchao cannot make these without a GPU, nor dequantise them: this is how its rows are made.

    Codes of -8 to 7, the even column low, times the scale, plus the float zero point.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), generator=generator)
    scale, zero = (torch.randn(4, ROWS, generator=generator).to(dtype) for _ in range(2))
    pairs = ((codes[:, 1::2] & 15) << 4 | codes[:, ::2] & 15).to(torch.uint8).view(torch.int8)
    tensors, format_ = flatten(Int4Tensor(pairs, scale, zero, [1, 16], (ROWS, COLUMNS)))
    weight = read_and_write(format_, layer(tensors, ROWS, COLUMNS, name=NAME))
    spread = [t.t().float().repeat_interleave(16, 1) for t in (scale, zero)]
    assert same_bits(weight.dequantised(), codes * spread[0] + spread[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("_weight_scale"), "has no _weight_scale"),
        (lambda t: t.update(_weight_qdata=t["_weight_qdata"][:, 1:]), r"int8 \[12, 63\]"),
        (lambda t: t.update(_weight_scale=t["_weight_scale"][:, 1:]), r"\[12, 3\]"),
        (lambda t: t["_weight_qdata"].__setitem__((2, 2), 9), "codes -?[0-9]+ to 9"),
        (lambda t: t.update(_weight_act_pre_scale=torch.ones(1)), "act_pre_scale"),
    ],
)
def test_damaged_tensors_are_refused(change, message):
    tensors, format_ = flatten(quantise(CASES["int4 groups"]))
    change(tensors)
    said = None
    try:
        format_.read(layer(tensors, ROWS, COLUMNS, name=NAME))
    except ValueError as error:
        said = str(error)
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{}", "no metadata"),
        ('{"_type": "Int8Tensor", "_data": {}}', "damaged metadata"),
        ('{"_type": "Float8Tensor", "_data": {}}', "Float8Tensor, which is not read"),
    ],
)
def test_damaged_metadata_is_refused(metadata, message):
    tensors, _ = flatten(quantise(CASES["int8 rows"]))
    format_ = TorchAO(config())
    assert "no metadata" in refusal(format_, tensors, ROWS, COLUMNS)
    format_.read_metadata({f"{NAME}.weight": metadata})
    assert message in refusal(format_, tensors, ROWS, COLUMNS)


def test_other_kinds_are_left_to_transformers():
    with pytest.raises(ValueError, match="Float8"):
        TorchAO(config("Float8WeightOnlyConfig"))
