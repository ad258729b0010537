"""Operators and their kernels, one folder per operator.

A folder holds the operator's schema, its definition in PyTorch, and one file or folder per backend:
``cpu`` (C++), ``triton``, ``cuda`` (CUDA C++). ``mlp`` is ``cats::gated_mlp``, a sparse MLP.
``packed_linear`` and ``packed_mlp`` are a linear layer and a sparse MLP over quantised weights.
``linear``, ``rms_norm``, ``rotary``, ``attention``, ``embedding`` and ``choice`` are the other
operators of a decode step. The folders ``cpu`` and ``cuda`` beside them hold what all kernels of
that kind share.
"""

from cats.ops import linear as _linear  # noqa: F401 (defines an operator)
from cats.ops import packed_linear as _packed_linear  # noqa: F401
from cats.ops import packed_mlp as _packed_mlp  # noqa: F401
from cats.ops import rms_norm as _rms_norm  # noqa: F401
from cats.ops import rotary as _rotary  # noqa: F401
from cats.ops.mlp import call, gated_mlp
from cats.ops.mlp.arguments import GatedMLPArguments
from cats.ops.mlp.backends import BACKENDS, backend_for, backends, checked, is_dense_batch
from cats.ops.watching import is_for_compiler, is_unwatched, tracing_for_compiler

__all__ = [
    "BACKENDS",
    "GatedMLPArguments",
    "backend_for",
    "backends",
    "call",
    "checked",
    "gated_mlp",
    "is_dense_batch",
    "is_for_compiler",
    "is_unwatched",
    "tracing_for_compiler",
]
