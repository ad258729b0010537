"""Marks of a model: values that differ after a change that decoding must know of.

There are two kinds. *Structure* is what a trace, a compiled step or a captured graph was made for:
modules, their code, hooks and settings, and where each tensor lies. *Content* is what was written
into those tensors. After a change of structure everything is made anew. After a change of content
only what was computed with the old numbers is forgotten: the keys and values of a conversation.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType, ModuleType, SimpleNamespace
from weakref import ref

import numpy as np
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cats.model import CatsActivation, has_other_forward

# Attributes that every module has, except its mode.
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
# Marks that were computed once, by class of a module or id of a configuration.
_Known = dict[type | int, Hashable]
# Index of a module in the model, name of one of its attributes.
AttributeKey = tuple[int, str]
# How deep attributes of attributes are followed.
DEEPEST = 3
_MOST_FUNCTIONS = 200
# Globals of these types can be settings of a forward pass; few others, such as loggers, are.
_READ_GLOBALS = (bool, int, float, str, dict, list, tuple, set, Tensor, np.ndarray, SimpleNamespace)
# Arrays of NumPy up to this size are compared by their content.
_MOST_BYTES = 2**20
# torch does not count what a fused optimiser writes into weights, so its steps are counted here.
_optimizer_steps = [0]


def _count_step(*_: object) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)


@dataclass(frozen=True, slots=True)
class Marks:
    """Marks of a model at one moment.

    Attributes:
        structure: Per module, what its steps depend on, by attribute.
        content: Per module, the versions of its tensors. A version grows when a tensor is written.
        names: Names of the modules, for messages.
    """

    structure: list[dict[str, Hashable]]
    content: list[dict[str, Hashable]]
    names: list[str]

    @classmethod
    def of(cls, model: nn.Module) -> Marks:
        """The marks of a model as it is now."""
        known: _Known = {}
        structure, content, names = [], [], []
        for name, module in model.named_modules():
            structure.append(_structure(module, known))
            content.append(_content(module))
            names.append(name)
        structure.append({"": _of_all_models()})
        content.append({"": _optimizer_steps[0]})
        return cls(structure, content, names)

    def changed(self, later: Marks) -> dict[AttributeKey, str]:
        """Attributes that differ in later marks of the same modules, with their full names."""
        changes: dict[AttributeKey, str] = {}
        for before, after in (
            (self.structure, later.structure),
            (self.content, later.content),
        ):
            for index, (old, new) in enumerate(zip(before, after, strict=True)):
                owner = self.names[index] if index < len(self.names) else ""
                for key in {**old, **new}:
                    if old.get(key) != new.get(key) and not isinstance(new.get(key), _Uncounted):
                        changes[index, key] = f"{owner}.{key}".strip(".")
        return changes

    def without(self, keys: Collection[AttributeKey]) -> Marks:
        """The same marks, except those of some attributes."""
        if not keys:
            return self

        def remaining(modules: list[dict[str, Hashable]]) -> list[dict[str, Hashable]]:
            return [
                {key: mark for key, mark in marks.items() if (index, key) not in keys}
                for index, marks in enumerate(modules)
            ]

        return Marks(remaining(self.structure), remaining(self.content), self.names)


def hides_settings(model: nn.Module) -> bool:
    """Whether hooks or replaced ``forward`` methods may depend on something that has no mark."""
    return bool(_global_hooks()) or any(
        has_own_hooks(m) or has_other_forward(m) for m in model.modules()
    )


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a module has other hooks than those by which transformers records outputs."""
    return any(
        not is_recorder(hook)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def is_recorder(hook: object) -> bool:
    """Whether a hook is one of transformers itself, which only records outputs."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def runs_own_code(model: nn.Module) -> bool:
    """Whether hooks or replaced ``forward`` methods of single modules must run at each step.

    Other libraries add both (adapters, offloading, steering). A trace would run them only once.
    """
    return bool(_global_hooks()) or any(
        has_own_hooks(m) or "forward" in vars(m) for m in model.modules()
    )


def _global_hooks() -> tuple[int, ...]:
    """Numbers of the hooks that run for every module."""
    return (*_torch_module._global_forward_hooks, *_torch_module._global_forward_pre_hooks)


class _Uncounted:
    """Mark of a tensor of inference mode, whose writes torch does not count.

    It equals no other mark, so such a tensor counts as written between any two calls.
    """


def _structure(module: nn.Module, known: _Known) -> dict[str, Hashable]:
    kind = type(module)
    if kind not in known:
        known[kind] = _code(kind, known)
    marks: dict[str, Hashable] = {"": (ref(module), known[kind])}
    # hooks have numbers that no later hook gets
    if module._forward_hooks or module._forward_pre_hooks:
        marks["hooks"] = (*module._forward_hooks, *module._forward_pre_hooks)
    for name, tensor in _tensors(module):
        marks[name] = _address(tensor)
    if isinstance(module, CatsActivation):
        # kernels may hold a copy of the thresholds
        marks["thresholds written"] = tuple(_version(t) for _, t in _tensors(module))
    # this runs for every module before each generation: plain values are taken as they are
    for name, value in vars(module).items():
        if value is None or type(value) in (bool, int, float, str):
            marks[name] = value
        elif name not in OF_EVERY_MODULE:
            marks[name] = _setting(value, known)
    return marks


def _content(module: nn.Module) -> dict[str, Hashable]:
    return {name: _version(tensor) for name, tensor in _tensors(module)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _code(kind: type[nn.Module], known: _Known) -> Hashable:
    """What all modules of a class share: methods, settings, what its forward calls and reads."""
    functions: dict[FunctionType, None] = {}
    forward = inspect.unwrap(kind.forward)
    _add_functions(forward, functions)
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    attributes = [
        (name, _setting(value, known))
        for base in bases
        if base is not PreTrainedModel
        for name, value in vars(base).items()
        if not name.startswith("__") and value is not None
    ]
    global_settings = []
    if isinstance(forward, FunctionType):
        for name in forward.__code__.co_names:
            value = forward.__globals__.get(name)
            if isinstance(value, _READ_GLOBALS):
                global_settings.append((name, _setting(value, known)))
    return (*map(ref, functions), *attributes, *global_settings)


def _add_functions(function: object, functions: dict[FunctionType, None]) -> None:
    """Add a function, and those that it calls by a global name.

    Behind a decorator, the function inside is followed as well if it is of the same file.

    Args:
        function: Anything; only a Python function is added.
        functions: Those found so far, as the keys, in order.
    """
    if not isinstance(function, FunctionType) or function in functions:
        return
    if len(functions) >= _MOST_FUNCTIONS:
        return
    functions[function] = None
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if isinstance(called, FunctionType):
            inner = inspect.unwrap(called)
            if inner is not called or inner.__module__ != function.__module__:
                functions.setdefault(called)
            if inner.__module__ == function.__module__:
                _add_functions(inner, functions)


def _setting(value: object, known: _Known, depth: int = 0) -> Hashable:
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
        # a forward pass may read what is nested as well
        parts = tuple((str(k), _setting(v, known, depth + 1)) for k, v in inside(value))
        return _identity(value), parts
    return _identity(value)


def inside(value: object) -> list[tuple[object, object]]:
    """The values that an object holds, with their names: entries, attributes, a closure's cells."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple | set | deque):
        return list(enumerate(value))
    if isinstance(value, property):
        return [("get", value.fget)]
    cells = getattr(value, "__closure__", None) or ()
    closed_over = [(i, c.cell_contents) for i, c in enumerate(cells) if c != CellType()]
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    slots = [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    return [*closed_over, *slots, *getattr(value, "__dict__", {}).items()]


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _identity(value: object) -> Hashable:
    """A mark of the object itself, which does not keep it or its model alive."""
    # unlike an id, a weak reference does not match a later object at the same address
    return ref(value) if isinstance(value, FunctionType) else (type(value).__name__, id(value))


def _address(tensor: Tensor) -> Hashable:
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a subclass that holds several tensors
        address = 0
    return id(tensor), address, tensor.dtype, tensor.device, tensor.shape


def _version(tensor: Tensor) -> Hashable:
    return _Uncounted() if tensor.is_inference() else tensor._version


def _of_all_models() -> Hashable:
    attention = tuple((name, id(function)) for name, function in ALL_ATTENTION_FUNCTIONS.items())
    return _global_hooks(), attention
