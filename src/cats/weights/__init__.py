"""How the numbers of a matrix are stored: one file per storage, and where weights are."""

from torch import nn

from cats.weights.base import Weight, nbytes, plain_tensors
from cats.weights.dense import Dense
from cats.weights.embedding import QuantisedEmbedding, are_tied, table_of
from cats.weights.foreign import Foreign
from cats.weights.masked import (
    INPUT_THRESHOLD,
    InputMask,
    input_threshold,
    mask_inputs_,
    unmask_inputs_,
    unmasked,
    unmasked_class,
)
from cats.weights.packed import Packed
from cats.weights.quantised import Quantised, QuantisedLinear, is_quantised

__all__ = [
    "INPUT_THRESHOLD",
    "STORAGES",
    "Dense",
    "Foreign",
    "InputMask",
    "Packed",
    "Quantised",
    "QuantisedEmbedding",
    "QuantisedLinear",
    "Weight",
    "are_tied",
    "input_threshold",
    "is_quantised",
    "mask_inputs_",
    "nbytes",
    "plain_tensors",
    "table_of",
    "unmask_inputs_",
    "unmasked_class",
    "weight_of",
]

# Asked in this order; what none of them knows is foreign.
STORAGES: list[type[Weight]] = [Dense, Packed, Quantised]


def weight_of(layer: nn.Module) -> Weight | None:
    """The matrix of a linear layer of any library; None for a module that is none."""
    layer = unmasked(layer)
    for storage in STORAGES:
        if (weight := storage.of(layer)) is not None:
            return weight
    return Foreign.of(layer)
