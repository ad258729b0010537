"""Find the gated MLPs of a model by their structure and a numerical probe."""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Sequence

from torch import nn

from cats.errors import ConfigError, UnsupportedModelError
from cats.functional import ACTIVATIONS
from cats.model.activation import activation_kind
from cats.model.mlp import GatedMLP
from cats.model.modules import Replacement
from cats.model.probe import UNGATED, ProbedMLP, probe
from cats.weights import weight_of


def find_gated_mlps(
    model: nn.Module, *, exclude: Sequence[str] = (), names: Container[str] | None = None
) -> list[GatedMLP]:
    """The gated MLPs of a model, in its order.

    A module is a candidate if one of its children is an activation and its other children with
    weights are linear layers. A probe with small and large random inputs then checks that the
    activation runs exactly once, that a zero activation gives a zero output (or the bias), and that
    the activation is multiplied with something that depends on the input. A candidate without that
    last property is an ungated MLP; it is left out without an error.

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
        acts = [(n, kind) for n, c in module.named_children() if (kind := activation_kind(c))]
        if not acts or not _holds_only_linear_layers(module):
            continue
        (activation_name, kind), *more = acts
        reason = f"it has {len(acts)} activation modules" if more else None
        if not reason and kind not in ACTIVATIONS:
            reason = f"its activation {kind} is none of {', '.join(ACTIVATIONS)}"
        if not reason:
            result = probe(module, activation_name)
            if result == UNGATED:
                ungated.append(f"{name} ({type(module).__name__})")
                continue
            if isinstance(result, ProbedMLP):
                mlp = GatedMLP(
                    name=name,
                    module=module,
                    activation_name=activation_name,
                    activation=kind,
                    hidden_size=result.hidden_size,
                    intermediate_size=result.intermediate_size,
                    layout=result.layout,
                )
                # calibration could not tell which MLP the inputs of a shared activation belong to
                twin = next((other for other in mlps if other.dense_act is mlp.dense_act), None)
                if twin is None:
                    mlps.append(mlp)
                    continue
                result = f"it shares its activation module with {twin.name}"
            reason = result
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) cannot be made sparse: {reason}; "
            f"leave it out with exclude=[{name!r}] or a pattern"
        )
    if not mlps:
        hint = f"; ungated MLPs such as {ungated[0]} have no gate" if ungated else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} has no gated MLP of the form down(act(gate(x)) * up(x)) with "
            f"an activation module and linear layers{hint}"
        )
    return mlps


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
    """Whether it has two or more linear layers, or stacked ones, and no weights of another kind."""
    own = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
    if own:
        # stacked experts are candidates, so that the probe refuses them with a reason
        return sum(p.ndim == 3 for p in own) >= 2
    weights = [weight_of(c) for c in module.children()]
    others = [
        child
        for child, weight in zip(module.children(), weights, strict=True)
        if weight is None and any(p.ndim >= 2 for p in child.parameters())
    ]
    return sum(weight is not None for weight in weights) >= 2 and not others
