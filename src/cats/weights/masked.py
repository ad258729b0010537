"""A linear layer that drops small inputs: the matrix and its name stay, a threshold lies beside it.

The class of the layer changes, as in ``torch.nn.utils.parametrize``, not the layer itself. So its
parameters, hooks and whatever refers to it stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from cats.errors import ModelMismatchError
from cats.functional import cats_activation

INPUT_THRESHOLD = "input_threshold"
"""Name of the buffer, and the end of its name in files."""

L = TypeVar("L", bound=nn.Module)


class InputMask(nn.Module):
    """What masked layers have in common; the second base class is that of the layer before.

    An input ``x[d]`` is dropped where ``abs(x[d]) < input_threshold[d]``, so that column ``d`` of
    the matrix need not be read.

    Attributes:
        input_threshold: ``[columns]``, float32, whatever the dtype of the model.
    """

    input_threshold: Tensor

    def __call__(self, x: Tensor, *args: Any, **named: Any) -> Any:
        # not in forward, which offloading and adapters replace
        dropped = cats_activation(x, self.input_threshold.to(x.device))
        return super().__call__(dropped, *args, **named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.input_threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self._buffers[INPUT_THRESHOLD]
        assert moved is not None
        # only the device changes: a rounded threshold would drop other inputs
        self._buffers[INPUT_THRESHOLD] = moved.float() if exact.is_meta else exact.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # a layer of packed codes saves a plain twin, which has no mask
        destination[prefix + INPUT_THRESHOLD] = self.input_threshold

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + INPUT_THRESHOLD
        own = self._buffers.pop(INPUT_THRESHOLD)
        try:
            others = {name: tensor for name, tensor in state_dict.items() if name != key}
            lists = missing_keys, unexpected_keys, error_msgs
            super()._load_from_state_dict(others, prefix, local_metadata, strict, *lists)
        finally:
            self._buffers[INPUT_THRESHOLD] = own
        loaded = state_dict.get(key)
        assert own is not None
        if loaded is None:
            missing_keys.append(key)
        elif loaded.shape != own.shape:
            error_msgs.append(f"{key}: expected {list(own.shape)}, got {list(loaded.shape)}")
        else:
            with torch.no_grad():
                own.copy_(loaded)


class MaskedLinear(InputMask, nn.Linear):
    """An ``nn.Linear`` that drops small inputs."""


def mask_inputs_(layer: L, threshold: Tensor, *, name: str = "the layer") -> L:
    """Let a linear layer drop small inputs, in place; a layer that does already gets the new rule.

    Args:
        layer: A linear layer of any class.
        threshold: ``[columns]``, float32.
        name: What messages call the layer.

    Raises:
        ModelMismatchError: If there is not one threshold for each column.
    """
    from cats.weights import weight_of

    weight = weight_of(layer)
    if weight is None or threshold.shape != weight.shape[1:]:
        size = "no linear layer" if weight is None else f"{weight.shape[1]} inputs"
        raise ModelMismatchError(
            f"{name}.{INPUT_THRESHOLD} has the shape {list(threshold.shape)}, and {name} is "
            f"{size}: calibrate this model with cats calibrate, or load the model of the thresholds"
        )
    device = weight.device
    if device.type == "meta":  # offloaded: a forward pass brings its inputs
        device = threshold.device
    if not isinstance(layer, InputMask):
        _change_class_(layer, masked_class(type(layer)))
    layer.register_buffer(INPUT_THRESHOLD, threshold.detach().to(device, torch.float32, copy=True))
    return layer


def unmask_inputs_(layer: nn.Module) -> None:
    """Undo :func:`mask_inputs_`; any other layer stays as it is."""
    if isinstance(layer, InputMask):
        del layer._buffers[INPUT_THRESHOLD]
        _change_class_(layer, unmasked_class(layer))


def input_threshold(layer: nn.Module) -> Tensor | None:
    """The thresholds of a layer's inputs, ``[columns]``; None where it takes all."""
    return layer._buffers[INPUT_THRESHOLD] if isinstance(layer, InputMask) else None


def unmasked(layer: nn.Module) -> nn.Module:
    """A layer as it is without its mask: the same tensors, in an object of the class before."""
    if not isinstance(layer, InputMask):
        return layer
    plain = object.__new__(unmasked_class(layer))
    object.__setattr__(plain, "__dict__", layer.__dict__)
    return plain


def unmasked_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a linear layer, without its mask."""
    kind = type(layer)
    return kind.__bases__[1] if issubclass(kind, InputMask) else kind


def _change_class_(layer: nn.Module, kind: type[nn.Module]) -> None:
    layer.__class__ = kind


def masked_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of masked layers of a kind."""
    if kind not in _MASKED:
        _MASKED[kind] = type(f"Masked{kind.__name__}", (InputMask, kind), {})
    return _MASKED[kind]


_MASKED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MaskedLinear}
