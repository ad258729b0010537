"""Whether kernels read the codes of a quantised MLP: all of its matrices, in layouts that fit."""

from __future__ import annotations

from cats.errors import UnsupportedModelError
from cats.model.mlp import GatedOperands
from cats.weights import Packed, Quantised
from cats.weights.packed import column_layout, row_layout


def check_packable(mlp: GatedOperands, owner: str) -> None:
    """Do nothing for an MLP of dense weights.

    Args:
        mlp: Its matrices, packed or not.
        owner: Whose they are, for messages, such as ``"layer 3"``.

    Raises:
        UnsupportedModelError: If one is quantised, and no kernel reads the three of them.
    """
    matrices = gate, up, down = mlp.gate.matrix, mlp.up.matrix, mlp.down.matrix
    quantised = [matrix for matrix in matrices if isinstance(matrix, Quantised | Packed)]
    if not quantised:
        return
    if len(quantised) < len(matrices):
        raise UnsupportedModelError(
            f"gate, up and down of {owner} are {gate!r}, {up!r} and {down!r}, expected all of them "
            "quantised, or none"
        )
    if len({(matrix.arithmetic, matrix.dtype) for matrix in quantised}) > 1:
        raise UnsupportedModelError(f"gate, up and down of {owner} are computed in two dtypes")
    gate_layout = row_layout(quantised[0], f"gate of {owner}")
    if gate_layout != row_layout(quantised[1], f"up of {owner}"):
        raise UnsupportedModelError(
            f"gate and up of {owner} are stored in two ways: {gate!r} and {up!r}"
        )
    column_layout(quantised[2], f"down of {owner}")
