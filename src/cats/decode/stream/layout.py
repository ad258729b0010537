"""The weights of a model in the order in which kernels read them, in place, and back."""

from __future__ import annotations

from weakref import ref

from torch import nn

from cats.decode.stream.packed import pack_, unpack_
from cats.decode.stream.spec import ModelSpec
from cats.fusion import fused_mlps
from cats.weights import Dense, QuantisedLinear


def lay_out_(
    spec: ModelSpec, laid_out: list[ref[nn.Parameter]], packed: list[ref[QuantisedLinear]]
) -> ModelSpec:
    """Store ``down`` column by column, and pack quantised layers.

    Args:
        spec: The model; its layers are replaced.
        laid_out: Gets the weights that had another layout.
        packed: Gets the layers that were not packed before.

    Returns:
        The same model over packed matrices.

    Raises:
        UnsupportedModelError: If no kernel reads a matrix; the message names it.
    """
    lay_out_down(spec, laid_out)
    return pack_(spec, packed)


def lay_out_again_(
    model: nn.Module | None,
    laid_out: list[ref[nn.Parameter]],
    packed: list[ref[QuantisedLinear]],
) -> None:
    """Undo :func:`lay_out_`, and empty its lists. What fused MLPs need stays as it is."""
    fused = [mlp for _, mlp in (() if model is None else fused_mlps(model))]
    needed = {id(owned) for mlp in fused for owned in (*mlp.parameters(), *mlp.modules())}
    for weight in laid_out:
        down = weight()
        if down is not None and id(down) not in needed and down.t().is_contiguous():
            down.data = down.data.contiguous()
    unpack_(packed, needed)
    laid_out.clear()
    packed.clear()


def lay_out_down(spec: ModelSpec, laid_out: list[ref[nn.Parameter]]) -> None:
    """Store ``down`` of each layer column by column, in place.

    Args:
        spec: The model.
        laid_out: Gets the weights that had another layout.
    """
    for layer in spec.layers:
        if not isinstance(layer.mlp.down.matrix, Dense):
            continue
        down = layer.mlp.down.weight
        if not down.t().is_contiguous():
            down.data = down.data.t().contiguous().t()
            if isinstance(down, nn.Parameter):
                laid_out.append(ref(down))
