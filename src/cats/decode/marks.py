"""Marks of a model: what decoding depends on, so that a change between two calls is seen.

There are two kinds. *Structure* is what a trace, a compiled step or a captured graph was made for:
modules, their code, hooks and settings, and where each tensor lies. *Content* is what was written
into those tensors. After a change of structure everything is made anew. After a change of content
only what was computed with the old numbers is forgotten: the keys and values of a conversation.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from transformers import PreTrainedConfig

from cats.model import CatsActivation

# What every module has, but for its mode.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
# Index of a module, name of one of its attributes.
Place = tuple[int, str]
# Attributes of attributes are looked at to this depth.
_DEEPEST = 3
_MOST_FUNCTIONS = 200


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
        known: dict[Any, Hashable] = {}
        structure, content, names = [], [], []
        for name, module in model.named_modules():
            structure.append(_structure(module, known))
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


def hides_settings(model: nn.Module) -> bool:
    """Whether hooks or replaced ``forward`` methods may decide by something that has no mark."""
    return any(
        has_own_hooks(m)
        # that of accelerate only loads weights
        or ("forward" in vars(m) and not hasattr(m, "_hf_hook"))
        for m in model.modules()
    ) or bool(_torch_module._global_forward_hooks or _torch_module._global_forward_pre_hooks)


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks beside those by which transformers records outputs."""
    return any(
        not is_recorder(hook)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def is_recorder(hook: Any) -> bool:
    """Whether a hook is one of transformers itself, which only records what a call asks for."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def runs_own_code(model: nn.Module) -> bool:
    """Whether hooks or replaced ``forward`` methods of single modules must run at each step.

    Other libraries add both (adapters, offloading, steering). A trace would run them once.
    """
    return any(has_own_hooks(m) or "forward" in vars(m) for m in model.modules()) or bool(
        _torch_module._global_forward_hooks or _torch_module._global_forward_pre_hooks
    )


class _Uncounted:
    """Stands for the content of a tensor of inference mode, whose writes torch does not count.

    It equals nothing, so that such a tensor counts as written between any two calls.
    """


def _structure(module: nn.Module, known: dict[Any, Hashable]) -> dict[str, Hashable]:
    kind = type(module)
    if kind not in known:
        known[kind] = _code(kind)
    found: dict[str, Hashable] = {"": (ref(module), known[kind])}
    # hooks have numbers that no later hook gets
    if module._forward_hooks or module._forward_pre_hooks:
        found["hooks"] = (*module._forward_hooks, *module._forward_pre_hooks)
    for name, tensor in _tensors(module):
        found[name] = _address(tensor)
    if isinstance(module, CatsActivation):
        # kernels may hold a copy of it
        found["thresholds written"] = tuple(_version(t) for _, t in _tensors(module))
    # called for every module before each generation: nothing is built for what does not count
    for name, value in vars(module).items():
        if value is None or type(value) in (bool, int, float, str):
            found[name] = value
        elif name not in _OF_EVERY_MODULE:
            found[name] = _setting(value, known)
    return found


def _content(module: nn.Module) -> dict[str, Hashable]:
    return {name: _version(tensor) for name, tensor in _tensors(module)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _code(kind: Any) -> Hashable:
    """What all modules of a class share: its forward pass, what that calls, and plain settings."""
    functions: dict[FunctionType, None] = {}
    _add_functions(inspect.unwrap(kind.forward), functions)
    settings = [
        (name, value if type(value) in (bool, int, float, str) else repr(value))
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]
        for name, value in vars(base).items()
        if not name.startswith("__") and value is not None and _is_plain(value)
    ]
    return (*map(ref, functions), *settings)


def _add_functions(function: Any, found: dict[FunctionType, None]) -> None:
    """A function and those that it calls by a name of its own file, in turn."""
    if not isinstance(function, FunctionType) or function in found or len(found) >= _MOST_FUNCTIONS:
        return
    found[function] = None
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if isinstance(called, FunctionType):
            found.setdefault(called)
            inner = inspect.unwrap(called)
            if inner.__module__ == function.__module__:
                _add_functions(inner, found)


def _setting(value: Any, known: dict[Any, Hashable], depth: int = 0) -> Hashable:
    if isinstance(value, Tensor):
        return _address(value), _version(value)
    if isinstance(value, PreTrainedConfig):
        if id(value) not in known:
            known[id(value)] = repr([(k, v) for k, v in vars(value).items() if _is_plain(v)])
        return known[id(value)]
    if _is_plain(value):
        return repr(value)
    if depth < _DEEPEST and not isinstance(value, nn.Module | type | ModuleType | FunctionType):
        # what is nested is read by forward passes all the same
        if isinstance(value, dict):
            inner: Iterable[tuple[Any, Any]] = value.items()
        elif isinstance(value, list | tuple | set | deque):
            inner = enumerate(value)
        else:
            inner = getattr(value, "__dict__", {}).items()
        parts = tuple((str(k), _setting(v, known, depth + 1)) for k, v in inner)
        return _identity(value), parts
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
