"""Random quantised weights for tests, alone and instead of the linear layers of a model."""

import torch
from torch import nn

from cats.weights import Quantised, QuantisedLinear
from cats.weights.quantised import FLOAT8, packed

# Options of make, by the name of a kind.
KINDS = {
    "int8 rows": dict(bits=8, zero=128),
    "int8 groups": dict(bits=8, group_size=4, zero=128),
    "int4": dict(bits=4, group_size=8, zero=8),
    "int4 zeros": dict(bits=4, group_size=8, zeros=True),
    "int4 shifts": dict(bits=4, group_size=8, shifts=True, scale_dtype=torch.float16),
    "int4 ordered": dict(bits=4, group_size=8, zeros=True, ordered=True),
    "float8": dict(bits=8, float8=True),
}


def make(
    rows,
    columns,
    *,
    bits=8,
    group_size=None,
    zero=0,
    zeros=False,
    shifts=False,
    ordered=False,
    float8=False,
    scale_dtype=torch.float32,
    seed=0,
    **fields,
):
    """Codes drawn at random, with scales that give products of about unit variance."""
    generator = torch.Generator().manual_seed(seed)
    group_size = group_size or columns
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    scales = torch.rand(rows, groups, generator=generator) + 0.5
    scales *= columns**-0.5 * (2**-bits) * 3.5
    if float8:
        codes, scales = torch.randn(rows, columns, generator=generator).to(FLOAT8), scales * 70
    shift = (torch.rand(rows, groups, generator=generator) - 2) * scales * 5 if shifts else None
    zero_points = torch.randint(0, 2**bits, (rows, groups), generator=generator).to(torch.uint8)
    return Quantised(
        codes=codes if bits == 8 else packed(codes),
        scales=scales.to(scale_dtype),
        bits=bits,
        columns=columns,
        group_size=group_size,
        zero=zero,
        zeros=zero_points if zeros else None,
        shifts=None if shift is None else shift.to(scale_dtype),
        column_order=torch.randperm(columns, generator=generator) if ordered else None,
        **fields,
    )


def quantise_(model, kind, only="", **changes):
    """Replace the linear layers whose name contains ``only`` by random quantised ones."""
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if type(module) is nn.Linear and only in name:
            dtype = module.weight.dtype
            weight = make(*module.weight.shape, **KINDS[kind] | changes, seed=seed, dtype=dtype)
            model.set_submodule(name, QuantisedLinear(weight, module.bias, name=name))
    return model
