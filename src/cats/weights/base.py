"""One matrix of a model, however its numbers are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError

# "rows": a row is contiguous; "columns": a column is, one neuron of ``down`` after another.
Order = Literal["rows", "columns"]


class Weight(ABC):
    """A matrix ``[rows, columns]``: that of a linear layer, or some rows of a stacked one.

    A storage of weights is one subclass in a file of its own, named in
    :data:`cats.weights.STORAGES`. What calibrates, applies thresholds, evaluates or counts bytes
    uses only what is here; a kernel asks for the subclass that it knows.

    Attributes:
        storage: What messages call this way to store a matrix.
    """

    storage: ClassVar[str]

    @classmethod
    @abstractmethod
    def of(cls, layer: nn.Module) -> Self | None:
        """The matrix of a linear layer; None where it is stored in another way.

        Weights may be on ``meta``, or offloaded: only :meth:`dequantised` needs their values.
        """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs: the shape of the matrix, not that of what is stored."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the numbers that the matrix stands for."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored: values, or codes, scales, zero points. Of a whole layer, its own ones."""

    @property
    @abstractmethod
    def order(self) -> Order | None:
        """What is contiguous in memory; None for neither."""

    @abstractmethod
    def dequantised(self) -> Tensor:
        """The numbers, ``[rows, columns]`` in :attr:`dtype`: a view where possible.

        Raises:
            UnsupportedModelError: If they cannot be read.
        """

    @abstractmethod
    def part(self, start: int, stop: int) -> Self:
        """The rows from ``start`` to ``stop``, in the same memory."""

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def bytes(self) -> int:
        """What a token reads of the whole matrix."""
        return sum(map(nbytes, self.tensors))

    @property
    def row_bytes(self) -> float:
        """What a token reads of one row, its share of scales included."""
        return self.bytes / self.shape[0]

    @property
    def column_bytes(self) -> float:
        """What a token reads of one column, its share of scales included."""
        return self.bytes / self.shape[1]

    def entries(self, name: str) -> Tensor:
        """Eight numbers, evenly spread, float32 on the CPU: what a fingerprint is made of.

        Args:
            name: Of the layer, for messages.

        Raises:
            UnsupportedModelError: If the numbers cannot be read.
        """
        return entries(f"{name}.weight", self.dequantised())

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"<{self.storage} weight [{rows}, {columns}] {self.dtype}>"


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or the ones that a quantised or sharded tensor of another class consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def nbytes(tensor: Tensor) -> int:
    """Bytes of memory that the content of a tensor takes; on ``meta``, that it would take."""
    return sum(plain.numel() * plain.element_size() for plain in plain_tensors(tensor))


def entries(name: str, tensor: Tensor) -> Tensor:
    """Eight entries of a tensor, evenly spread, float32 on the CPU."""
    if tensor.is_meta or tensor.numel() == 0:
        raise UnsupportedModelError(
            f"{name} has no values here (it is {'on meta' if tensor.is_meta else 'empty'}): "
            "load the weights first"
        )
    try:
        # quantised weights of other libraries
        if type(tensor).dequantize is not Tensor.dequantize:
            tensor = tensor.dequantize()
        flat = tensor.detach().flatten()
        # in integers: a float32 index beyond 2**24 is rounded
        return flat[torch.arange(8, device=flat.device) * (flat.numel() - 1) // 7].float().cpu()
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"the values of {name} cannot be read: it is a {type(tensor).__name__} without "
            "dequantize(); load the model with ordinary weights"
        ) from error
