"""Layers of checkpoints, and the checks that every format passes."""

import torch

from cats.errors import FormatError
from cats.formats import Layer


def layer(tensors, rows, columns, *, name="model.layers.0.mlp.up_proj", dtype=torch.float32):
    return Layer(name=name, rows=rows, columns=columns, dtype=dtype, tensors=tensors)


def read_and_write(format_, stored):
    """The weight of a layer; also reads its shapes alone, and writes it back."""
    shapes = {part: tensor.to("meta") for part, tensor in stored.tensors.items()}
    format_.read(layer(shapes, stored.rows, stored.columns)).check(stored.name)
    weight = format_.read(stored)
    weight.check(stored.name)
    like = {
        part: tensor if part in format_.kept else tensor.to("meta")
        for part, tensor in stored.tensors.items()
    }
    written = format_.write(stored.name, weight, like)
    assert written.keys() == stored.tensors.keys()
    for part, tensor in stored.tensors.items():
        assert written[part].dtype == tensor.dtype, part
        assert written[part].is_contiguous(), part
        assert same_bits(written[part], tensor), part
    return weight


def same_bits(a, b):
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def refusal(format_, tensors, rows, columns):
    """The message that refuses a layer with these tensors."""
    try:
        format_.read(layer(tensors, rows, columns)).check("x")
    except FormatError as error:
        return str(error)
    raise AssertionError("it was read")
