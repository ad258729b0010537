"""GPTQ of a model: one decoder layer after the other, on what the quantised ones before it give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cats.errors import DataError, UnsupportedModelError
from cats.model.modules import evaluating
from cats.quantisation.gptq import gptq_rounded
from cats.quantisation.rounding import replace_, round_head_, rounded
from cats.quantisation.selection import decoder_layers, select
from cats.undo import unchanged_on_error

Model = TypeVar("Model", bound=nn.Module)


def gptq_(
    model: Model,
    blocks: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    head: bool = False,
    exclude: Sequence[str] = (),
    on_layer: Callable[[], None] = lambda: None,
) -> Model:
    """Quantise the linear layers of a model's decoder with GPTQ, in place.

    Each decoder layer runs twice over all blocks: with its own weights, to sum the inputs of its
    linear layers, and with the codes, for the inputs of the next layer. Both run in float32, on a
    copy of this layer, and nothing is drawn at random. A call that fails leaves the model as it
    was.

    Args:
        model: A Hugging Face causal model with ordinary weights, on one device.
        blocks: Token ids ``[N, T]`` to calibrate on.
        bits: As for :func:`cats.quantisation.quantise_`, as are the other options.
        group_size: The same.
        head: The same. The head is rounded to the nearest code.
        exclude: The same.
        on_layer: Called after each decoder layer.

    Raises:
        ConfigError: If an option is not possible.
        UnsupportedModelError: If the model is quantised, sparse or fused, has other layers, or does
            not run its layers one after the other.
        DataError: If there are no tokens, or inputs are NaN.

    Source: arXiv:2210.17323.
    """
    selection = select(model, bits=bits, group_size=group_size, head=head, exclude=exclude)
    if not blocks.numel():
        raise DataError("no tokens to calibrate on")
    prefix, layers = decoder_layers(model)
    with unchanged_on_error(model), evaluating(model), torch.no_grad():
        states, calls = _first_states(model, layers, blocks)
        for i, layer in enumerate(layers):
            own = {
                name.removeprefix(f"{prefix}.{i}."): linear
                for name, linear in selection.layers.items()
                if name.startswith(f"{prefix}.{i}.")
            }
            # 16-bit products are slow on most CPUs, and their rounding would be in the sums
            working = copy.deepcopy(layer).float()
            hessians = _hessians(working, own, states, calls[i])
            for name, linear in own.items():
                options: Any = {"bits": bits, "group_size": selection.group_size}
                if name in hessians:
                    weight = gptq_rounded(linear.weight, hessians[name], **options)
                else:
                    weight = rounded(linear.weight, **options)
                replace_(model, f"{prefix}.{i}.{name}", linear, weight)
                cast(nn.Linear, working.get_submodule(name)).weight.copy_(weight.dequantised())
            if i + 1 < len(layers):
                states = [_output(working, state, calls[i]) for state in states]
            on_layer()
        round_head_(model, selection.head)
    return model


# The arguments of a decoder layer after the first, and those by name.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _ReachedError(Exception):
    """The first layer was reached."""


def _first_states(
    model: nn.Module, layers: nn.ModuleList, blocks: Tensor
) -> tuple[list[Tensor], list[_Call]]:
    """Inputs of the first layer, one for each block, and what each layer takes beside them.

    Raises:
        UnsupportedModelError: If a layer takes more than the layer before gives and what is the
            same for all blocks, so that layers cannot run one by one.
        DataError: If an output is NaN or infinite.
    """
    device = next(model.parameters()).device
    if len({p.device for p in model.parameters()}) > 1:
        raise UnsupportedModelError("the model is on several devices: load it on one for GPTQ")
    calls = _calls_of(model, layers, blocks[0].to(device))
    if not _same(calls, _calls_of(model, layers, blocks[-1].to(device))):
        raise _other_order(model)
    states: list[Tensor] = []

    def keep(x: Tensor, call: _Call) -> None:
        states.append(x.float())
        raise _ReachedError

    with _hooked(layers[:1], keep):
        for block in blocks:
            try:
                _run(model, block[None].to(device))
            except _ReachedError:
                continue
    return states, [cast(_Call, _mapped(call, _wide)) for call in calls]


def _calls_of(model: nn.Module, layers: nn.ModuleList, block: Tensor) -> list[_Call]:
    """What each layer takes beside the output of the layer before."""
    seen: list[tuple[Tensor, _Call]] = []
    outputs: list[Any] = []
    with _hooked(layers, lambda x, call: seen.append((x, call)), outputs.append):
        _run(model, block[None])
    if outputs and not torch.isfinite(_first(outputs[-1])).all():
        raise DataError("the model's layers give NaN or infinity: check its weights and dtype")
    if len(seen) != len(layers) or not all(
        torch.equal(_first(output), x) for output, (x, _) in zip(outputs, seen[1:], strict=False)
    ):
        raise _other_order(model)
    return [call for _, call in seen]


def _other_order(model: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} does not run its layers one after the other on the same "
        "arguments, which GPTQ needs: use the method rtn"
    )


@contextmanager
def _hooked(
    layers: Sequence[nn.Module] | nn.ModuleList,
    before: Callable[[Tensor, _Call], None],
    after: Callable[[Any], None] | None = None,
) -> Iterator[None]:
    """Call ``before`` with the arguments of each layer, and ``after`` with its output."""

    def enter(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if args:
            before(args[0], (args[1:], named))
        else:
            rest = {name: value for name, value in named.items() if name != "hidden_states"}
            before(named["hidden_states"], ((), rest))

    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(handle.remove)
            if after is not None:
                handle = layer.register_forward_hook(lambda m, args, output: after(output))
                stack.callback(handle.remove)
        yield


def _run(model: nn.Module, ids: Tensor) -> None:
    """Forward pass without the output head."""
    body: Any = getattr(model, "base_model", model)
    body(input_ids=ids, use_cache=False)


def _hessians(
    layer: nn.Module, names: Iterable[str], states: list[Tensor], call: _Call
) -> dict[str, Tensor]:
    """``X^T X`` of the inputs of some linear layers; layers with the same inputs share it."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:

            def see(m: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                inputs.setdefault(name, args[0])

            handle = layer.get_submodule(name).register_forward_pre_hook(see)
            stack.callback(handle.remove)
        _output(layer, states[0], call)
    leaders = {n: next(m for m in inputs if inputs[m] is x) for n, x in inputs.items()}
    sums = {
        name: torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        for name, x in inputs.items()
        if leaders[name] == name
    }
    with ExitStack() as stack:
        for name, total in sums.items():

            def add(m: nn.Module, args: tuple[Tensor], total: Tensor = total) -> None:
                x = args[0].flatten(0, -2)
                total.addmm_(x.t(), x)

            handle = layer.get_submodule(name).register_forward_pre_hook(add)
            stack.callback(handle.remove)
        for state in states:
            _output(layer, state, call)
    return {name: sums[leader] for name, leader in leaders.items()}


def _output(layer: nn.Module, state: Tensor, call: _Call) -> Tensor:
    args, named = call
    return _first(layer(state, *args, **named))


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _same(a: Any, b: Any) -> bool:
    """Whether two nested values hold the same tensors; other objects are not compared."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b)
