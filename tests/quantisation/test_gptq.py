"""Codes against GPTQ written once more in numpy: one column at a time, with the whole inverse."""

import numpy as np
import pytest
import torch

from cats.errors import DataError
from cats.quantisation import rounded
from cats.quantisation.gptq import gptq_rounded
from cats.weights.quantised import unpacked


def draw(rows, columns, tokens=None, seed=0):
    """A matrix, and inputs whose channels are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens or 3 * columns, columns, generator=generator)
    mixed = mixed + mixed[:, :1] * torch.rand(columns, generator=generator)
    inputs = mixed * (0.2 + 2 * torch.rand(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), inputs


def by_hand(values, inputs, bits, group_size):
    """Optimal brain compression, column by column: the inverse of the columns that are left."""
    values, inputs = values.double().numpy().copy(), inputs.double().numpy()
    rows, columns = values.shape
    size, half = group_size or columns, 2 ** (bits - 1)
    # the largest number of a group lies between two codes: float32 decides, as it does there
    largest = [abs(values[:, at : at + size]).max(1) for at in range(0, columns, size)]
    scales = np.stack(largest, 1).astype(np.float32) / np.float32(half - 0.5)
    hessian = inputs.T @ inputs
    order = np.argsort(-hessian.diagonal(), kind="stable")
    hessian += 0.01 * hessian.diagonal().mean() * np.eye(columns)
    left = [*order]
    codes = np.zeros((rows, columns), dtype=int)
    while left:
        column = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        scale = scales[:, column // size]
        quotients = values[:, column].astype(np.float32) / scale
        code = np.clip(np.round(quotients), -half, half - 1).astype(int)
        error = (values[:, column] - code * scale.astype(float)) / inverse[0, 0]
        values[:, left] -= np.outer(error, inverse[0])
        codes[:, column] = code + half
        left = left[1:]
    return codes


def loss(values, weight, inputs):
    return float((inputs.double() @ (values - weight.dequantised()).double().t()).square().sum())


def codes_of(weight):
    return unpacked(weight.codes, weight.bits, weight.columns)


@pytest.mark.parametrize(
    ("columns", "group_size"), [(1, None), (33, None), (64, 16), (64, 32), (130, 13), (257, None)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_by_hand(columns, group_size, bits):
    values, inputs = draw(5, columns)
    weight = gptq_rounded(values, inputs.t() @ inputs, bits=bits, group_size=group_size)
    expected = by_hand(values, inputs, bits, group_size)
    # float32 may decide otherwise about a number between two codes
    different = (codes_of(weight).numpy() != expected).mean()
    assert different <= (0.002 if bits == 4 else 0.02)
    assert weight.group_size == (group_size or columns)
    assert (weight.bits, weight.zero, weight.column_order) == (bits, 2 ** (bits - 1), None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("seed", range(5))
def test_outputs_on_the_inputs_change_less_than_by_rounding(bits, group_size, seed):
    values, inputs = draw(32, 64, seed=seed)
    options = dict(bits=bits, group_size=group_size)
    of_gptq = loss(values, gptq_rounded(values, inputs.t() @ inputs, **options), inputs)
    assert of_gptq < 0.8 * loss(values, rounded(values, **options), inputs)


def test_scales_are_those_of_rounding_in_the_dtype_of_the_weights():
    values, inputs = draw(8, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = gptq_rounded(values.to(dtype), inputs.t() @ inputs, bits=4, group_size=16)
        assert weight.dtype == weight.arithmetic == weight.scales.dtype == dtype
        assert torch.equal(weight.scales, rounded(values.to(dtype), bits=4, group_size=16).scales)


def test_inputs_that_say_nothing_give_the_nearest_codes():
    values, _ = draw(4, 32)
    nearest = rounded(values, bits=4, group_size=8)
    for hessian in (torch.zeros(32, 32), torch.eye(32)):
        assert torch.equal(gptq_rounded(values, hessian, bits=4, group_size=8).codes, nearest.codes)


def test_channels_without_inputs_keep_their_nearest_codes():
    values, inputs = draw(4, 32)
    inputs[:, 3] = 0
    weight = gptq_rounded(values, inputs.t() @ inputs, bits=4, group_size=8)
    nearest = rounded(values, bits=4, group_size=8)
    assert torch.equal(codes_of(weight)[:, 3], codes_of(nearest)[:, 3])


def test_fewer_tokens_than_channels_are_enough():
    values, inputs = draw(16, 64, tokens=3)
    options = dict(bits=4, group_size=16)
    weight = gptq_rounded(values, inputs.t() @ inputs, **options)
    assert loss(values, weight, inputs) < loss(values, rounded(values, **options), inputs)


def test_the_same_call_gives_the_same_codes():
    values, inputs = draw(16, 64)
    first, again = (
        gptq_rounded(values, inputs.t() @ inputs, bits=4, group_size=16) for _ in range(2)
    )
    assert torch.equal(first.codes, again.codes)


def test_nan_in_the_inputs_is_an_error():
    with pytest.raises(DataError, match="NaN"):
        gptq_rounded(torch.randn(2, 4), torch.full((4, 4), torch.nan), bits=4)
