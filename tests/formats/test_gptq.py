"""The reference is the published formulas: GPTQModel itself needs a GPU or a compiler.

A number is ``scales[g_idx] * (code - zero)`` in the dtype of the scales. A word of ``qweight`` has
32 / bits consecutive columns, the first in the lowest bits, and a word of ``qzeros`` as many rows.
Version 1 of the format stores ``zero - 1``, subtracted from whole words.
"""

import re

import pytest
import torch

from cats.formats.gptq import GPTQ
from tests.formats.layers import layer, read_and_write, refusal, same_bits

ROWS, COLUMNS, GROUP = 16, 48, 16


def words(codes, bits):
    """Packs consecutive codes of the first dimension into words, one code at a time."""
    each = 32 // bits
    packed = torch.zeros(len(codes) // each, codes.shape[1], dtype=torch.int64)
    for i, row in enumerate(codes):
        packed[i // each] |= row.long() << (bits * (i % each))
    # two's complement
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def draw(bits, *, version=1, group_size=GROUP, g_idx=None, rows=ROWS, columns=COLUMNS, seed=0):
    """Tensors of a layer, and the numbers that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (columns, rows), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, rows), generator=generator)
    scales = (torch.rand(groups, rows, generator=generator) * 0.1).half()
    of_columns = torch.arange(columns) // group_size if g_idx is None else g_idx
    differences = (codes - zeros[of_columns]).to(torch.int8 if bits == 4 else torch.int16)
    expected = scales[of_columns] * differences
    tensors = {
        "qweight": words(codes, bits),
        "qzeros": words((zeros - int(version == 1)).t(), bits).t().contiguous(),
        "scales": scales,
    }
    if g_idx is not None:
        tensors["g_idx"] = g_idx.int()
    return tensors, expected.t()


def config(bits=4, version=1, **changes):
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "desc_act": False,
        **changes,
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_are_those_of_the_formula(bits, version):
    tensors, expected = draw(bits, version=version)
    stored = layer(tensors, ROWS, COLUMNS, dtype=torch.float16)
    weight = read_and_write(GPTQ(config(bits, version)), stored)
    assert expected.dtype == torch.float16
    assert same_bits(weight.dequantised(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_the_order_of_activations(bits):
    g_idx = torch.arange(COLUMNS)[torch.randperm(COLUMNS)] // GROUP
    tensors, expected = draw(bits, g_idx=g_idx)
    stored = layer(tensors, ROWS, COLUMNS, dtype=torch.float16)
    weight = read_and_write(GPTQ(config(bits, desc_act=True)), stored)
    assert weight.column_order is not None
    assert same_bits(weight.dequantised(), expected)


def test_a_trivial_order_is_none():
    tensors, _ = draw(4, g_idx=torch.arange(COLUMNS) // GROUP)
    assert read_and_write(GPTQ(config()), layer(tensors, ROWS, COLUMNS)).column_order is None


@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_groups_of_other_sizes(group_size):
    size = COLUMNS if group_size == -1 else group_size
    tensors, expected = draw(4, group_size=size)
    stored = layer(tensors, ROWS, COLUMNS, dtype=torch.float16)
    weight = read_and_write(GPTQ(config(group_size=group_size)), stored)
    assert same_bits(weight.dequantised(), expected)


def test_zero_points_that_carry_come_back():
    """Version 1 subtracts from whole words, so a zero point of 0 borrows from the next code."""
    tensors, _ = draw(4, version=2)
    zeros = torch.zeros(ROWS, 3, dtype=torch.int64)
    zeros[5] = 3
    tensors["qzeros"] = words(zeros, 4).t().contiguous() - 0x11111111
    weight = read_and_write(GPTQ(config()), layer(tensors, ROWS, COLUMNS))
    assert torch.equal(weight.zeros.long(), zeros)


def test_one_zero_point_for_all_is_kept_as_one_number():
    tensors, _ = draw(4)
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], 0x77777777)
    weight = read_and_write(GPTQ(config()), layer(tensors, ROWS, COLUMNS))
    assert (weight.zeros, weight.zero) == (None, 8)


def test_layers_may_have_other_bits_than_the_config():
    tensors, expected = draw(8)
    weight = GPTQ(config(4)).read(layer(tensors, ROWS, COLUMNS, dtype=torch.float16))
    assert same_bits(weight.dequantised(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("qzeros"), "has no qzeros"),
        (lambda t: t.pop("g_idx"), "has no g_idx"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), "has 5 words for 48 columns"),
        (lambda t: t.update(scales=t["scales"][:-1]), r"float16 \[2, 16\], expected"),
        (lambda t: t.update(scales=t["scales"].double()), "scales float64"),
        (lambda t: t.update(qzeros=t["qzeros"][:, :1]), r"\[3, 1\]"),
        (lambda t: t.update(g_idx=t["g_idx"][1:]), r"g_idx int32 \[47\]"),
        (lambda t: t["g_idx"].__setitem__(0, 3), "groups 0 to 3, expected 0 to 2.*damaged"),
        (lambda t: t["g_idx"].__setitem__(0, -1), "groups -1 to 2"),
        (lambda t: t["g_idx"].__setitem__(0, 2), "15 to 17 columns.*cannot be laid out"),
    ],
)
def test_damaged_tensors_are_refused(change, message):
    tensors, _ = draw(4, g_idx=torch.arange(COLUMNS) // GROUP)
    change(tensors)
    said = refusal(GPTQ(config(desc_act=True)), tensors, ROWS, COLUMNS)
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "3 bits"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"is_marlin_format": True}, "marlin"),
    ],
)
def test_other_kinds_are_left_to_transformers(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(config() | changes)
