"""The quantised matrices of a model, packed in place as the kernels stream them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from weakref import ref

from cats.decode.stream.spec import LayerSpec, ModelSpec
from cats.model import GatedOperands, Linear
from cats.model.packable import check_packable
from cats.ops.quantised import PackedColumns, PackedRows, RowLayout
from cats.weights import Dense, Packed, Quantised, QuantisedLinear
from cats.weights.packed import row_layout

_PROJECTIONS = ("q", "k", "v", "o")


def pack_(spec: ModelSpec, packed: list[ref[QuantisedLinear]]) -> ModelSpec:
    """Pack the quantised layers of a model in place, one decoder layer after the other.

    Nothing else holds their codes afterwards: neither the layers nor ``spec``.

    Args:
        spec: The model; its layers are replaced.
        packed: Gets the modules that were not packed before.

    Returns:
        The same model over packed matrices.

    Raises:
        UnsupportedModelError: If no kernel reads a matrix; the message names it.
    """
    for index, layer in enumerate(spec.layers):
        _check(layer, index)
    _check_rows(spec.head, "the head")
    _check_rows(spec.embedding, "the embedding")
    for index, layer in enumerate(spec.layers):
        spec.layers[index] = _packed_layer(layer, packed)
    head = _packed(spec.head, QuantisedLinear.pack_rows_, packed)
    embedding = spec.embedding
    if not isinstance(embedding.matrix, Dense):
        # where it is the head, these are the same codes
        embedding = _packed(embedding, QuantisedLinear.pack_rows_, packed)
    return replace(spec, embedding=embedding, head=head)


def unpack_(packed: list[ref[QuantisedLinear]], needed: Container[int]) -> None:
    """Unpack the layers of :func:`pack_`, in place.

    Args:
        packed: The modules.
        needed: Ids of modules that stay packed.
    """
    for module in packed:
        layer = module()
        if layer is not None and id(layer) not in needed:
            layer.unpack_()


def packed_matrices(mlp: GatedOperands) -> tuple[PackedRows, PackedRows, PackedColumns] | None:
    """Gate, up and down of an MLP that is packed; None where it is dense."""
    gate, up, down = (
        part.matrix.matrix if isinstance(part.matrix, Packed) else None
        for part in (mlp.gate, mlp.up, mlp.down)
    )
    if isinstance(gate, PackedRows) and isinstance(up, PackedRows):
        assert isinstance(down, PackedColumns)
        return gate, up, down
    return None


def packed_rows(linear: Linear) -> PackedRows | None:
    """The packed rows of a linear layer; None where it is dense."""
    matrix = linear.matrix.matrix if isinstance(linear.matrix, Packed) else None
    return matrix if isinstance(matrix, PackedRows) else None


def runs_of_layout(linears: tuple[Linear, ...]) -> Iterator[tuple[Linear, ...]]:
    """Neighbouring layers that one launch can take: dense ones, or packed ones of one layout."""
    run: tuple[Linear, ...] = ()
    for linear in linears:
        if run and _layout_of(run[0]) != _layout_of(linear):
            yield run
            run = ()
        run = (*run, linear)
    yield run


def _layout_of(linear: Linear) -> RowLayout | None:
    rows = packed_rows(linear)
    return None if rows is None else rows.layout


def _check(layer: LayerSpec, index: int) -> None:
    for name in _PROJECTIONS:
        _check_rows(getattr(layer, name), f"{name} of layer {index}")
    check_packable(layer.mlp, f"layer {index}")


def _check_rows(linear: Linear, name: str) -> None:
    if isinstance(linear.matrix, Quantised):
        row_layout(linear.matrix, name)


def _packed_layer(layer: LayerSpec, packed: list[ref[QuantisedLinear]]) -> LayerSpec:
    def rows(linear: Linear) -> Linear:
        return _packed(linear, QuantisedLinear.pack_rows_, packed)

    mlp = layer.mlp
    down = _packed(mlp.down, QuantisedLinear.pack_columns_, packed)
    return replace(
        layer,
        q=rows(layer.q),
        k=rows(layer.k),
        v=rows(layer.v),
        o=rows(layer.o),
        mlp=replace(mlp, gate=rows(mlp.gate), up=rows(mlp.up), down=down),
    )


def _packed(
    linear: Linear,
    pack_: Callable[[QuantisedLinear], QuantisedLinear],
    packed: list[ref[QuantisedLinear]],
) -> Linear:
    layer = linear.layer
    if not isinstance(layer, QuantisedLinear):
        return linear
    if layer.layout is None:
        packed.append(ref(layer))
    pack_(layer)
    return linear.again()
