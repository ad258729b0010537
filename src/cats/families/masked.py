"""Thresholds and gates of a plain model, found independently of ``cats.model``.

What is here knows neither the probe nor the classes of :mod:`cats`: it is what a sparse model is
compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that multiply by a matrix, give the same numbers in another form, and activate.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm", "grouped_mm_fallback"}
_FORMS = {
    *("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose"),
    *("t", "split", "split_with_sizes", "slice", "select", "chunk", "unbind", "index", "clone"),
    *("clamp", "clamp_max", "clamp_min", "_to_copy", "contiguous", "alias", "detach", "copy_"),
}
_ACTIVATIONS = {"silu", "gelu", "relu"}
_FUNCTIONS = {F.silu, F.gelu, F.relu, torch.relu}


@contextmanager
def masked(model: nn.Module, thresholds: Mapping[str, Tensor]) -> Iterator[set[int]]:
    """Within the block, activations smaller than the threshold of their module are zero.

    Args:
        model: A dense model.
        thresholds: Name of each module that holds an activation to one number.

    Yields:
        Numbers of the activations' outputs, as :class:`Gates` numbers them.
    """
    covered: set[int] = set()
    with ExitStack() as stack:
        for name, threshold in thresholds.items():
            module = model.get_submodule(name)
            drop = _dropper(float(threshold), covered)
            children = [child for child in module.children() if _is_activation(child)]
            if children:
                handle = children[0].register_forward_hook(lambda m, a, out, drop=drop: drop(out))
                stack.callback(handle.remove)
                continue
            # the activation is a function that the forward pass calls
            forward = module.forward

            def masked_forward(
                *args: Any,
                forward: Callable[..., Any] = forward,
                drop: Callable[[Tensor], Tensor] = drop,
                **named: Any,
            ) -> Any:
                with _Functions(drop):
                    return forward(*args, **named)

            module.forward = masked_forward
            stack.callback(vars(module).__delitem__, "forward")
        yield covered


def _dropper(threshold: float, covered: set[int]) -> Callable[[Tensor], Tensor]:
    def drop(a: Tensor) -> Tensor:
        gates = Gates.running
        if gates is not None:
            covered.add(gates.number_of(a))
            return a
        return torch.where(a.abs() >= threshold, a, torch.zeros_like(a))

    return drop


def _is_activation(module: nn.Module) -> bool:
    origin = type(module).__module__
    return origin in ("transformers.activations", "torch.nn.modules.activation")


class _Functions(TorchFunctionMode):
    """Changes what the activation functions of torch give."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return self._change(output) if func in _FUNCTIONS else output


class Gates(TorchDispatchMode):
    """Finds gates in the operators of a forward pass: activations of a product by a matrix that
    are multiplied with another product, whatever the modules are called.

    Attributes:
        found: The numbers of these activations.
    """

    running: Gates | None = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[int] = set()
        # what a tensor is; it is kept alive, since another could get its number
        self._kinds: dict[int, tuple[str, int, Tensor]] = {}
        self._count = 0

    def __enter__(self) -> Gates:
        Gates.running = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        Gates.running = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def number_of(self, activated: Tensor) -> int:
        """The number of the activation that gave a tensor; -1 for others."""
        kind, number, _ = self._kinds.get(id(activated), ("", -1, None))
        return number if kind == "activated" else -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operator = func.overloadpacket.__name__
        inputs = [self._kinds.get(id(a)) for a in args if isinstance(a, Tensor)]
        kind = self._kind(operator, inputs, args, output)
        if kind is not None:
            for tensor in output if isinstance(output, list | tuple) else (output,):
                self._kinds[id(tensor)] = (*kind, tensor)
        return output

    def _kind(
        self, operator: str, inputs: list[Any], args: Any, output: Any
    ) -> tuple[str, int] | None:
        if operator in _PRODUCTS:
            return "product", -1
        known = [k for k in inputs if k is not None]
        if not known:
            return None
        first = known[0]
        if operator in _FORMS and inputs[0] is not None:
            return first[0], first[1]
        if operator in ("add", "add_", "mul", "mul_") and len(inputs) == 1:
            return first[0], first[1]
        if operator in ("add", "add_") and first[0] == "product" and len(known) == 1:
            # a bias
            return ("product", -1) if args[1].ndim == 1 else None
        if operator in _ACTIVATIONS and first[0] == "product":
            self._count += 1
            return "activated", self._count
        if operator == "sigmoid" and first[0] == "product":
            return "sigmoid", -1
        if operator in ("mul", "mul_") and len(known) == 2:
            kinds = {k[0]: k[1] for k in known}
            if kinds.keys() == {"sigmoid", "product"} and args[0].shape == args[1].shape:
                self._count += 1
                return "activated", self._count
            if kinds.keys() == {"activated", "product"} and args[0].shape == args[1].shape:
                self.found.add(kinds["activated"])
        if operator == "pow" and first[0] == "activated":
            return first[0], first[1]
        return None
