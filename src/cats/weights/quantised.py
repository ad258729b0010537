"""A linear layer over quantised numbers: codes as checkpoints store them, or packed for kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cats.errors import ShapeError
from cats.ops.packed_linear import PackedLinearArguments, call
from cats.ops.quantised import ColumnLayout, PackedColumns, PackedRows, RowLayout
from cats.ops.quantised.numbers import packed, unpacked
from cats.weights.codes import FLOAT8, Quantised, described
from cats.weights.masked import INPUT_THRESHOLD
from cats.weights.packed import Packed

__all__ = ["FLOAT8", "PLAIN", "Quantised", "QuantisedLinear", "is_quantised", "packed", "unpacked"]

PLAIN = ("codes", "scales", "zeros", "shifts", "column_order")
"""Names of the tensors of a layer that is not packed, and of every saved one."""
# An integer of the same size: module.to(dtype) converts floating-point tensors only.
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class QuantisedLinear(nn.Module):
    """A linear layer over :class:`Quantised` numbers, which no optimiser changes.

    The matrix exists during a call only. A backward pass computes it again, so that training
    adapters on many such layers does not keep them all.

    Its tensors are those of :data:`PLAIN`, or packed ones in the order of kernels, never both. A
    packed layer saves and loads the plain ones; it has no attributes of their names.

    Once packed, ``state_dict()`` gives copies under the names of the plain tensors. Writes into
    them are not seen; ``load_state_dict`` is the way to write.

    Attributes:
        in_features: Columns of the matrix.
        out_features: Its rows.
        dtype: Of the numbers. ``module.to(dtype)`` changes it, and leaves codes and scales alone.
        bias: ``[out_features]``, or None.
        layout: How the codes are packed; None where they are not.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shifts: Tensor | None
    column_order: Tensor | None
    # of the class, for pickles of earlier releases
    layout: RowLayout | ColumnLayout | None = None

    def __init__(
        self, weight: Quantised, bias: Tensor | None = None, *, name: str = "the layer"
    ) -> None:
        """
        Args:
            weight: The numbers; the module takes its tensors, without a copy.
            bias: ``[rows]``, floating-point.
            name: What messages call the layer.

        Raises:
            ShapeError: As for :meth:`Quantised.check`, or for a bias of another shape.
        """
        super().__init__()
        weight.check(name)
        if bias is not None and (
            bias.shape != weight.shape[:1] or not bias.dtype.is_floating_point
        ):
            raise ShapeError(
                f"{name}: its bias is {described(bias)}, expected a floating-point "
                f"[{weight.shape[0]}]"
            )
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size, self.zero = weight.bits, weight.group_size, weight.zero
        self.arithmetic, self.dtype = weight.arithmetic, weight.dtype
        for buffer in PLAIN:
            self.register_buffer(buffer, getattr(weight, buffer))
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @property
    def matrix(self) -> Quantised:
        """The numbers: over the layer's own tensors, or a copy of those of a packed layer."""
        stored = self.stored
        return stored.unpacked() if isinstance(stored, Packed) else stored

    @property
    def stored(self) -> Quantised | Packed:
        """The numbers, over the layer's own tensors."""
        layout, buffers = self.layout, self._buffers
        options: dict[str, Any] = {
            "group_size": self.group_size,
            "arithmetic": self.arithmetic,
            "dtype": self.dtype,
        }
        if layout is None:
            tensors: dict[str, Any] = {name: buffers[name] for name in PLAIN}
            columns = self.in_features
            return Quantised(bits=self.bits, columns=columns, zero=self.zero, **tensors, **options)
        codes = buffers["packed"]
        assert codes is not None
        if isinstance(layout, RowLayout):
            return Packed(matrix=PackedRows(codes, layout, len(codes)), **options)
        scales, extras = buffers["packed_scales"], buffers["packed_extras"]
        assert scales is not None
        return Packed(matrix=PackedColumns(codes, scales, extras, layout), **options)

    def pack_rows_(self, name: str = "the layer") -> Self:
        """Store the codes as kernels read rows, instead of the plain tensors.

        Args:
            name: Of the layer, for messages.

        Raises:
            UnsupportedModelError: If no kernel reads such rows; the layer stays as it is.
        """
        if not isinstance(self.layout, RowLayout):
            with torch.inference_mode(False), torch.no_grad():
                self._store(Packed.rows_of(self.matrix, name))
        return self

    def pack_columns_(self, name: str = "the layer") -> Self:
        """Store the codes as kernels read the columns of down; see :meth:`pack_rows_`."""
        if not isinstance(self.layout, ColumnLayout):
            with torch.inference_mode(False), torch.no_grad():
                self._store(Packed.columns_of(self.matrix, name))
        return self

    def unpack_(self) -> Self:
        """Store plain tensors again: the same numbers and names as before it was packed."""
        if self.layout is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._store(self.matrix)
        return self

    def _store(self, weight: Quantised | Packed) -> None:
        """Replace the tensors; those of the bias stay."""
        tensors = {name: getattr(weight, name, None) for name in PLAIN}
        if isinstance(weight, Packed):
            matrix = weight.matrix
            if isinstance(matrix, PackedRows):
                tensors = {"packed": matrix.rows}
            else:
                scales, extras = matrix.scales, matrix.extras
                tensors = dict(packed=matrix.columns, packed_scales=scales, packed_extras=extras)
        mask = self._buffers.get(INPUT_THRESHOLD)
        self._buffers.clear()
        if mask is not None:
            self._buffers[INPUT_THRESHOLD] = mask
        self.layout = weight.layout if isinstance(weight, Packed) else None
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def qweight(self) -> Tensor:
        """What PEFT takes the device of adapters from."""
        return self.stored.tensors[0]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What PEFT takes the dtype of adapters from."""
        return self.dtype

    def forward(self, x: Tensor) -> Tensor:
        layout = self.layout
        if isinstance(layout, RowLayout) and self._suits_operator(x):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            codes = self._buffers["packed"]
            assert codes is not None
            arguments = PackedLinearArguments(rows, codes, self.bias, layout, self.arithmetic)
            return call(arguments).view(*x.shape[:-1], self.out_features)
        if torch.is_grad_enabled() and x.requires_grad:
            product: Any = _Product
            result: Tensor = product.apply(x, self.bias, self.stored)
            return result
        return nn.functional.linear(x, self.stored.dequantised(), self.bias)

    def _suits_operator(self, x: Tensor) -> bool:
        """Whether x has the dtype of the numbers: torch converts, or refuses, what has another."""
        return x.dtype == self.dtype and not torch.is_autocast_enabled(x.device.type)

    def __getattr__(self, name: str) -> Any:
        if name in PLAIN and self.layout is not None:
            raise AttributeError(self._why_absent(name))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        # it would become a tensor that nothing reads
        if name in PLAIN and self.layout is not None:
            raise AttributeError(self._why_absent(name))
        super().__setattr__(name, value)

    def _why_absent(self, name: str) -> str:
        return (
            f"this layer has no {name} of its own: its codes are packed for kernels; read them in "
            "layer.matrix, which is a copy, or call layer.unpack_() before you change them"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        plain = self if self.layout is None else self._plain_twin()
        super(QuantisedLinear, plain)._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        layout = self.layout
        if layout is None:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        twin = self._plain_twin()
        nn.Module._load_from_state_dict(twin, state_dict, prefix, *args)
        is_rows = isinstance(layout, RowLayout)
        loaded = Packed.rows_of(twin.matrix) if is_rows else Packed.columns_of(twin.matrix)
        # assign=True gives the tensors other dtypes
        if loaded.device != self.stored.device or loaded.layout != layout:
            self._store(loaded)
            return
        # into the same memory, which captured graphs read
        with torch.no_grad():
            for own, new in zip(self.stored.tensors, loaded.tensors, strict=True):
                own.copy_(new)

    def _plain_twin(self) -> QuantisedLinear:
        """A layer over plain copies of the tensors, and over the same bias."""
        twin = QuantisedLinear(self.matrix)
        twin._parameters = self._parameters
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = {
            name: tensor
            for name, tensor in self._buffers.items()
            if tensor is not None and tensor.is_floating_point()
        }
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        try:
            for name, tensor in stored.items():
                self._buffers[name] = tensor.view(_SAME_SIZE[tensor.itemsize])
            apply: Any = super()._apply
            return cast(Self, apply(fn, recurse))
        finally:
            for name, tensor in stored.items():
                moved = self._buffers[name]
                assert moved is not None
                self._buffers[name] = moved.view(tensor.dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.stored!r}, bias={bias}, dtype={self.dtype}"


def is_quantised(model: nn.Module) -> bool:
    """Whether a layer of the model holds codes."""
    return any(isinstance(module, QuantisedLinear) for module in model.modules())


class _Product(Function):
    """``x @ matrix.T + bias``, whose backward pass computes the matrix again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: Quantised | Packed) -> Tensor:
        ctx.matrix, ctx.dtype, ctx.bias_dtype = (
            matrix,
            x.dtype,
            None if bias is None else bias.dtype,
        )
        return nn.functional.linear(x, matrix.dequantised(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            # under autocast the product has another dtype than the numbers
            grad_x = (grad @ ctx.matrix.dequantised().to(grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None
