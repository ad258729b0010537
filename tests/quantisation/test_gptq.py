"""Codes against GPTQ written once more in numpy: one column at a time, with the whole inverse."""

import numpy as np
import pytest
import torch

from cats.errors import DataError
from cats.quantisation import rounded
from cats.quantisation.gptq import gptq_rounded
from cats.weights.quantised import packed, unpacked


def draw(rows, columns, tokens=None, seed=0):
    """A matrix, and inputs whose channels are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens or 3 * columns, columns, generator=generator)
    mixed = mixed + mixed[:, :1] * torch.rand(columns, generator=generator)
    inputs = mixed * (0.2 + 2 * torch.rand(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), inputs


def scales_by_hand(values, bits, group_size):
    """Of each group the scale with the least squares; in 8 bits that of the largest number."""
    values, half = values.numpy(), 2 ** (bits - 1)
    size = group_size or values.shape[1]
    scales = np.zeros((len(values), values.shape[1] // size), dtype=np.float32)
    for row, group in np.ndindex(*scales.shape):
        numbers = values[row, group * size : (group + 1) * size]
        largest = abs(numbers).max() / np.float32(half - 0.5)
        tried = [largest * np.float32(share / 40) for share in range(40, 21, -1)]
        tried = tried[: 1 if bits == 8 else None]
        losses = [
            np.square(np.clip(np.round(numbers / s), -half, half - 1) * s - numbers).sum()
            for s in tried
        ]
        scales[row, group] = tried[int(np.argmin(losses))]
    return scales


def by_hand(values, inputs, scales, bits):
    """Optimal brain compression, column by column: the inverse of the columns that are left."""
    values, inputs = values.double().numpy().copy(), inputs.double().numpy()
    rows, columns = values.shape
    size, half = columns // scales.shape[1], 2 ** (bits - 1)
    hessian = inputs.T @ inputs
    order = np.argsort(-hessian.diagonal(), kind="stable")
    hessian += 0.01 * hessian.diagonal().mean() * np.eye(columns)
    left = [*order]
    codes = np.zeros((rows, columns), dtype=int)
    while left:
        column = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        scale = scales[:, column // size]
        # float32 decides about numbers between two codes, as it does there
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
    scales = scales_by_hand(values, bits, group_size)
    # sums in another order may decide otherwise between two scales that are as good
    assert (abs(weight.scales.numpy() / scales - 1) > 1e-6).mean() <= 0.02
    expected = by_hand(values, inputs, weight.scales.numpy(), bits)
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


def test_scales_and_numbers_have_the_dtype_of_the_weights():
    values, inputs = draw(8, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = gptq_rounded(values.to(dtype), inputs.t() @ inputs, bits=4, group_size=16)
        assert weight.dtype == weight.arithmetic == weight.scales.dtype == dtype


def test_inputs_that_say_nothing_give_the_nearest_codes():
    values, _ = draw(4, 32)
    for hessian in (torch.zeros(32, 32), torch.eye(32)):
        weight = gptq_rounded(values, hessian, bits=4, group_size=8)
        assert torch.equal(weight.codes, packed(nearest(values, weight.scales)))


def nearest(values, scales):
    """The nearest codes of 4 bits to numbers in groups of 8."""
    quotients = values / scales.repeat_interleave(8, 1)
    return (quotients.round().clamp(-8, 7) + 8).to(torch.uint8)


def test_scales_lose_less_than_those_of_the_largest_number_and_zeros_stay_zeros():
    values, _ = draw(16, 64)
    found = gptq_rounded(values, torch.eye(64), bits=4, group_size=16)
    plain = rounded(values, bits=4, group_size=16)
    losses = [float((w.dequantised() - values).norm()) for w in (found, plain)]
    assert losses[0] < 0.97 * losses[1]
    zeros = gptq_rounded(torch.zeros(2, 8), torch.eye(8), bits=4, group_size=4)
    assert torch.equal(zeros.dequantised(), torch.zeros(2, 8))


def test_channels_without_inputs_keep_their_nearest_codes():
    values, inputs = draw(4, 32)
    inputs[:, 3] = 0
    weight = gptq_rounded(values, inputs.t() @ inputs, bits=4, group_size=8)
    assert torch.equal(codes_of(weight)[:, 3], nearest(values, weight.scales)[:, 3])


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


def test_eight_bits_do_not_cut_the_largest_number_of_a_row():
    # the least squares of this row would cut it by three steps
    values = torch.randn(1, 576, generator=torch.Generator().manual_seed(12))
    weight = gptq_rounded(values, torch.eye(576), bits=8)
    errors = (weight.dequantised() - values).abs()
    assert errors.max() <= weight.scales.item() / 2 * 1.001
