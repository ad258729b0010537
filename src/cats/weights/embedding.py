"""A table of embeddings in codes: the rows of a quantised linear layer, which may be the head."""

from __future__ import annotations

from torch import Tensor, nn

from cats.weights.base import Weight
from cats.weights.dense import Dense
from cats.weights.packed import Packed
from cats.weights.quantised import QuantisedLinear


class QuantisedEmbedding(nn.Module):
    """Looks rows up in the codes of a layer, packed or not, and makes numbers of these rows only.

    Attributes:
        table: ``[V, D]``. Where a model ties its head to the embedding, it is the head itself, so
            that both are in memory once.
    """

    def __init__(self, table: QuantisedLinear) -> None:
        super().__init__()
        self.table = table

    @property
    def num_embeddings(self) -> int:
        return self.table.out_features

    @property
    def embedding_dim(self) -> int:
        return self.table.in_features

    def forward(self, ids: Tensor) -> Tensor:
        stored = self.table.stored
        flat = ids.reshape(-1)
        rows = stored.take(flat) if isinstance(stored, Packed) else stored.rows(flat)
        return rows.dequantised().view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def table_of(embedding: nn.Module) -> tuple[Weight, nn.Module] | None:
    """The matrix of an embedding and the module that holds it; None for a module that is none.

    It may be on ``meta``. A subclass of ``nn.Embedding`` that only scales its result is taken too:
    the matrix is that before it.
    """
    if isinstance(embedding, QuantisedEmbedding):
        return embedding.table.stored, embedding.table
    weight = getattr(embedding, "weight", None)
    return (Dense(weight), embedding) if isinstance(weight, Tensor) else None


def are_tied(embedding: nn.Module, head: nn.Module | None) -> bool:
    """Whether an output head reads the table of the embedding."""
    if isinstance(embedding, QuantisedEmbedding):
        return head is embedding.table
    return head is not None and getattr(head, "weight", None) is embedding.weight
