"""Find the gated MLPs of a model by their structure and a numerical probe."""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cats.errors import ConfigError, ShapeError, UnsupportedModelError
from cats.functional import ACTIVATIONS, cats_activation
from cats.placement import entries, has_weights, input_device, materialized

# Scales of the probe's inputs: some models clamp, and a clamp shows only far from zero.
_PROBE_SCALES = (0.01, 1.0, 30.0)
_PROBE_TOKENS = 4


class CatsActivation(nn.Module):
    """``cats_activation(act(x), threshold)`` in float32, in the place of an MLP's activation.

    Attributes:
        act: The activation that is thresholded.
        threshold: One number or ``[F]``, always float32, whatever the dtype of the model.
    """

    threshold: Tensor

    def __init__(self, act: nn.Module, threshold: Tensor, *, dense: nn.Module | None = None):
        super().__init__()
        self.act = act
        self._replaced = dense if dense is not act else None
        self._number: torch.Size | None = None  # the shape that widen_ found
        self.register_buffer("threshold", threshold.detach().clone().float())

    @property
    def dense(self) -> nn.Module:
        """What stood here before, and what ``densify_`` puts back."""
        return self.act if self._replaced is None else self._replaced

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return cats_activation(self.act(wide), self.threshold).to(x.dtype)

    def widen_(self, size: int) -> Tensor:
        """The threshold as ``[F]``, in place: what is written into it later is seen by its readers.

        Raises:
            ShapeError: If it has another number of entries.
        """
        threshold = self.threshold
        if threshold.shape != (size,):
            if threshold.numel() != 1:
                raise ShapeError(
                    f"expected one threshold or {size}, one for each neuron; "
                    f"got {list(threshold.shape)}"
                )
            self._number = threshold.shape
            self.threshold = threshold = threshold.detach().reshape(1).repeat(size)
        return threshold

    def narrow_(self) -> None:
        """Undo :meth:`widen_`, unless the neurons have got different thresholds."""
        threshold = self.threshold
        if self._number is not None and not threshold.is_meta and threshold.unique().numel() == 1:
            self.threshold = threshold[:1].clone().reshape(self._number)
        self._number = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CatsActivation:
        exact = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # it only moves: .half() would round it, and a rounded threshold drops other neurons;
        # to_empty() would leave anything
        if not exact.is_meta:
            self.threshold = exact.to(self.threshold.device)
        elif self.threshold.dtype != torch.float32:
            self.threshold = self.threshold.float()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        loaded = state_dict.get(f"{prefix}threshold")
        # one number and as many as there are neurons mean the same
        if isinstance(loaded, Tensor) and loaded.shape != self.threshold.shape and loaded.ndim < 2:
            if loaded.numel() == 1:
                state_dict[f"{prefix}threshold"] = loaded.reshape(1).expand(self.threshold.shape)
            elif self.threshold.numel() == 1:
                self.widen_(loaded.numel())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # a state dict may be assigned as it is
        if self.threshold.dtype != torch.float32 or not self.threshold.is_contiguous():
            self.threshold = self.threshold.float().contiguous()

    def extra_repr(self) -> str:
        if self.threshold.numel() == 1 and not self.threshold.is_meta:
            return f"threshold={self.threshold.item():.4g}"
        return f"threshold={list(self.threshold.shape)}"


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """One gated MLP: ``down(act(gate(x)) * up(x))``, or a form that vanishes with the activation.

    Attributes:
        name: Name of the module in the model, such as ``"model.layers.0.mlp"``.
        module: The MLP itself.
        activation_name: Name of its activation, such as ``"act_fn"``.
        activation: Which one it is: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        hidden_size: ``D``.
        intermediate_size: ``F``, the number of neurons.
    """

    name: str
    module: nn.Module
    activation_name: str
    activation: str
    hidden_size: int
    intermediate_size: int

    @property
    def act(self) -> nn.Module:
        """The activation module in place now."""
        act: nn.Module = getattr(self.module, self.activation_name)
        return act

    @property
    def dense_act(self) -> nn.Module:
        """The activation of the dense model."""
        return self.act.dense if isinstance(self.act, CatsActivation) else self.act

    def replace_act(self, act: nn.Module) -> None:
        """Put another activation module in place."""
        setattr(self.module, self.activation_name, act)

    def fingerprint(self) -> Tensor:
        """Some of the MLP's weights, ``[8]``, float32: the same in every dtype up to rounding.

        Raises:
            UnsupportedModelError: If the values of a weight cannot be read.
        """
        with materialized(self.module):
            picks = [
                entries(f"{self.name}.{name}", p)
                for name, p in self.module.named_parameters()
                if p.ndim >= 2
            ]
        return torch.stack(picks).sum(0)


def find_gated_mlps(
    model: nn.Module, *, exclude: Sequence[str] = (), names: Container[str] | None = None
) -> list[GatedMLP]:
    """The gated MLPs of a model, in its order.

    A module is a candidate if one of its children is an activation and the others that hold weights
    are linear layers. It is taken if a probe with small and large random inputs shows that the
    activation runs exactly once, that a zero activation gives a zero output (or the bias), and that
    the activation is multiplied with something that depends on the input. A candidate without that
    last property is an ungated MLP and is passed over.

    Args:
        model: Any module; weights on the ``meta`` device are probed with random values.
        exclude: Patterns of module names to leave out, such as ``["*vision*"]``; one may be given
            without a list.
        names: Look at the modules of these names only.

    Raises:
        UnsupportedModelError: If the model has no gated MLP, or if a candidate calls its activation
            in a way that CATS cannot use; the message names the module and the reason.
        ConfigError: If a pattern matches no MLP, or the patterns leave none.
    """
    exclude = [exclude] if isinstance(exclude, str) else exclude
    check_patterns(model, exclude)
    found: list[GatedMLP] = []
    passed_over = []
    for name, module in model.named_modules():
        if names is not None and name not in names:
            continue
        if _matches(name, exclude):
            continue
        acts = [(n, kind) for n, c in module.named_children() if (kind := activation_kind(c))]
        if not acts or not _holds_only_linear_layers(module):
            continue
        (activation_name, kind), *more = acts
        reason = f"it has {len(acts)} activation modules" if more else None
        if not reason and kind not in ACTIVATIONS:
            reason = f"its activation {kind} is none of {', '.join(ACTIVATIONS)}"
        if not reason:
            result = _probe(module, activation_name)
            if isinstance(result, tuple):
                mlp = GatedMLP(name, module, activation_name, kind, *result)
                # calibration could not tell whose values an activation sees
                twin = next((other for other in found if other.dense_act is mlp.dense_act), None)
                if twin is None:
                    found.append(mlp)
                    continue
                result = f"it shares its activation module with {twin.name}"
            reason = result
        if reason == _UNGATED:
            passed_over.append(f"{name} ({type(module).__name__})")
            continue
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) cannot be made sparse: {reason}; "
            f"leave it out with exclude=[{name!r}] or a pattern"
        )
    if not found:
        seen = f"; ungated MLPs such as {passed_over[0]} have no gate" if passed_over else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} has no gated MLP of the form down(act(gate(x)) * up(x)) with "
            f"an activation module and linear layers{seen}"
        )
    return found


def check_patterns(model: nn.Module, exclude: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: If a pattern matches no MLP of the model, gated or not, or if none is left.
    """
    if not exclude:
        return  # each activation is run to find the MLPs
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


def is_sparse(model: nn.Module) -> bool:
    """Whether thresholds are applied to some MLP."""
    return any(isinstance(module, CatsActivation) for module in model.modules())


_UNGATED = "ungated"


def activation_kind(module: nn.Module) -> str | None:
    """The name of an activation module, its class name if it is one we do not know, or None."""
    if isinstance(module, CatsActivation):
        return activation_kind(module.dense)
    is_leaf = not any(True for _ in module.children())
    if not is_leaf or any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    # dropout draws random numbers, which a search must not
    if isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
        return None
    grid = torch.linspace(-8, 8, 257, device="cpu")
    try:
        with evaluating(module), torch.no_grad():
            values = module(grid.clone())
    except Exception:  # whatever a foreign module raises here, it is no elementwise activation
        return None
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        return None
    for name, act in ACTIVATIONS.items():
        if torch.allclose(values, act(grid), atol=1e-5, rtol=1e-5):
            return name
    is_affine = torch.allclose(values.diff(n=2), torch.zeros(255), atol=1e-5)
    return None if is_affine else type(module).__name__


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    """``(in, out)`` of a linear layer of any library, or None."""
    for inward, outward in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(module, inward) and hasattr(module, outward):
            return getattr(module, inward), getattr(module, outward)
    return None


def _holds_only_linear_layers(module: nn.Module) -> bool:
    """Whether it has two or more linear layers, or stacked ones, and no weights of another kind."""
    own = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
    if own:
        # stacked experts: refused by the probe with a reason, rather than passed over in silence
        return sum(p.ndim == 3 for p in own) >= 2
    weighty = [c for c in module.children() if any(p.ndim >= 2 for p in c.parameters())]
    return len(weighty) >= 2 and all(_linear_size(c) for c in weighty)


def _probe(module: nn.Module, activation_name: str) -> tuple[int, int] | str:
    """``(D, F)`` of a gated MLP, or why it is none."""
    if any(p.ndim == 3 for p in module.parameters(recurse=False)):
        return "its experts are stacked in one tensor, which CATS does not support yet"
    if not has_weights(module):
        try:
            module = _with_random_weights(module)
        except (RuntimeError, TypeError) as error:
            return f"its weights are on meta and cannot be drawn at random ({error})"
    sizes = [size for c in module.children() if (size := _linear_size(c))]
    outputs = {outward for _, outward in sizes}
    # D enters gate and up and leaves down; F enters down only
    candidates = [d for d, _ in Counter(i for i, _ in sizes).most_common() if d in outputs]
    if not candidates:
        return "no linear layer gives back the size that another one takes"
    hidden_size = candidates[0]
    for x in _inputs(module, hidden_size):
        try:
            zero, calls, shapes = _run(module, activation_name, x, 0.0)
            one, _, _ = _run(module, activation_name, x, 1.0)
        except Exception as error:  # a foreign module: whatever it raises is the reason
            return f"it cannot be called with hidden states alone ({type(error).__name__}: {error})"
        if calls != 1:
            return f"its activation runs {calls} times in a forward pass, expected once"
        if not isinstance(zero, Tensor) or zero.shape != x.shape:
            return "it does not return one tensor of the shape of its input"
        if shapes[0][:2] != x.shape[:2]:
            return f"its activation sees the shape {list(shapes[0])}, expected [B, T, F]"
        spread_of_one = (one - one[:, :1]).abs().max()
        if (zero - zero[:, :1]).abs().max() > 1e-3 * max(spread_of_one, one.abs().max()):
            return "its output depends on the input even where its activation is zero"
        if spread_of_one <= 1e-6 * one.abs().max():
            return _UNGATED
    return hidden_size, int(shapes[0][-1])


def is_hooked(module: nn.Module) -> bool:
    """Whether a forward pass of the module itself runs hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let two modules have the same hooks, also those that are added or removed later."""
    for name, value in vars(source).items():
        # the second is what torch asks before it runs backward hooks
        if "_hooks" in name or name == "_is_full_backward_hook":
            vars(target)[name] = value


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each submodule is in the mode that it was in."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


def probe_inputs(mlp: GatedMLP) -> Iterator[Tensor]:
    """Random hidden states ``[1, T, D]`` of small, unit and large scale, the same at each call."""
    return _inputs(mlp.module, mlp.hidden_size)


def _inputs(module: nn.Module, hidden_size: int) -> Iterator[Tensor]:
    # the matrices of a quantised model may hold integers
    tensors = [p for p in module.parameters() if p.is_floating_point()]
    dtype = max(tensors, key=lambda t: t.ndim).dtype if tensors else torch.float32
    device = input_device(module)
    for scale in _PROBE_SCALES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, _PROBE_TOKENS, hidden_size, generator=generator) * scale
        yield x.to(device=device, dtype=dtype)


def _run(module: nn.Module, activation_name: str, x: Tensor, fill: float) -> tuple[Any, int, Any]:
    """Forward pass with the activation's output replaced by a constant."""
    shapes: list[torch.Size] = []

    def constant(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not args:
            raise TypeError("its activation is called with a keyword argument")
        shapes.append(args[0].shape)
        return torch.full_like(output, fill)

    handle = getattr(module, activation_name).register_forward_hook(constant)
    try:
        with evaluating(module), torch.no_grad():
            return module(x), len(shapes), shapes
    finally:
        handle.remove()


def _with_random_weights(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if not parameter.is_floating_point():
                parameter.random_(1, 100, generator=generator)
                continue
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return twin
