"""GPTQ of one matrix: what rounding a column adds to the output is taken off the next columns.

Source: arXiv:2210.17323. As in later versions of its code, the columns with the largest inputs come
first, and scales are chosen before, group by group of the given matrix, so that no order is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cats.errors import DataError
from cats.quantisation.rounding import codes_of, in_groups, of_codes, positive, scales_of
from cats.weights import Quantised

# Columns whose errors are taken off the columns after them in one product.
_BLOCK = 128
# Scales that are tried, as shares of the one that reaches the largest number of a group.
_SHARES = tuple(share / 40 for share in range(40, 21, -1))
# Share of the mean of the diagonal that is added to it; the next one where the factor fails.
_DAMPING = (0.01, 0.1, 1.0)


def gptq_rounded(
    values: Tensor, hessian: Tensor, *, bits: int, group_size: int | None = None
) -> Quantised:
    """Codes of a matrix that change its outputs on given inputs little.

    Args:
        values: ``[rows, columns]``.
        hessian: ``[columns, columns]``, float32: ``X^T X`` of the inputs ``X [tokens, columns]``.
        bits: 4 or 8.
        group_size: Columns that share a scale; None for a scale per row.

    Returns:
        Codes and scales; scales have the dtype of ``values``, and are those of :func:`best_scales`.

    Raises:
        DataError: If the inputs have NaN or infinity in them.
    """
    columns = values.shape[1]
    groups = in_groups(values, group_size)
    scales = best_scales(groups, bits, values.dtype)
    # stable: the same order on every machine
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _factor(hessian[order][:, order])
    # transposed, so that a column is contiguous
    rest = values.detach().float().t()[order]
    of_columns = scales.repeat_interleave(groups.shape[2], 1)[:, :columns].t()[order]
    wide = of_columns.float()
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty_like(rest[start:stop])
        for at in range(start, stop):
            codes[at] = codes_of(rest[at], wide[at], bits)
            # in the dtype in which the numbers are read again
            numbers = (codes[at].to(scales.dtype) - 2 ** (bits - 1)) * of_columns[at]
            errors[at - start] = (rest[at] - numbers.float()) / factor[at, at]
            rest[at:stop].addr_(factor[at, at:stop], errors[at - start], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    in_place = torch.empty_like(codes).index_copy_(0, order, codes).t().contiguous()
    return of_codes(in_place, scales, bits=bits, group_size=groups.shape[2], like=values)


def best_scales(groups: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The scale of each group whose nearest codes have the smallest sum of squared errors.

    In 8 bits, that which reaches the largest number. A step is small there, so that a smaller scale
    makes the sum hardly smaller; and cutting the largest numbers costs more than their squares say,
    since a large input often meets a large weight.

    Args:
        groups: ``[rows, G, group_size]``, float32.
        bits: 4 or 8.
        dtype: Of the scales.

    Returns:
        ``[rows, G]``.
    """
    largest = scales_of(groups, bits, dtype)
    if bits == 8:
        return largest
    best, least = largest, None
    for share in _SHARES:
        scales = positive((largest.float() * share).to(dtype))
        wide = scales[..., None].float()
        numbers = (codes_of(groups, wide, bits).float() - 2 ** (bits - 1)).mul_(wide)
        errors = numbers.sub_(groups).square_().sum(2)
        if least is None:
            least = errors
            continue
        better = errors < least
        best, least = scales.where(better, best), errors.where(better, least)
    return best


def _factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse."""
    mean = hessian.diagonal().mean()
    if not torch.isfinite(mean):
        raise DataError("the inputs of a layer are NaN or infinite: check the weights and dtype")
    # a layer that only ever sees zeros: every code is as good as the nearest
    mean = mean.where(mean > 0, 1)
    for damping in _DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        upper: Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            return upper
    raise DataError("X^T X of a layer's inputs has no Cholesky factor: give other or more text")
