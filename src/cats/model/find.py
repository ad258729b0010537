"""Find the gated MLPs of a model by their structure and a numerical probe."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Container, Sequence

from torch import nn

from cats.errors import ConfigError, UnsupportedModelError
from cats.functional import ACTIVATIONS
from cats.model.activation import activation_kind
from cats.model.experts import GatedExperts, are_stacked_experts, probe_experts
from cats.model.mlp import GatedMLP
from cats.model.modules import Replacement
from cats.model.probe import PROJECTOR, UNCALLABLE, UNGATED, ProbedMLP, probe
from cats.model.slot import (
    INLINED,
    function_activations,
    has_shapes_of_gated_mlp,
    inlined_activation,
    opened,
    probe_inlined,
)
from cats.weights import weight_of


def find_gated_mlps(
    model: nn.Module, *, exclude: Sequence[str] = (), names: Container[str] | None = None
) -> list[GatedMLP]:
    """The gated MLPs of a model, in its order.

    A module is a candidate if its children with weights are linear layers, or if it holds stacked
    experts. Its activation is a child, a function that it keeps, or (if it computes ``down(act(
    gate(x)) * up(x))`` bit for bit) part of its forward pass. A probe with small and large random
    inputs then checks that the activation runs exactly once (per token and expert), that a zero
    activation gives a zero output (or the bias), and that the activation is multiplied with
    something that depends on the input. A candidate without that last property is an ungated MLP;
    one whose output has another size than its input is a projector between two models. Both are
    left out without an error.

    Args:
        model: Any module; weights on the ``meta`` device are probed with random values.
        exclude: Patterns of module names to leave out, such as ``["*vision*"]``; a single pattern
            needs no list.
        names: Only modules of these names are examined.

    Raises:
        UnsupportedModelError: If the model has no gated MLP, or if a candidate calls its activation
            in a way that CATS cannot use; the message names the module and the reason.
        ConfigError: If a pattern matches no MLP, or the patterns leave none.
    """
    exclude = [exclude] if isinstance(exclude, str) else exclude
    check_patterns(model, exclude)
    mlps: list[GatedMLP] = []
    ungated = []
    for name, module in model.named_modules():
        if names is not None and name not in names:
            continue
        if _matches(name, exclude):
            continue
        if isinstance(module, Replacement):
            module = module.original
        stacked = are_stacked_experts(module)
        if not (stacked or _holds_only_linear_layers(module)):
            continue
        found = _examine(name, module, stacked=stacked)
        if found is None:
            continue
        if found == UNGATED:
            ungated.append(f"{name} ({type(module).__name__})")
            continue
        if isinstance(found, GatedMLP):
            # calibration could not tell which MLP the inputs of a shared activation belong to
            twin = next((other for other in mlps if other.dense_act is found.dense_act), None)
            if twin is None:
                mlps.append(found)
                continue
            found = f"it shares its activation module with {twin.name}"
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) cannot be made sparse: {found}; "
            f"leave it out with exclude=[{name!r}] or a pattern"
        )
    if not mlps:
        hint = f"; ungated MLPs such as {ungated[0]} have no gate" if ungated else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} has no gated MLP of the form down(act(gate(x)) * up(x)) with "
            f"an activation module and linear layers{hint}"
        )
    return mlps


def _examine(name: str, module: nn.Module, *, stacked: bool) -> GatedMLP | str | None:
    """The gated MLP that a candidate is; a reason, UNGATED, or None where it is none of ours."""
    acts: dict[str, nn.Module] = {n: c for n, c in module.named_children() if activation_kind(c)}
    loose_act: nn.Module | None = None
    if not acts:
        functions = function_activations(module).items()
        acts = {name: act for name, act in functions if activation_kind(act) in ACTIVATIONS}
        loose_act = next(iter(acts.values()), None)
    if not acts and stacked:
        # other modules have 3-D parameters too, such as recurrent gates
        if len(inspect.signature(module.forward).parameters) < 3:
            return None
        return "it has no activation module, which its experts would call: thresholds need one"
    if not acts:
        if (inlined := probe_inlined(module)) is None:
            return None
        kind, result = inlined
        sizes = result.hidden_size, result.intermediate_size, result.layout
        return GatedMLP(name, module, INLINED, kind, *sizes, inlined_activation(kind))
    if len(acts) > 1:
        return f"it has {len(acts)} activation modules"
    ((activation_name, act),) = acts.items()
    kind = activation_kind(act) or ""
    may_gate = stacked or has_shapes_of_gated_mlp(module)
    with opened(module, activation_name, loose_act):
        answer = (probe_experts if stacked else probe)(module, activation_name)
    if answer == PROJECTOR:
        return None
    if isinstance(answer, str):
        # such as a module whose softmax or sigmoid is no part of an MLP, or a gated attention
        is_other = kind not in ACTIVATIONS or (answer.startswith(UNCALLABLE) and not may_gate)
        return answer if answer == UNGATED or not is_other else None
    if kind not in ACTIVATIONS:
        return f"its activation {kind} is none of {', '.join(ACTIVATIONS)}"
    if isinstance(answer, ProbedMLP):
        sizes = answer.hidden_size, answer.intermediate_size, answer.layout
        return GatedMLP(name, module, activation_name, kind, *sizes, loose_act)
    hidden_size, intermediate_size, experts = answer
    return GatedExperts(
        name,
        module,
        activation_name,
        kind,
        hidden_size,
        intermediate_size,
        None,
        loose_act,
        experts,
    )


def check_patterns(model: nn.Module, exclude: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: If a pattern matches no MLP of the model, gated or not, or if none is left.
    """
    if not exclude:
        return  # finding the MLPs runs each activation, which takes time
    mlps = [
        n for n, module in model.named_modules() if any(map(activation_kind, module.children()))
    ]
    if not mlps:
        return
    for pattern in exclude:
        if not any(_matches(name, [pattern]) for name in mlps):
            raise ConfigError(
                f"exclude {pattern!r} matches no MLP of this model, which are named like "
                f"{mlps[0]!r}"
            )
    if all(_matches(name, exclude) for name in mlps):
        raise ConfigError(f"exclude {' '.join(exclude)} leaves no MLP of this model")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _holds_only_linear_layers(module: nn.Module) -> bool:
    """Whether it has two or more linear layers, and no weights of another kind."""
    if any(p.ndim >= 2 for p in module.parameters(recurse=False)):
        return False
    weights = [weight_of(c) for c in module.children()]
    others = [
        child
        for child, weight in zip(module.children(), weights, strict=True)
        if weight is None and any(p.ndim >= 2 for p in child.parameters())
    ]
    return sum(weight is not None for weight in weights) >= 2 and not others
