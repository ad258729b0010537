"""The activation of a gated MLP: which one it is, and the one that drops neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cats.errors import ShapeError
from cats.functional import ACTIVATIONS, cats_activation
from cats.model.modules import evaluating
from cats.model.routes import Routes


class CatsActivation(nn.Module):
    """``cats_activation(act(x), threshold)`` in float32, instead of an MLP's activation.

    Attributes:
        act: The activation that is thresholded.
        threshold: One number, ``[F]``, or ``[E, 1]`` for E stacked experts; always float32,
            whatever the dtype of the model.
        router: The branch that is compared with it. This module compares the gate; where it is
            ``"up"``, the MLP's own forward does that. It tells ``fuse_`` what to pass to the
            operator.
    """

    threshold: Tensor

    def __init__(
        self,
        act: nn.Module,
        threshold: Tensor,
        *,
        dense: nn.Module | None = None,
        router: str = "gate",
    ):
        super().__init__()
        self.router = router
        self.act = act
        self._replaced = dense if dense is not act else None
        self._narrow_shape: torch.Size | None = None  # of the threshold before widen_
        self.routes = Routes() if threshold.ndim == 2 else None
        self.register_buffer("threshold", threshold.detach().clone().float())

    @property
    def dense(self) -> nn.Module:
        """The activation of the dense model, which ``densify_`` restores."""
        return self.act if self._replaced is None else self._replaced

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        a = self.act(wide)
        threshold = self.threshold
        if self.routes is not None:
            threshold = threshold[self.routes.take(x)[0]]
        return (cats_activation(a, threshold) if self.router == "gate" else a).to(x.dtype)

    def widen_(self, size: int) -> Tensor:
        """Replace one threshold by ``size`` equal ones, and return the buffer.

        Raises:
            ShapeError: If there are neither one nor ``size`` thresholds.
        """
        threshold = self.threshold
        if threshold.shape != (size,):
            if threshold.numel() != 1:
                raise ShapeError(
                    f"expected one threshold or {size}, one for each neuron; "
                    f"got {list(threshold.shape)}"
                )
            self._narrow_shape = threshold.shape
            self.threshold = threshold = threshold.detach().reshape(1).repeat(size)
        return threshold

    def narrow_(self) -> None:
        """Undo :meth:`widen_`, unless the thresholds of the neurons differ by now."""
        threshold, shape = self.threshold, self._narrow_shape
        if shape is not None and not threshold.is_meta and threshold.unique().numel() == 1:
            self.threshold = threshold[:1].clone().reshape(shape)
        self._narrow_shape = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CatsActivation:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            moved = self._buffers[name]
            if exact is None or moved is None:
                continue
            # only the device changes: a threshold that .half() rounds would drop other neurons, and
            # to_empty() gives no values
            self._buffers[name] = moved.float() if exact.is_meta else exact.to(moved.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        loaded = state_dict.get(f"{prefix}threshold")
        # one threshold per MLP and one per neuron may replace each other
        if isinstance(loaded, Tensor) and loaded.shape != self.threshold.shape and loaded.ndim < 2:
            if loaded.numel() == 1:
                state_dict[f"{prefix}threshold"] = loaded.reshape(1).expand(self.threshold.shape)
            elif self.threshold.numel() == 1:
                self.widen_(loaded.numel())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # load_state_dict(assign=True) takes the tensor as it is
        if self.threshold.dtype != torch.float32 or not self.threshold.is_contiguous():
            self.threshold = self.threshold.float().contiguous()

    def extra_repr(self) -> str:
        if self.threshold.numel() == 1 and not self.threshold.is_meta:
            return f"threshold={self.threshold.item():.4g}"
        return f"threshold={list(self.threshold.shape)}"


def is_sparse(model: nn.Module) -> bool:
    """Whether thresholds are applied to some MLP."""
    return any(isinstance(module, CatsActivation) for module in model.modules())


def activation_kind(module: nn.Module) -> str | None:
    """Which activation a module computes.

    Returns:
        A name of :data:`cats.functional.ACTIVATIONS`; the name of the class for another elementwise
        activation; None for any other module.
    """
    if isinstance(module, CatsActivation):
        return activation_kind(module.dense)
    is_leaf = not any(True for _ in module.children())
    if not is_leaf or any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    # dropout would change the state of the random numbers
    if isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
        return None
    grid = torch.linspace(-8, 8, 257, device="cpu")
    try:
        with evaluating(module), torch.no_grad():
            values = module(grid.clone())
    except Exception:  # a foreign module that fails here is no elementwise activation
        return None
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        return None
    with evaluating(module), torch.no_grad():
        if not torch.allclose(module(grid[:16].clone()), values[:16], atol=1e-5):
            return None  # one that looks at several elements, such as a softmax
    for name, act in ACTIVATIONS.items():
        if torch.allclose(values, act(grid), atol=1e-5, rtol=1e-5):
            return name
    is_affine = torch.allclose(values.diff(n=2), torch.zeros(255), atol=1e-5)
    return None if is_affine else type(module).__name__
