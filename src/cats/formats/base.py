"""The interface of every format of quantised checkpoints, and the tensors of one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cats.errors import FormatError
from cats.weights import Quantised
from cats.weights.quantised import packed, unpacked

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The tensors of a quantised linear layer as the checkpoint has them.

    Attributes:
        name: Of the module, for messages.
        rows: Outputs of the module.
        columns: Its inputs.
        dtype: Of the model.
        tensors: By their names in the layer; on ``meta`` where only shapes are checked.
    """

    name: str
    rows: int
    columns: int
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]

    def take(
        self, part: str, shape: tuple[int | None, ...], dtypes: Iterable[torch.dtype]
    ) -> Tensor:
        """A tensor of this shape, where None is any size, and of one of these dtypes.

        Raises:
            FormatError: If it is missing, or has another shape or dtype.
        """
        if part not in self.tensors:
            raise self.error(f"has no {part}: the checkpoint is incomplete")
        tensor = self.tensors[part]
        fits = len(shape) == tensor.ndim and all(
            wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype not in tuple(dtypes):
            kinds = " or ".join(map(_name, dtypes))
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(
                f"has {part} {_name(tensor.dtype)} {list(tensor.shape)}, expected {kinds} [{sizes}]"
            )
        return tensor

    def error(self, message: str) -> FormatError:
        return FormatError(f"{self.name} {message}")


class Format(ABC):
    """A way to store quantised layers in a checkpoint, as a ``quantization_config`` describes it.

    Attributes:
        name: Its name in messages.
        parts: Names that tensors of a quantised layer may have, its bias left out.
        kept: Those of the parts that are written back as they were read.
    """

    name: ClassVar[str]
    parts: frozenset[str]
    kept: frozenset[str] = frozenset()

    @abstractmethod
    def markers(self) -> frozenset[str]:
        """Names of tensors that only a quantised layer has."""

    def read_metadata(self, metadata: Mapping[str, str]) -> None:  # noqa: B027  # most have none
        """Read the metadata in the header of a safetensors file."""

    @abstractmethod
    def read(self, layer: Layer) -> Quantised:
        """The numbers of a layer, bit for bit those of the format's own library.

        Of tensors on ``meta`` only names, shapes and dtypes are checked.

        Raises:
            FormatError: If tensors are missing or do not fit.
        """

    @abstractmethod
    def write(self, name: str, weight: Quantised, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that :meth:`read` made the weight from.

        Args:
            name: Of the layer.
            weight: What was read.
            like: Those tensors: :attr:`kept` ones with their values, the others on ``meta``.

        Raises:
            UnsupportedModelError: If the format cannot be written here.
        """

    def metadata(self, names: Iterable[str]) -> dict[str, str]:
        """The metadata for the header of a safetensors file with tensors of these names."""
        return {}


def bytes_of(words: Tensor) -> Tensor:
    """The bytes of int32 words, lowest first: ``[..., n]`` to ``[..., 4 * n]``, uint8."""
    # flat: the strides of a dimension of size 1 may be anything
    return words.reshape(-1).view(torch.uint8).reshape(*words.shape[:-1], 4 * words.shape[-1])


def words_of(data: Tensor) -> Tensor:
    """int32 words of bytes, lowest first; the last one is filled with zeros."""
    if missing := -data.shape[-1] % 4:
        data = torch.nn.functional.pad(data, (0, missing))
    return data.reshape(-1).view(torch.int32).reshape(*data.shape[:-1], data.shape[-1] // 4)


def one_by_one(words: Tensor, bits: int) -> Tensor:
    """Codes in int32 words, lowest first: ``[n, w]`` to uint8 ``[n, w * 32 // bits]``."""
    data = bytes_of(words)
    return unpacked(data, bits, data.shape[-1] * 8 // bits)


def in_words(codes: Tensor, bits: int) -> Tensor:
    """Codes to int32 words: the inverse of :func:`one_by_one`."""
    return words_of(codes if bits == 8 else packed(codes))


def constant(zeros: Tensor) -> tuple[Tensor | None, int]:
    """Zero points as ``zeros`` and ``zero`` of a weight: one number where all are the same."""
    if zeros.is_meta or not zeros.numel() or not bool((zeros == zeros.flatten()[0]).all()):
        return zeros.contiguous(), 0
    return None, int(zeros.flatten()[0])


def zeros_of(weight: Quantised) -> Tensor:
    """The zero points of a weight, ``[rows, G]``, also where all are the same."""
    if weight.zeros is not None:
        return weight.zeros
    return torch.full_like(weight.scales, weight.zero, dtype=torch.uint8)


def sort_columns(
    layer: Layer, codes: Tensor, bits: int, group_size: int, groups: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Columns in the order of their groups.

    Args:
        layer: For messages.
        codes: As in :class:`Quantised`, in the order of the matrix.
        bits: Of a code.
        group_size: Columns of each group but the last.
        groups: ``[columns]``, the group of each column.

    Returns:
        The codes sorted, and ``column_order``; None where they already are in this order.

    Raises:
        FormatError: If a group does not exist, or has another size.
    """
    if groups.is_meta:
        return codes, None
    groups = groups.long()
    here = torch.arange(layer.columns, device=groups.device) // group_size
    if torch.equal(groups, here):
        return codes, None
    if int(groups.min()) < 0 or int(groups.max()) > int(here[-1]):
        raise layer.error(
            f"has columns in groups {int(groups.min())} to {int(groups.max())}, expected 0 to "
            f"{int(here[-1])}: its g_idx is damaged"
        )
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], here):
        sizes = groups.bincount().tolist()
        raise layer.error(
            f"has groups of {min(sizes)} to {max(sizes)} columns, which cannot be laid out in "
            f"groups of {group_size}"
        )
    codes = unpacked(codes, bits, layer.columns)[:, order]
    return (packed(codes) if bits == 4 else codes.contiguous()), order


def codes_in_place(weight: Quantised) -> Tensor:
    """The codes in the order of the matrix, as :class:`Quantised` packs them."""
    if weight.column_order is None:
        return weight.codes
    codes = unpacked(weight.codes, weight.bits, weight.columns)
    codes = torch.empty_like(codes).index_copy_(1, weight.column_order, codes)
    return codes if weight.bits == 8 else packed(codes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
