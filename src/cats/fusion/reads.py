"""How much of each matrix of a sparse model the tokens of a pass read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn

from cats.errors import DataError, UnsupportedModelError
from cats.fusion.model import fused_mlps
from cats.model import (
    CatsActivation,
    GatedExperts,
    GatedMLP,
    Routes,
    find_gated_mlps,
    watched_routes,
)
from cats.model.routes import calling_activation, own_rows
from cats.processes import in_order
from cats.weights import InputMask
from cats.weights.placement import check_has_weights


class ReadShares:
    """Counts how much of each matrix is read while its hooks are on a sparse model.

    A row of up is read where the activation is not zero, and a column of a matrix where its input
    is not.

    Attributes:
        mask: As that of :class:`DroppedNeurons`.
    """

    def __init__(self, model: nn.Module, *, together: Sequence[int] = (1,)) -> None:
        """
        Args:
            model: A sparse model.
            together: Numbers of rows of a batch that are decoded together: what one of them keeps
                is read. Rows that fill no such group are left out.
        """
        check_has_weights(model)
        self._together = together
        modules = dict(model.named_modules())
        sparse = {
            name.rpartition(".")[0] for name, m in modules.items() if isinstance(m, CatsActivation)
        }
        if not sparse:
            raise UnsupportedModelError(
                "the model is dense: apply thresholds with cats.sparsify_ first"
            )
        self._mlps = find_gated_mlps(model, names=sparse)
        inside = {f"{mlp.name}.{layer}" for mlp in self._mlps for layer in mlp.matrices}
        self._others = {
            n: m for n, m in modules.items() if isinstance(m, InputMask) and n not in inside
        }
        self._fused = dict(fused_mlps(model))
        self.mask: Tensor | None = None
        # rows together, and name of a module, to the entries that are not zero, and all of them
        self._kept: dict[tuple[int, str], tuple[Tensor | int, int]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ReadShares:
        for name, layer in self._others.items():
            self._stack.callback(layer.register_forward_pre_hook(self._inputs(name)).remove)
        for mlp in self._mlps:
            if mlp.name in self._fused:
                # the operator does not run the layers: the MLP that it replaced does
                hook = partial(self._run_original, mlp)
                module = self._fused[mlp.name]
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                self._stack.callback(handle.remove)
            else:
                self._stack.enter_context(self._hooked(mlp))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def mlps(self) -> list[str]:
        """Names of the sparse MLPs."""
        return [mlp.name for mlp in self._mlps]

    @property
    def experts(self) -> list[str]:
        """Names of those that are stacked experts."""
        return [mlp.name for mlp in self._mlps if isinstance(mlp, GatedExperts)]

    def clear(self) -> None:
        """Forget what was counted."""
        self._kept.clear()

    def add_processes(self) -> None:
        """Add what the other processes of the ``torch.distributed`` group have counted."""
        # one piece of work per process
        parts = in_order([{key: (int(kept), n) for key, (kept, n) in self._kept.items()}])
        self._kept = {}
        for part in parts:
            for key, (kept, total) in part.items():
                before, number = self._kept.get(key, (0, 0))
                self._kept[key] = before + kept, number + total

    def shares(self, together: int = 1) -> dict[str, float]:
        """Name of each linear layer that is not read whole to the share of its matrix.

        Stacked experts stand under the name of their module, with the share of those that a token
        is routed to; what several rows read of them together is not counted.
        """
        if not self._kept:
            raise DataError("no tokens to count what is read")
        shares = {name: self._share(name, together) for name in sorted(self._others)}
        for mlp in self._mlps:
            shares |= self._of_mlp(mlp, together)
        return shares

    def by_kind(self, together: int) -> dict[str, float]:
        """Kind of mask, of those that the model has, to the mean share of entries that are kept."""
        kinds: dict[str, list[str]] = {"inputs of attention": sorted(self._others)}
        for mlp in self._mlps:
            if (together, mlp.name) in self._kept:
                kinds.setdefault("rows of up", []).append(mlp.name)
            if mlp.layout is None:
                continue
            kinds.setdefault("columns of down", []).append(f"{mlp.name}.{mlp.layout.down}")
            for part in ("gate", "up"):
                layer = getattr(mlp.layout, part)
                if isinstance(mlp.module.get_submodule(layer), InputMask):
                    kinds.setdefault(f"inputs of {part}", []).append(f"{mlp.name}.{layer}")
        return {
            kind: fmean(self._share(name, together) for name in names)
            for kind, names in kinds.items()
            if names and (together, names[0]) in self._kept
        }

    def _of_mlp(self, mlp: GatedMLP, together: int) -> dict[str, float]:
        rows = self._share(mlp.name, together)
        if isinstance(mlp, GatedExperts):
            return {mlp.name: mlp.bytes_read(1 - rows) / mlp.bytes}
        if mlp.layout is None:
            share = mlp.bytes_read(1 - rows) / mlp.bytes
            return {f"{mlp.name}.{layer}": share for layer in mlp.matrices}
        gate, up, down = (
            f"{mlp.name}.{layer}" for layer in (mlp.layout.gate, mlp.layout.up, mlp.layout.down)
        )
        router = "gate" if not isinstance(mlp.act, CatsActivation) else mlp.act.router
        of_gate, of_up = (1.0, rows) if router == "gate" else (rows, 1.0)
        if gate == up:
            both = (of_gate + of_up) / 2 * self._share(gate, together)
            return {gate: both, down: self._share(down, together)}
        of_gate, of_up = of_gate * self._share(gate, together), of_up * self._share(up, together)
        return {gate: of_gate, up: of_up, down: self._share(down, together)}

    def _share(self, name: str, together: int) -> float:
        """Share of the entries that are not zero; 1 where nothing is dropped."""
        kept, total = self._kept.get((together, name), (1, 1))
        return float(kept) / total

    @contextmanager
    def _hooked(self, mlp: GatedMLP) -> Iterator[None]:
        """Hooks on the layers of an MLP: on down, on those that drop inputs, on the activation."""
        down = None if mlp.layout is None else mlp.layout.down
        with ExitStack() as stack:
            if isinstance(mlp, GatedExperts):
                stack.enter_context(calling_activation(mlp.module))
                routes = stack.enter_context(watched_routes(mlp.module))
                count_rows = partial(self._count_experts, mlp.name, routes)
                stack.callback(mlp.act.register_forward_hook(count_rows).remove)
                yield
                return
            for name in mlp.matrices:
                layer = mlp.module.get_submodule(name)
                if name == down or isinstance(layer, InputMask):
                    hook = self._inputs(f"{mlp.name}.{name}")
                    stack.callback(layer.register_forward_pre_hook(hook).remove)

            def count(_: nn.Module, __: object, output: Tensor) -> None:
                self.count(mlp.name, output)

            stack.callback(mlp.act.register_forward_hook(count).remove)
            yield

    def _run_original(
        self, mlp: GatedMLP, _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        with self._hooked(mlp), torch.no_grad():
            mlp.module.forward(*args, *named.values())

    def _inputs(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: self.count(name, args[0])

    def count(self, name: str, values: Tensor) -> None:
        """Take the entries of a mask in one pass, ``[..., N]``; zeros are dropped."""
        for rows in self._together:
            kept = values != 0
            if rows > 1:
                kept = kept[: len(kept) // rows * rows].unflatten(0, (-1, rows)).any(1)
            if self.mask is not None:
                kept = kept[self.mask.to(kept.device)]
            self._add(rows, name, kept)

    def _count_experts(
        self, name: str, routes: Routes, _: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        # rows are in the order of experts: those that are decoded together are not told apart
        if output.numel():
            self._add(1, name, output[own_rows(routes, args[0], self.mask)] != 0)

    def _add(self, rows: int, name: str, kept: Tensor) -> None:
        if kept.numel():
            before, total = self._kept.get((rows, name), (0, 0))
            self._kept[rows, name] = before + kept.sum(), total + kept.numel()
