"""Marks of a model: what decoding depends on, so that a change between two calls is seen.

There are two kinds. *Structure* is what a trace, a compiled step or a captured graph was made for:
modules, their code, hooks and settings, and where each tensor lies. *Content* is what was written
into those tensors. After a change of structure everything is made anew. After a change of content
only what was computed with the old numbers is forgotten: the keys and values of a conversation.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from transformers import PreTrainedConfig

from cats.mlp import CatsActivation

# What every module has, but for its mode.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
# Index of a module, name of one of its attributes.
Place = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Marks:
    """Marks of a model at one moment.

    Attributes:
        structure: Per module what its steps depend on.
        content: Per module the versions of its tensors; they grow when a tensor is written.
        names: Names of the modules, for messages.
    """

    structure: list[dict[str, Hashable]]
    content: list[dict[str, Hashable]]
    names: list[str]

    @classmethod
    def of(cls, model: nn.Module) -> Marks:
        """The marks of a model as it is now."""
        configs: dict[int, Hashable] = {}
        structure, content, names = [], [], []
        for name, module in model.named_modules():
            structure.append(_structure(module, configs))
            content.append(_content(module))
            names.append(name)
        structure.append({"": _of_all_models()})
        return cls(structure, content, names)

    def changed(self, later: Marks) -> dict[Place, str]:
        """Places that differ between two marks, with their names; modules must be the same."""
        found: dict[Place, str] = {}
        for kind in ("structure", "content"):
            for index, (a, b) in enumerate(
                zip(getattr(self, kind), getattr(later, kind), strict=True)
            ):
                if a != b:
                    owner = self.names[index] if index < len(self.names) else ""
                    for key in {**a, **b}:
                        if a.get(key) != b.get(key) and not isinstance(b.get(key), _Uncounted):
                            found[index, key] = f"{owner}.{key}".strip(".")
        return found

    def without(self, places: dict[Place, str]) -> Marks:
        """The marks but for some places."""
        if not places:
            return self

        def kept(entries: list[dict[str, Hashable]]) -> list[dict[str, Hashable]]:
            return [
                {key: value for key, value in entry.items() if (index, key) not in places}
                for index, entry in enumerate(entries)
            ]

        return Marks(kept(self.structure), kept(self.content), self.names)


def runs_own_code(model: nn.Module) -> bool:
    """Whether hooks or replaced ``forward`` methods of single modules must run at each step.

    Other libraries add both (adapters, offloading, steering). A trace would run them once.
    """
    return any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()
    ) or bool(_torch_module._global_forward_hooks or _torch_module._global_forward_pre_hooks)


class _Uncounted:
    """Stands for the content of a tensor of inference mode, whose writes torch does not count.

    It equals nothing, so that such a tensor counts as written between any two calls.
    """


def _structure(module: nn.Module, configs: dict[int, Hashable]) -> dict[str, Hashable]:
    found: dict[str, Hashable] = {"": (ref(module), _identity(type(module).forward))}
    # hooks have numbers that no later hook gets
    if module._forward_hooks or module._forward_pre_hooks:
        found["hooks"] = (*module._forward_hooks, *module._forward_pre_hooks)
    for name, tensor in _tensors(module):
        found[name] = _address(tensor)
    if isinstance(module, CatsActivation):
        # kernels may hold a copy of it
        found["threshold written"] = _version(module.threshold)
    # called for every module before each generation: nothing is built for what does not count
    for name, value in vars(module).items():
        if value is None or type(value) in (bool, int, float, str):
            found[name] = value
        elif name not in _OF_EVERY_MODULE:
            found[name] = _setting(value, configs)
    return found


def _content(module: nn.Module) -> dict[str, Hashable]:
    return {name: _version(tensor) for name, tensor in _tensors(module)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _setting(value: object, configs: dict[int, Hashable]) -> Hashable:
    if isinstance(value, Tensor):
        return _address(value), _version(value)
    if isinstance(value, PreTrainedConfig):
        if id(value) not in configs:
            configs[id(value)] = repr([(k, v) for k, v in vars(value).items() if _is_plain(v)])
        return configs[id(value)]
    if _is_plain(value):
        return repr(value)
    return _identity(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _identity(value: Any) -> Hashable:
    """Stands for an object without keeping it, or its model, alive."""
    # a weak reference does not match a later object at the same address
    return ref(value) if isinstance(value, FunctionType) else (type(value).__name__, id(value))


def _address(tensor: Tensor) -> Hashable:
    try:
        place = tensor.data_ptr()
    except RuntimeError:  # a subclass that holds several tensors
        place = 0
    return id(tensor), place, tensor.dtype, tensor.device, tensor.shape


def _version(tensor: Tensor) -> Hashable:
    return _Uncounted() if tensor.is_inference() else tensor._version


def _of_all_models() -> Hashable:
    return (*_torch_module._global_forward_hooks, *_torch_module._global_forward_pre_hooks)
