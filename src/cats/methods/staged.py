"""Methods of several masks: inputs of gate and up, rows of the second matrix, columns of down."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cats.functional import ACTIVATIONS, keep_mask
from cats.methods.base import Method
from cats.model import GatedMLP

# What a mask drops: inputs of gate or up, rows of up (by what gate gave), columns of down.
Stage = Literal["gate", "up", "rows", "columns"]


class Sample:
    """Inputs of one dense MLP, and what it computes from them, in float32.

    Attributes:
        x: ``[N, D]``.
        gate: ``[F, D]``.
        up: ``[F, D]``.
        down: ``[D, F]``.
        gate_output: ``act(gate(x))``, ``[N, F]``.
        up_output: ``up(x)``, ``[N, F]``.
    """

    def __init__(self, mlp: GatedMLP, x: Tensor) -> None:
        """
        Raises:
            UnsupportedModelError: If gate, up and down cannot be told apart.
        """
        gate, up, down = mlp.gate, mlp.up, mlp.down
        parts = (gate.matrix.dequantised().float() for gate in (gate, up, down))
        self.gate, self.up, self.down = parts
        self._gate_bias, self._up_bias = (
            None if p.bias is None else p.bias.float() for p in (gate, up)
        )
        self._act = ACTIVATIONS[mlp.activation]
        self.x = x.to(self.gate.device, torch.float32)

    def gated(self, x: Tensor) -> Tensor:
        """``act(gate(x))``, ``[N, F]``."""
        return self._act(F.linear(x, self.gate, self._gate_bias))

    def upped(self, x: Tensor) -> Tensor:
        """``up(x)``, ``[N, F]``."""
        return F.linear(x, self.up, self._up_bias)

    @cached_property
    def gate_output(self) -> Tensor:
        return self.gated(self.x)

    @cached_property
    def up_output(self) -> Tensor:
        return self.upped(self.x)

    @cached_property
    def up_rms(self) -> Tensor:
        """Root mean square of what up gives, ``[F]``."""
        return self.up_output.square().mean(0).sqrt()

    @cached_property
    def gate_norms(self) -> Tensor:
        """Norm of each column of gate, ``[D]``."""
        return _column_norms(self.gate)

    @cached_property
    def down_norms(self) -> Tensor:
        """Norm of each column of down, ``[F]``."""
        return _column_norms(self.down)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The thresholds of one MLP, and what they do to the tokens of a sample.

    Attributes:
        threshold: ``[F]``, compared with the activated gate.
        inputs: ``"gate"``, ``"up"`` and ``"down"`` to the thresholds of its inputs.
        read: ``"gate"``, ``"up"`` and ``"down"`` to the share of the matrix that a token reads.
        products: What down gets, ``[N, F]``.
    """

    threshold: Tensor
    inputs: dict[str, Tensor]
    read: dict[str, float]
    products: Tensor


class StagedMethod(Method):
    """A method whose masks follow each other: each one sees what those before it have dropped.

    An entry of a mask is dropped where its size times a factor is below a threshold of the layer.
    What is stored and compared is this threshold, divided by the factor.

    Attributes:
        stages: Its masks, in the order of the forward pass.
    """

    stages: ClassVar[tuple[Stage, ...]]

    @abstractmethod
    def factor(self, stage: Stage, sample: Sample) -> Tensor | None:
        """By what the size of each input or neuron is multiplied; None for 1.

        Returns:
            ``[D]`` for ``"gate"`` and ``"up"``, ``[F]`` for ``"rows"`` and ``"columns"``.
        """

    def apply_(self, mlp: GatedMLP, tensors: dict[str, Tensor]) -> None:
        self._threshold_on(mlp, mlp.dense_act, tensors["threshold"])

    def record(self, sample: Sample, dropped: Mapping[Stage, float]) -> Record:
        """Thresholds that drop these shares of the entries of each mask on the sample.

        Args:
            sample: Of one MLP.
            dropped: Share of each of :attr:`stages`. Neurons that ``"rows"`` drops count among the
                ``"columns"``.
        """
        x = sample.x
        inputs: dict[str, Tensor] = {}
        read = {"gate": 1.0, "up": 1.0, "down": 1.0}
        masked = {}
        for branch in ("gate", "up"):
            masked[branch] = x
            if branch in self.stages:
                threshold = self._threshold(branch, sample, x, dropped)
                kept = keep_mask(x, threshold)
                inputs[branch], read[branch] = threshold, float(kept.float().mean())
                masked[branch] = torch.where(kept, x, 0)
        a = sample.gate_output if "gate" not in inputs else sample.gated(masked["gate"])
        u = sample.up_output if "up" not in inputs else sample.upped(masked["up"])
        rows = torch.zeros(a.shape[1], device=a.device)
        products = a * u
        if "rows" in self.stages:
            rows = self._threshold("rows", sample, a, dropped)
            kept = keep_mask(a, rows)
            read["up"] *= float(kept.float().mean())
            products = torch.where(kept, products, 0)
        if "columns" in self.stages:
            columns = inputs["down"] = self._threshold("columns", sample, products, dropped)
            products = torch.where(keep_mask(products, columns), products, 0)
        read["down"] = float((products != 0).float().mean())
        return Record(threshold=rows, inputs=inputs, read=read, products=products)

    def _threshold(
        self, stage: Stage, sample: Sample, values: Tensor, dropped: Mapping[Stage, float]
    ) -> Tensor:
        factor = self.factor(stage, sample)
        scores = values.abs() if factor is None else values.abs() * factor
        threshold = quantile(scores, dropped.get(stage, 0.0))
        if factor is None:
            return threshold.expand(values.shape[1]).contiguous()
        # a neuron that never adds anything is dropped, unless nothing is
        return torch.nan_to_num(threshold / factor, nan=0.0)


def _column_norms(matrix: Tensor) -> Tensor:
    return matrix.square().sum(0).sqrt()


def quantile(scores: Tensor, share: float) -> Tensor:
    """A number with this share of the scores below it; 0 for none."""
    count = int(share * scores.numel())
    if count < 1:
        return torch.zeros((), device=scores.device)
    return scores.flatten().kthvalue(min(count + 1, scores.numel())).values
