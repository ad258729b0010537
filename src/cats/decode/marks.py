"""Marks of a model: what decoding depends on, so that a change between two calls is seen.

There are two kinds. *Structure* is what a trace, a compiled step or a captured graph was made for:
modules, their code, hooks and settings, and where each tensor lies. *Content* is what was written
into those tensors. After a change of structure everything is made anew. After a change of content
only what was computed with the old numbers is forgotten: the keys and values of a conversation.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType, ModuleType, SimpleNamespace
from typing import Any
from weakref import ref

import numpy as np
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cats.model import CatsActivation, has_other_forward

# What every module has, but for its mode.
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
# Index of a module, name of one of its attributes.
Place = tuple[int, str]
# Attributes of attributes are looked at to this depth.
DEEPEST = 3
_MOST_FUNCTIONS = 200
_READ_GLOBALS = (bool, int, float, str, dict, list, tuple, set, Tensor, np.ndarray, SimpleNamespace)
# Arrays of NumPy up to this size are compared by their content.
_MOST_BYTES = 2**20
# A fused optimiser writes into weights without counting it, so its steps are counted here.
_optimizer_steps = [0]


def _count_step(*_: Any) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)


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
        content.append({"": _optimizer_steps[0]})
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
    return bool(_global_hooks()) or any(
        has_own_hooks(m) or has_other_forward(m) for m in model.modules()
    )


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
    return bool(_global_hooks()) or any(
        has_own_hooks(m) or "forward" in vars(m) for m in model.modules()
    )


def _global_hooks() -> tuple[int, ...]:
    """Numbers of the hooks that run for every module."""
    return (*_torch_module._global_forward_hooks, *_torch_module._global_forward_pre_hooks)


class _Uncounted:
    """Stands for the content of a tensor of inference mode, whose writes torch does not count.

    It equals nothing, so that such a tensor counts as written between any two calls.
    """


def _structure(module: nn.Module, known: dict[Any, Hashable]) -> dict[str, Hashable]:
    kind = type(module)
    if kind not in known:
        known[kind] = _code(kind, known)
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
        elif name not in OF_EVERY_MODULE:
            found[name] = _setting(value, known)
    return found


def _content(module: nn.Module) -> dict[str, Hashable]:
    return {name: _version(tensor) for name, tensor in _tensors(module)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _code(kind: Any, known: dict[Any, Hashable]) -> Hashable:
    """What all modules of a class share: methods, settings, what its forward calls and reads."""
    functions: dict[FunctionType, None] = {}
    forward = inspect.unwrap(kind.forward)
    _add_functions(forward, functions)
    own = [
        base
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]
        if base is not PreTrainedModel
    ]
    shared = [
        (name, _setting(value, known))
        for base in own
        for name, value in vars(base).items()
        if not name.startswith("__") and value is not None
    ]
    read = []
    if isinstance(forward, FunctionType):
        for name in forward.__code__.co_names:
            value = forward.__globals__.get(name)
            # of other objects, such as loggers, only few are settings
            if isinstance(value, _READ_GLOBALS):
                read.append((name, _setting(value, known)))
    return (*map(ref, functions), *shared, *read)


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
    if isinstance(value, np.ndarray):
        return value.shape, hash(value.tobytes()) if value.nbytes <= _MOST_BYTES else id(value)
    if isinstance(value, GenerationConfig | logging.Logger):
        return None  # read by no forward pass
    if depth < DEEPEST and not isinstance(value, nn.Module | type | ModuleType):
        # what is nested is read by forward passes all the same
        parts = tuple((str(k), _setting(v, known, depth + 1)) for k, v in inside(value))
        return _identity(value), parts
    return _identity(value)


def inside(value: Any) -> list[tuple[Any, Any]]:
    """What an object holds: entries, attributes, what a function closes over."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple | set | deque):
        return list(enumerate(value))
    if isinstance(value, property):
        return [("get", value.fget)]
    cells = getattr(value, "__closure__", None) or ()
    inside = [(i, c.cell_contents) for i, c in enumerate(cells) if c != CellType()]
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    inside += [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
    return [*inside, *getattr(value, "__dict__", {}).items()]


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
    attention = tuple((name, id(function)) for name, function in ALL_ATTENTION_FUNCTIONS.items())
    return _global_hooks(), attention
