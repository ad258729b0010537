"""CATS: contextually-aware thresholding for sparsity (arXiv:2404.08763)."""

from typing import TYPE_CHECKING

from cats.lazy import exports
from cats.version import __version__

if TYPE_CHECKING:
    from cats import data, errors, functional, metrics, ops, recipes
    from cats.apply import densify_, sparsify_
    from cats.calibration import Statistics, calibrate, collect
    from cats.checkpoint import from_pretrained
    from cats.config import CatsConfig
    from cats.decode import Decoder, Sessions, generate, release
    from cats.errors import CatsError
    from cats.fusion import fuse_, unfuse_
    from cats.integrations.auto import register, unregister

__all__ = [
    "CatsConfig",
    "CatsError",
    "Decoder",
    "Sessions",
    "Statistics",
    "__version__",
    "calibrate",
    "checkpoint",
    "collect",
    "data",
    "densify_",
    "errors",
    "finetuning",
    "from_pretrained",
    "functional",
    "fuse_",
    "generate",
    "metrics",
    "ops",
    "quantisation",
    "recipes",
    "register",
    "release",
    "sparsify_",
    "unfuse_",
    "unregister",
]

# Loaded on first use: `import cats` and `cats --help` must not wait for torch.
__getattr__, __dir__ = exports(
    __name__,
    {
        "CatsConfig": "cats.config",
        "CatsError": "cats.errors",
        "Decoder": "cats.decode",
        "Sessions": "cats.decode",
        "Statistics": "cats.calibration",
        "calibrate": "cats.calibration",
        "checkpoint": "cats.checkpoint",
        "collect": "cats.calibration",
        "data": "cats.data",
        "densify_": "cats.apply",
        "errors": "cats.errors",
        "finetuning": "cats.finetuning",
        "from_pretrained": "cats.checkpoint",
        "functional": "cats.functional",
        "fuse_": "cats.fusion",
        "generate": "cats.decode",
        "metrics": "cats.metrics",
        "ops": "cats.ops",
        "quantisation": "cats.quantisation",
        "recipes": "cats.recipes",
        "register": "cats.integrations.auto",
        "release": "cats.decode",
        "sparsify_": "cats.apply",
        "unfuse_": "cats.fusion",
        "unregister": "cats.integrations.auto",
    },
)
