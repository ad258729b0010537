"""Where the weights of a module are: in memory, on meta, offloaded, or inside another class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.weights.quantised import QuantisedLinear


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of ``accelerate`` loads some of its weights for each forward pass."""
    return any(getattr(h, "offload", False) for m in module.modules() for h in _device_hooks(m))


def is_dispatched(module: nn.Module) -> bool:
    """Whether hooks of ``accelerate`` move its inputs or weights between devices."""
    return any(_device_hooks(m) for m in module.modules())


def has_weights(module: nn.Module) -> bool:
    """Whether its weights have values: in memory, or where a hook loads them from."""
    return is_offloaded(module) or not any(t.is_meta for _, t in _weights(module))


def check_has_weights(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model whose weights are still to be loaded."""
    if not has_weights(model):
        name = next(name for name, tensor in _weights(model) if tensor.is_meta)
        raise UnsupportedModelError(
            f"{name} is on the meta device, without values: load the weights first"
        )


@contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """Within the block, weights that a hook of ``accelerate`` offloads are in memory."""
    with ExitStack() as stack:
        if is_offloaded(module):
            from accelerate.utils import align_module_device

            for submodule in module.modules():
                stack.enter_context(align_module_device(submodule))
        yield


def input_device(module: nn.Module) -> torch.device:
    """The device that runs a module, also where its weights are offloaded."""
    for submodule in module.modules():
        for hook in _device_hooks(submodule):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
        # codes of quantised weights are buffers in some libraries
        for tensor in chain(submodule.parameters(recurse=False), submodule.buffers(recurse=False)):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what the layers of quantised weights hold, with their names."""
    yield from module.named_parameters()
    for name, layer in module.named_modules():
        if isinstance(layer, QuantisedLinear):
            yield from layer.named_buffers(name)


def _device_hooks(module: nn.Module) -> Sequence[Any]:
    """The hooks of ``accelerate`` on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else getattr(hook, "hooks", [hook])
