"""The reference is the package gguf: its blocks, drawn at random, and its ``dequantize``."""

import re

import gguf
import numpy as np
import pytest
import torch

from cats.errors import UnsupportedModelError
from cats.formats.gguf import GGUF
from tests.formats.layers import layer, refusal, same_bits

# columns and bytes of a block, and where its 16-bit numbers are
BLOCKS = {
    "Q8_0": (32, 34, [0]),
    "Q4_0": (32, 18, [0]),
    "Q4_1": (32, 20, [0, 2]),
    "Q5_0": (32, 22, [0]),
    "Q5_1": (32, 24, [0, 2]),
    "Q4_K": (256, 144, [0, 2]),
    "Q5_K": (256, 176, [0, 2]),
    "Q6_K": (256, 210, [208]),
}


def draw(kind, rows=5, blocks=3, seed=0):
    """Random bytes, except the 16-bit numbers, which must be finite."""
    _, size, halves = BLOCKS[kind]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in halves:
        numbers = generator.normal(size=(rows, blocks, 1)).astype(np.float16)
        data[..., at : at + 2] = numbers.view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kind", BLOCKS)
def test_numbers_are_those_of_the_library(kind, blocks):
    data = draw(kind, blocks=blocks)
    expected = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
    columns = BLOCKS[kind][0] * blocks
    tensors = {f"gguf_{kind}": torch.from_numpy(data)}
    GGUF().read(layer({k: t.to("meta") for k, t in tensors.items()}, 5, columns)).check("x")
    weight = GGUF().read(layer(tensors, 5, columns))
    weight.check("x")
    assert same_bits(weight.dequantised(), expected)
    assert weight.bits == (4 if kind.startswith("Q4") else 8)


@pytest.mark.parametrize("kind", BLOCKS)
def test_damaged_tensors_are_refused(kind):
    data = torch.from_numpy(draw(kind))
    columns = BLOCKS[kind][0] * 3
    assert re.search("expected uint8", refusal(GGUF(), {f"gguf_{kind}": data[:, :-1]}, 5, columns))
    assert "no blocks" in refusal(GGUF(), {f"gguf_{kind}": data}, 5, columns + 1)


def test_a_file_is_not_written():
    with pytest.raises(UnsupportedModelError, match=r"CatsConfig\.save"):
        GGUF().write("x", None, {})
