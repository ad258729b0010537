"""CATS: contextually-aware thresholding for sparsity (arXiv:2404.08763)."""

import importlib
from typing import TYPE_CHECKING, Any

from cats.version import __version__

if TYPE_CHECKING:
    from cats import functional, ops
    from cats.errors import CatsError

__all__ = ["CatsError", "__version__", "functional", "ops"]

# Loaded on first use: `import cats` and `cats --help` must not wait for torch.
_HOME = {
    "CatsError": "cats.errors",
    "functional": "cats.functional",
    "ops": "cats.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cats' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    value = module if _HOME[name] == f"cats.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
