"""The reference is the package compressed-tensors, which reads the layout: AutoAWQ needs a GPU.

A number is ``(code - zero) * scale`` in the dtype of the scales, as AutoAWQ's ``dequantize_gemm``.
"""

import re

import pytest
import torch

from cats.formats.awq import AWQ
from tests.formats.layers import layer, read_and_write, refusal, same_bits

ROWS, COLUMNS, GROUP = 16, 48, 16
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}


def draw(group_size=GROUP, seed=0, rows=ROWS, columns=COLUMNS):
    generator = torch.Generator().manual_seed(seed)

    def word(*shape):
        return torch.randint(-(2**31), 2**31, shape, generator=generator).int()

    groups = -(-columns // group_size)
    return {
        "qweight": word(columns, rows // 8),
        "qzeros": word(groups, rows // 8),
        "scales": (torch.rand(groups, rows, generator=generator) * 0.1).half(),
    }


@pytest.mark.parametrize("group_size", [GROUP, COLUMNS])
def test_numbers_are_those_of_the_library(group_size):
    pytest.importorskip("compressed_tensors", reason="the reference")
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    tensors = draw(group_size)
    codes, zeros = AutoAWQConverter.unpack_awq(tensors["qweight"], tensors["qzeros"], 4)
    codes, zeros = AutoAWQConverter.reverse_awq_order(codes, zeros, 4)
    codes, zeros = codes & 15, zeros & 15
    spread = [t.repeat_interleave(group_size, 0) for t in (zeros, tensors["scales"])]
    expected = ((codes - spread[0]) * spread[1]).t()
    stored = layer(tensors, ROWS, COLUMNS, dtype=torch.float16)
    weight = read_and_write(AWQ(CONFIG | {"group_size": group_size}), stored)
    assert same_bits(weight.dequantised(), expected)


def test_rows_of_a_word_are_interleaved():
    tensors = draw()
    # the lowest code of a word is its row 0, the next one its row 2
    tensors["qweight"][:] = 0x000000F0
    tensors["qzeros"][:] = 0
    tensors["scales"][:] = 1
    weight = AWQ(CONFIG).read(layer(tensors, ROWS, COLUMNS))
    assert [row for row in range(8) if weight.dequantised()[row].any()] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scales"), "has no scales"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), r"int32 \[47, 2\], expected"),
        (lambda t: t.update(qzeros=t["qzeros"][:-1]), r"\[2, 2\]"),
        (lambda t: t.update(scales=t["scales"].int()), "scales int32"),
    ],
)
def test_damaged_tensors_are_refused(change, message):
    tensors = draw()
    change(tensors)
    assert re.search(message, refusal(AWQ(CONFIG), tensors, ROWS, COLUMNS))


@pytest.mark.parametrize("changes", [{"version": "gemv"}, {"bits": 8}])
def test_other_kinds_are_left_to_transformers(changes):
    with pytest.raises(ValueError, match=r"gemv|8 bits"):
        AWQ(CONFIG | changes)
