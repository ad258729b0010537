"""The experts implementation ``cats`` of transformers: each token reads its experts' kept neurons.

``model.set_experts_implementation("cats")`` chooses it after :func:`cats.register`. It is for
decoding; calibrate and train with ``grouped_mm``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.functional import ACTIVATIONS
from cats.model import CatsActivation, activation_kind
from cats.model.routes import OPERATOR
from cats.ops.experts import gated_experts

__all__ = ["OPERATOR", "experts_forward"]

# What activations compute, by their class and setting: to find it out takes longer than a token,
# and cannot be traced.
_KINDS: dict[Hashable, str | None] = {}


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """One call of ``cats::gated_experts`` instead of the forward pass of stacked experts.

    The weight of ``down`` is laid out neuron by neuron at the first call, in place: same shape, no
    second copy.

    Args:
        experts: A module of a class with transformers's decorator ``use_experts_implementation``.
        hidden_states: ``[N, D]``.
        top_k_index: ``[N, K]``.
        top_k_weights: ``[N, K]``.

    Raises:
        UnsupportedModelError: If the experts compute another formula, or are trained.
    """
    if reason := _refusal(experts):
        raise UnsupportedModelError(
            f"the experts implementation 'cats' cannot run {type(experts).__name__}: {reason}; "
            "call model.set_experts_implementation('grouped_mm')"
        )
    down = experts.down_proj
    if not down.transpose(1, 2).is_contiguous():
        with torch.no_grad():
            down.data = down.data.transpose(1, 2).contiguous().transpose(1, 2)
    act = experts.act_fn
    count = down.shape[0]
    if isinstance(act, CatsActivation):
        thresholds = act.threshold.reshape(-1).expand(count).contiguous()
        act = act.act
    else:
        thresholds = torch.zeros(count, device=down.device)
    kind = _kind_of(act)
    assert kind is not None
    return gated_experts(
        hidden_states.contiguous(),
        top_k_index.contiguous(),
        top_k_weights.contiguous(),
        experts.gate_up_proj,
        down,
        thresholds,
        kind,
    )


def _refusal(experts: Any) -> str | None:
    """Why the operator does not compute what the experts compute; None where it does."""
    is_plain = experts.is_concatenated and not (
        experts.is_transposed or experts.has_bias or experts.has_post_expert_norm
    )
    own_gate = type(experts)._apply_gate.__module__ != "transformers.integrations.moe"
    if not (experts.has_gate and is_plain) or own_gate:
        return "they compute another formula than down(act(gate(x)) * up(x))"
    act = experts.act_fn
    if isinstance(act, CatsActivation):
        if act.router != "gate":
            return f"their thresholds are on {act.router}"
        act = act.act
    if not isinstance(act, nn.Module) or _kind_of(act) not in ACTIVATIONS:
        return f"their activation is none of {', '.join(ACTIVATIONS)}"
    if torch.is_grad_enabled() and experts.down_proj.requires_grad and experts.training:
        return "its operator has no gradient"
    return None


def _kind_of(act: nn.Module) -> str | None:
    key = type(act), getattr(act, "approximate", None), getattr(act, "function", None)
    if key not in _KINDS:
        _KINDS[key] = activation_kind(act)
    return _KINDS[key]
