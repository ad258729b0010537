"""Inputs and tolerances for the tests of all backends of ``cats::gated_mlp``."""

import dataclasses
import importlib
import importlib.util
import re

import pytest
import torch
from torch import Tensor

from cats import ops
from cats.errors import BackendError
from cats.functional import ACTIVATIONS, keep_mask
from cats.ops import cpu

# For a backend that sums in float32 and rounds once, at the end.
TOLERANCE = {
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.float16: dict(rtol=2e-3, atol=1e-4),
    torch.bfloat16: dict(rtol=1e-2, atol=1e-4),
}
# For `dense`, which rounds gate, up and their product as the unfused model does.
DENSE_TOLERANCE = {
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.float16: dict(rtol=2e-3, atol=5e-3),
    torch.bfloat16: dict(rtol=1e-2, atol=4e-2),
}
# How far from its threshold a value must be, so that no backend's rounding decides whether it is
# kept.
BAND = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = [pytest.param(t, id=str(t).removeprefix("torch.")) for t in TOLERANCE]

# (D, F), hidden size first as in the names of models.
TINY_SHAPES = [(1, 1), (3, 1), (1, 5), (37, 61), (64, 96), (131, 257)]
SMALL_SHAPES = [(576, 1536), (640, 2048), (896, 4864)]
LARGE_SHAPES = [(1536, 8960), (2048, 8192), (4096, 11008), (4096, 14336), (8192, 28672)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The arguments of :func:`cats.ops.gated_mlp`, in its order."""

    x: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    thresholds: Tensor
    activation: str = "silu"
    router: str = "gate"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    product_thresholds: Tensor | None = None
    input_thresholds: Tensor | None = None

    def args(self) -> tuple[Tensor | str | None, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def kwargs(self) -> dict[str, Tensor | str | None]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def double(self) -> "Inputs":
        """The same values in float64; thresholds stay float32, as the operator takes them."""
        wide = {
            name: getattr(self, name).double()
            for name in ("x", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")
            if getattr(self, name) is not None
        }
        return self.replace(**wide)

    def replace(self, **changes: Tensor | str | None) -> "Inputs":
        return dataclasses.replace(self, **changes)


def make_inputs(
    D: int,
    F: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
    sparsity: float = 0.5,
    per_neuron: bool = False,
    product_sparsity: float | None = None,
    input_sparsity: float | None = None,
    bias: bool = False,
    activation: str = "silu",
    router: str = "gate",
    separate: bool = True,
) -> Inputs:
    """Random inputs, scaled so that gate, up and output have about unit variance.

    Args:
        sparsity: Share of neurons that a token drops: 0 keeps all, 1 has infinite thresholds.
        per_neuron: Thresholds differ by up to a half between neurons.
        product_sparsity: Share of kept products dropped by ``product_thresholds``; None has none.
        input_sparsity: Share of the entries of ``x`` that the router drops; its columns are
            contiguous then. None drops none.
        separate: Move thresholds away from every value (:data:`BAND`), so that all backends keep
            the same neurons.
    """

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).mul_(scale)

    inputs = Inputs(
        x=normal(batch, D),
        gate=normal(F, D, scale=D**-0.5),
        up=normal(F, D, scale=D**-0.5),
        down=normal(F, D, scale=(0.36 * F) ** -0.5).t(),
        thresholds=torch.zeros(F, device=device),
        activation=activation,
        router=router,
        gate_bias=normal(F, scale=0.5) if bias else None,
        up_bias=normal(F, scale=0.5) if bias else None,
        down_bias=normal(D) if bias else None,
    )
    if input_sparsity is not None:
        masks = thresholds_at(inputs.x.double(), input_sparsity, per_neuron=True, band=0)
        columns = getattr(inputs, router).t().contiguous().t()
        inputs = inputs.replace(input_thresholds=masks, **{router: columns})
    band = BAND[dtype] if separate else 0
    routed = router_output(inputs)
    thresholds = thresholds_at(routed, sparsity, per_neuron=per_neuron, band=band)
    inputs = inputs.replace(thresholds=thresholds)
    if product_sparsity is not None:
        products = thresholds_at(product(inputs), product_sparsity, per_neuron=True, band=band)
        inputs = inputs.replace(product_thresholds=products)
    return inputs


def thresholds_at(values: Tensor, sparsity: float, *, per_neuron: bool, band: float) -> Tensor:
    """Thresholds ``[F]``, float32, below which a share of the nonzero ``abs(values)`` lies.

    Args:
        values: ``[B, F]``, float64.
        band: Least distance of every value from its threshold.
    """
    f = values.shape[1]
    if sparsity in (0, 1):
        return torch.full((f,), torch.inf if sparsity else 0.0, device=values.device)
    size = values.abs()
    # not torch.quantile, which stops at 2**24 elements, nor kthvalue, which is not deterministic
    ordered = size[size > 0].sort().values
    nominal = ordered[int(sparsity * len(ordered))] if len(ordered) else size.new_zeros(())
    spread = torch.rand(f, device=values.device) + 0.5 if per_neuron else 1
    thresholds = (nominal * spread).expand(f).clone()
    step = 0.7 * band
    while (close := ((size - thresholds).abs() < band).any(0)).any() and band:
        thresholds[close] += step
    return thresholds.float()


def router_output(inputs: Inputs) -> Tensor:
    """What is compared with the thresholds, in float64, ``[B, F]``."""
    gate, up = _branches(inputs)
    return gate if inputs.router == "gate" else up


def product(inputs: Inputs) -> Tensor:
    """``act(g) * u`` of the neurons that the router keeps, 0 elsewhere, in float64, ``[B, F]``."""
    gate, up = _branches(inputs)
    routed = gate if inputs.router == "gate" else up
    return torch.where(keep_mask(routed, inputs.thresholds), gate * up, 0)


def _branches(inputs: Inputs) -> tuple[Tensor, Tensor]:
    wide = inputs.double()
    linear = torch.nn.functional.linear
    kept = wide.x
    if inputs.input_thresholds is not None:
        kept = torch.where(keep_mask(inputs.x, inputs.input_thresholds), kept, 0)
    x = {inputs.router: kept}
    gate = linear(x.get("gate", wide.x), wide.gate, wide.gate_bias)
    return ACTIVATIONS[inputs.activation](gate), linear(x.get("up", wide.x), wide.up, wide.up_bias)


class RefusedError(Exception):
    """A backend refuses a call with the right error. The test ends there, and passes."""


def run(backend: str, inputs: Inputs) -> Tensor:
    """The output of one backend.

    Raises:
        RefusedError: If it refuses the call, see :func:`check_taken`.
    """
    check_taken(backend, inputs)
    return torch.ops.cats.gated_mlp(*inputs.args(), backend)


def check_taken(backend: str, inputs: Inputs) -> None:
    """Check that a call which the backend refuses is an error with the reason.

    Raises:
        RefusedError: If the backend refuses the call; conftest.py ends the test.
    """
    module = importlib.import_module(f"cats.ops.mlp.{backend}")
    if reason := module.refuses(ops.GatedMLPArguments(*inputs.args())):
        with pytest.raises(BackendError, match=re.escape(reason)):
            ops.gated_mlp(**inputs.kwargs(), backend=backend)
        raise RefusedError(reason)


def skip_unavailable(backend: str) -> None:
    if (state := ops.backends()[backend]) != "live":
        pytest.skip(f"{backend}: {state}")


def tolerance(backend: str, dtype: torch.dtype) -> dict[str, float]:
    return (DENSE_TOLERANCE if backend == "dense" else TOLERANCE)[dtype]


def assert_matches(backend: str, inputs: Inputs, *, equal_nan: bool = False) -> None:
    """The backend agrees with the reference and with float64."""
    actual = run(backend, inputs)
    assert actual.dtype == inputs.x.dtype
    expected = torch.ops.cats.gated_mlp(*inputs.args(), "reference")
    close = tolerance(backend, inputs.x.dtype)
    torch.testing.assert_close(actual, expected, equal_nan=equal_nan, **close)
    exact = reference_in_double(inputs)
    torch.testing.assert_close(actual.double(), exact, equal_nan=equal_nan, **close)


def reference_in_double(inputs: Inputs) -> Tensor:
    """The definition in float64, ``[B, D]``; the operator itself takes no float64."""
    from cats.ops.mlp import reference

    return reference.gated_mlp(ops.GatedMLPArguments(*inputs.double().args()))


needs_cpu_kernels = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"the CPU kernels are not there: {cpu.unavailable()}"
)

try:
    _HAS_NVRTC = importlib.util.find_spec("cuda.bindings.nvrtc") is not None
except ModuleNotFoundError:
    _HAS_NVRTC = False
needs_nvrtc = pytest.mark.skipif(not _HAS_NVRTC, reason="cuda-bindings is not installed")
