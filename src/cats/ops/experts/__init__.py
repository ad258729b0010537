"""The operator ``cats::gated_experts``: sparse gated MLPs of a mixture, each token with its own.

``arguments.py`` checks the arguments of a call, and ``backends.py`` chooses its backend.
``reference.py`` defines the result; ``dense``, ``cpu`` and ``triton`` are faster.
"""

import torch
from torch import Tensor

from cats.ops.experts.arguments import ExpertsArguments
from cats.ops.experts.backends import BACKENDS
from cats.ops.gradients import without_gradient

__all__ = ["BACKENDS", "ExpertsArguments", "gated_experts"]


def gated_experts(
    x: Tensor,
    index: Tensor,
    shares: Tensor,
    gate_up: Tensor,
    down: Tensor,
    thresholds: Tensor,
    activation: str,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sparse gated experts: ``sum of share * down @ (keep(act(gate @ x)) * (up @ x))``.

    Of the experts, only those that a token is routed to are read; of each, all rows of gate, and
    the rows of up and columns of down of kept neurons.

    Args:
        x: Inputs of ``B`` tokens, ``[B, D]``; bfloat16, float16 or float32.
        index: ``[B, K]``, int64: the experts of each token. A number that no expert has adds 0.
        shares: ``[B, K]``, floating point: what the output of each is multiplied by.
        gate_up: ``[E, 2 * F, D]``, contiguous: the rows of gate, then those of up.
        down: ``[E, D, F]``, each expert column-major: ``w.transpose(1, 2).contiguous()
            .transpose(1, 2)``.
        thresholds: ``[E]``, float32. A neuron is dropped where ``abs(act(gate @ x))`` is smaller.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        backend: ``"auto"``, or one of ``reference``, ``dense``, ``cpu`` and ``triton``.

    Returns:
        ``[B, D]`` in the dtype of ``x``; products are summed in float32.

    Raises:
        ShapeError: If a shape, dtype or layout does not fit.
        BackendError: If ``backend`` is named and cannot run this call.
    """
    operands = (x, index, shares, gate_up, down, thresholds, activation, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, shares, gate_up, down)):
        return without_gradient(_OPERATOR, *operands)
    out: Tensor = _OPERATOR(*operands)
    return out


def _gated_experts(
    x: Tensor,
    index: Tensor,
    shares: Tensor,
    gate_up: Tensor,
    down: Tensor,
    thresholds: Tensor,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    arguments = ExpertsArguments(x, index, shares, gate_up, down, thresholds, activation)
    return BACKENDS.checked(arguments, backend)(arguments)


_LIBRARY = torch.library.Library("cats", "FRAGMENT")
_LIBRARY.define(
    "gated_experts(Tensor x, Tensor index, Tensor shares, Tensor gate_up, Tensor down, "
    "Tensor thresholds, str activation, str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("gated_experts", _gated_experts, "CompositeExplicitAutograd")
# nothing to record: `gated_experts` handles gradients
_LIBRARY.impl("gated_experts", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("cats::gated_experts", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x)


_OPERATOR = torch.ops.cats.gated_experts.default
