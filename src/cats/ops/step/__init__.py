"""A whole token of a conversation in one call: C++, in a team of threads of its own.

``description.py`` describes a model and a conversation; ``plan.h`` says how a token is cut into
parts and pieces, and ``claims.h`` how threads share them.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from cats.errors import BackendError
from cats.ops import cpu
from cats.ops.step.description import StepLayer, StepModel, address

__all__ = ["Plan", "pretend_processors", "processors", "team_size"]

_OUT_OF_RANGE = 1


class Plan:
    """A conversation that is ready to run tokens. It keeps the memory alive that it reads."""

    def __init__(self, model: StepModel, layers: Sequence[StepLayer], memory: object) -> None:
        """
        Args:
            model: The model and the buffers; ``layers``, ``count`` and ``threads`` are set here.
            layers: Its layers.
            memory: What owns the memory that the description names.

        Raises:
            BackendError: If the kernels are not built, or memory does not suffice.
        """
        self._library = _library()
        model.layers = (StepLayer * len(layers))(*layers)
        model.count = len(layers)
        model.threads = min(torch.get_num_threads(), processors())
        handle = self._library.cats_step_make(ctypes.byref(model))
        if not handle:
            raise BackendError("out of memory: use a shorter context, or engine='eager'")
        self._handle = ctypes.c_void_p(handle)
        # the end waits for threads that still read the memory, so it comes before `memory` goes
        self._end = weakref.finalize(self, _end, self._library, self._handle, memory)

    def run(self) -> None:
        """Run the newest token up to its logits."""
        self._check(self._library.cats_step_run(self._handle, 0, 0))

    def run_and_choose(self, padding: int) -> None:
        """Run the newest token, take the likeliest next one, and count slot, position and step on.

        Args:
            padding: The token of a row that has ended.
        """
        self._check(self._library.cats_step_run(self._handle, 1, padding))

    def settle(self) -> None:
        """Wait until no thread reads keys and values of earlier tokens: they may be written then.

        Only a thread that the system has stopped in the middle of a token may still do so.
        """
        self._library.cats_step_settle(self._handle)

    def run_layer(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream ``[D]`` between attention and MLP of a layer, and what its MLP adds.

        Args:
            index: The layer.
            x: The residual stream before it, ``[D]``, float32.
        """
        x = x.contiguous()
        middle, added = torch.empty_like(x), torch.empty_like(x)
        pointers = (ctypes.c_void_p(address(tensor)) for tensor in (x, middle, added))
        self._check(self._library.cats_step_run_layer(self._handle, index, *pointers))
        return middle, added

    def _check(self, result: int) -> None:
        if result == _OUT_OF_RANGE:
            raise BackendError("the newest token is outside of the vocabulary or the cache")
        if result:
            raise BackendError("a step failed: the system gives no memory or threads")


def team_size() -> int:
    """How many threads help with tokens in this process, beside those that call."""
    size: int = _library().cats_step_team()
    return size


def processors() -> int:
    """How many threads of this process may run at once: by its affinity and its cgroup's quota."""
    count: int = _library().cats_step_processors()
    return count


def pretend_processors(count: int) -> None:
    """For tests: as if this process had so many processors; 0 for as many as it has."""
    _library().cats_step_pretend_processors(ctypes.c_int64(count))


def _end(library: ctypes.CDLL, handle: ctypes.c_void_p, memory: object) -> None:
    library.cats_step_end(handle)


@cache
def _library() -> ctypes.CDLL:
    library = cpu.library()
    library.cats_step_sizes.restype = ctypes.c_int64
    library.cats_step_make.restype = ctypes.c_void_p
    library.cats_step_team.restype = ctypes.c_int64
    library.cats_step_processors.restype = ctypes.c_int64
    library.cats_step_end.restype = None
    library.cats_step_settle.restype = None
    library.cats_step_run.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    pointers = (ctypes.c_void_p,) * 3
    library.cats_step_run_layer.argtypes = ctypes.c_void_p, ctypes.c_int64, *pointers
    assert library.cats_step_sizes() == ctypes.sizeof(StepModel) * 100000 + ctypes.sizeof(StepLayer)
    return library
