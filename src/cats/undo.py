"""Undo a change of a model if it fails before its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

# What the library changes in a model's configuration.
_SETTINGS = ("cats", "tie_word_embeddings")


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """If the block fails, restore the model: modules, attributes, tensors, and the configuration.

    Of the configuration, these are ``cats`` and ``tie_word_embeddings``. The layouts of weights are
    restored too. Values written *into* a tensor or a list are not.
    """
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table))
        for module in model.modules()
        for table in (vars(module), module._modules, module._parameters, module._buffers)
        if isinstance(table, dict)  # scripted modules have tables of other types
    ]
    kinds = [(module, type(module)) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    strides = [(p, p.stride()) for p in model.parameters() if type(p) is nn.Parameter]
    settings = getattr(getattr(model, "config", None), "__dict__", {})
    before = {name: settings[name] for name in _SETTINGS if name in settings}
    try:
        yield
    except BaseException:
        for module, kind in kinds:
            if type(module) is not kind:
                module.__class__ = kind
        for table, content in tables:
            table.clear()
            table.update(content)
        for name in _SETTINGS:
            settings.pop(name, None)
        settings.update(before)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter, stride in strides:
            # without enough memory the layout stays, and the values are the same in any layout
            with suppress(RuntimeError, MemoryError):
                lay_out_(parameter, stride)
        raise


def lay_out_(weight: Tensor, stride: tuple[int, ...]) -> None:
    """Move a weight to memory with these strides; the parameter stays the same object."""
    if weight.stride() == stride:
        return
    # a tensor that is made in inference mode could not be trained later
    with torch.inference_mode(False), torch.no_grad():
        data = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device)
        # torch copies fast only into row-major memory
        rows_first = stride[0] < stride[-1]
        (data.t() if rows_first else data).copy_(weight.data.t() if rows_first else weight.data)
        weight.data = data
