"""The operator ``cats::gated_mlp``: its schema, and the functions that call a backend.

``arguments.py`` checks the arguments of a call, and ``backends.py`` chooses its backend.
``reference.py`` defines the result; ``dense.py``, ``cpu/``, ``triton/`` and ``cuda/`` are faster.
"""

import torch
from torch import Tensor

from cats.errors import ShapeError
from cats.ops.gradients import without_gradient
from cats.ops.mlp.arguments import GatedMLPArguments
from cats.ops.mlp.backends import checked

__all__ = ["call", "gated_mlp"]


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    thresholds: Tensor | float,
    activation: str,
    router: str = "gate",
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    product_thresholds: Tensor | None = None,
    input_thresholds: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sparse gated MLP: ``down @ (keep(act(gate @ x)) * (up @ x))``.

    Args:
        x: Inputs of ``B`` tokens, ``[B, D]``; bfloat16, float16 or float32.
        gate: ``[F, D]``, row-major, in the dtype of ``x`` like every weight and bias.
        up: ``[F, D]``, row-major.
        down: ``[D, F]``, column-major, so that the weights of one neuron are contiguous.
        thresholds: ``[F]``, float32, or one number for all. A neuron is dropped where the absolute
            output of the router is below its threshold; NaN is kept.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        router: The branch that is compared with the thresholds: ``"gate"`` (after the activation,
            CATS) or ``"up"``. All its rows are read. Of the other branch, only the rows of kept
            neurons are read.
        gate_bias: ``[F]``, optional.
        up_bias: ``[F]``, optional.
        down_bias: ``[D]``, optional.
        product_thresholds: ``[F]``, float32, optional: a neuron whose product ``act(g) * u`` is
            absolutely smaller is dropped as well, and its column of ``down`` is not read.
        input_thresholds: ``[D]``, float32, optional: an entry of ``x`` that is absolutely smaller
            is dropped for the router, which is column-major then, and its column is not read.
        backend: ``"auto"``, or one of :data:`cats.ops.BACKENDS`.

    Returns:
        ``[B, D]`` in the dtype of ``x``; products are summed in float32.

    Raises:
        ShapeError: If a shape, dtype or layout does not fit.
        BackendError: If ``backend`` is named and cannot run this call.

    Source: arXiv:2404.08763, section on the custom kernel.
    """
    if not isinstance(thresholds, Tensor):
        thresholds = torch.full((gate.shape[0],), thresholds, device=x.device)
    elif thresholds.numel() == 1:
        thresholds = thresholds.reshape(1).expand(gate.shape[0]).contiguous()
    arguments = GatedMLPArguments(
        x,
        gate,
        up,
        down,
        thresholds,
        activation,
        router,
        gate_bias,
        up_bias,
        down_bias,
        product_thresholds,
        input_thresholds,
    )
    try:
        return call(arguments, backend)
    except RuntimeError:
        # a C++ kernel says less about the tensor that does not fit
        arguments.check()
        raise


def call(arguments: GatedMLPArguments, backend: str) -> Tensor:
    """:func:`gated_mlp` without its checks, for the hot path: errors may say less."""
    # the first may run a C++ kernel, which loses the errors of a named backend
    operator = _OPERATOR if backend == "auto" else _PYTHON_OPERATOR
    if torch.is_grad_enabled():
        x, gate, up, down = arguments[:4]
        if x.requires_grad or gate.requires_grad or up.requires_grad or down.requires_grad:
            return without_gradient(operator, *arguments, backend)
    out: Tensor = operator(*arguments, backend)
    return out


def _gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    thresholds: Tensor,
    activation: str,
    router: str = "gate",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    product_thresholds: Tensor | None = None,
    input_thresholds: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    arguments = GatedMLPArguments(
        x,
        gate,
        up,
        down,
        thresholds,
        activation,
        router,
        gate_bias,
        up_bias,
        down_bias,
        product_thresholds,
        input_thresholds,
    )
    return checked(arguments, backend)(arguments)


_LIBRARY = torch.library.Library("cats", "DEF")
# A plain definition, not a custom_op: a third of its overhead, and a C++ kernel can register for
# one device. Such a kernel calls `_gated_mlp` for what it does not take; nothing else does.
for _name in ("gated_mlp", "_gated_mlp"):
    _LIBRARY.define(
        f"{_name}(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor thresholds, "
        "str activation, str router='gate', Tensor? gate_bias=None, Tensor? up_bias=None, "
        "Tensor? down_bias=None, Tensor? product_thresholds=None, Tensor? input_thresholds=None, "
        "str backend='auto') -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _LIBRARY.impl(_name, _gated_mlp, "CompositeExplicitAutograd")
    # nothing to record: `call` handles gradients
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("cats::gated_mlp", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, gate: Tensor, *args: object, **kwargs: object) -> Tensor:
    # torch calls this as well where only the weights are on meta
    if gate.device != x.device:
        raise ShapeError(f"expected gate on {x.device}, got {gate.device}: are weights offloaded?")
    return torch.empty_like(x)


_OPERATOR = torch.ops.cats.gated_mlp.default
_PYTHON_OPERATOR = torch.ops.cats._gated_mlp.default
