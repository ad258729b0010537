"""How far each layer can skip its weights, step by step, and the best split at a share of bytes.

A path of a layer starts dense. Each step drops a further piece of one mask: the one that adds least
error per byte (the greedy search of TEAL, arXiv:2408.14690, here over all kinds of masks). The
error is that of the layer's output on the samples, weighted as :mod:`cats.calibration.samples`
says, so that errors of different layers can be compared. At a share of bytes, layers go along their
paths in the order of error per byte. One search serves every share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cats.calibration.samples import Samples
from cats.config import CatsConfig, check_target
from cats.errors import ConfigError, DataError, FormatError
from cats.functional import keep_mask
from cats.methods import StagedMethod, get_method
from cats.methods.staged import Sample, Stage, quantile
from cats.model import GatedMLP, find_gated_mlps
from cats.weights import weight_of

# Share of the entries of a mask that one step drops, and the largest share.
_STEP = 0.1
_LARGEST = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """How much of a layer is dropped at one step of its path.

    Attributes:
        dropped: Share of the entries of each mask; of a linear layer, of ``"inputs"``.
        bytes: Bytes that a token reads of the layer's matrices.
        error: Weighted squared error of the layer's output, summed over the tokens.
    """

    dropped: dict[str, float]
    bytes: float
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Paths:
    """The path of every layer, for one method.

    Attributes:
        method: Name of the method.
        points: Name of an MLP or linear layer to its path, dense first.
    """

    method: str
    points: dict[str, list[Point]]

    @classmethod
    def search(
        cls,
        model: nn.Module,
        samples: Samples,
        method: str,
        *,
        known: Mapping[str, list[Point]] | None = None,
        track: Callable[[list[str]], Iterable[str]] = iter,
        on_layer: Callable[[Paths], None] = lambda paths: None,
    ) -> Paths:
        """Walk along the path of each layer; layer by layer, so that it can be continued.

        Args:
            model: The dense model of the samples.
            samples: Inputs of its layers.
            method: Name of a method with several masks.
            known: Paths of an earlier search, which are not searched again.
            track: Gives the names of the layers one by one, for example with a progress bar.
            on_layer: Called with what is known after each layer.

        Raises:
            ConfigError: If the method is calibrated by counts.
            UnsupportedModelError: If the MLPs' layers cannot be told apart.
        """
        staged = staged_method(method)
        if not samples.tokens:
            raise DataError(
                "no tokens to calibrate on: give at least one batch of token ids [B, T]"
            )
        mlps = {mlp.name: mlp for mlp in find_gated_mlps(model, names=samples.inputs)}
        paths = cls(method=method, points=dict(known or {}))
        with torch.no_grad():
            for name in track([name for name in samples.inputs if name not in paths.points]):
                x, weights = samples.inputs[name], samples.weights[name]
                if name in mlps:
                    paths.points[name] = _mlp_path(mlps[name], staged, x, weights)
                else:
                    paths.points[name] = _linear_path(model.get_submodule(name), x, weights)
                on_layer(paths)
        return paths

    def config(self, model: nn.Module, samples: Samples, target_bytes: float) -> CatsConfig:
        """The thresholds at a share of bytes.

        Args:
            model: The dense model of the samples.
            samples: Inputs of its layers.
            target_bytes: Share of the bytes of the samples' layers that a token reads, in (0, 1).

        Raises:
            ConfigError: If the masks cannot get so low; the message says how low they get.
        """
        staged = staged_method(self.method)
        mlps = {mlp.name: mlp for mlp in find_gated_mlps(model, names=samples.inputs)}
        tensors, inputs, realized = {}, {}, {}
        with torch.no_grad():
            for name, point in self.split(target_bytes).items():
                x = samples.inputs[name]
                if name not in mlps:
                    share = point.dropped["inputs"]
                    inputs[name] = quantile(x.float().abs(), share).expand(x.shape[1]).contiguous()
                    continue
                mlp = mlps[name]
                record = staged.record(Sample(mlp, x), point.dropped)  # type: ignore[arg-type]
                tensors[name] = {"threshold": record.threshold.cpu()}
                for part, threshold in record.inputs.items():
                    layer = getattr(mlp.known_layout(), part)
                    inputs[f"{name}.{layer}"] = threshold.cpu()
                realized[name] = 1 - record.read["down"]
        return CatsConfig(
            method=self.method,
            router=staged.router,
            target_sparsity=None,
            target_bytes=target_bytes,
            tensors=tensors,
            inputs=inputs,
            realized_sparsity=realized,
            calibration_tokens=samples.tokens,
            calibration_hash=f"{samples.text_hash:016x}",
            fingerprints=samples.fingerprints,
        )

    @property
    def lowest(self) -> float:
        """The least share of bytes that the masks can get to."""
        total = sum(points[0].bytes for points in self.points.values())
        return sum(min(p.bytes for p in points) for points in self.points.values()) / total

    def split(self, target_bytes: float) -> dict[str, Point]:
        """Name of each layer to the point of its path that it goes to at a share of bytes.

        Raises:
            ConfigError: As for :meth:`config`.
        """
        check_target(target_bytes, "share of bytes")
        total = sum(points[0].bytes for points in self.points.values())
        if self.lowest > target_bytes:
            raise ConfigError(
                f"method {self.method!r} cannot read as little as {target_bytes:.1%} of the bytes "
                f"of these layers: {self.lowest:.1%} is the least"
            )
        chosen = {name: points[0] for name, points in self.points.items()}
        read = total
        steps = [s for name, points in self.points.items() for s in _steps(name, points)]
        for _, name, point in sorted(steps, key=lambda step: (step[0], step[1])):
            if read <= target_bytes * total:
                break
            read += point.bytes - chosen[name].bytes
            chosen[name] = point
        return chosen

    def mean_dropped(self, target_bytes: float) -> dict[str, float]:
        """Kind of mask to the share that it drops at a share of bytes, mean over bytes of layers.

        Columns that are dropped after rows are those that the rows have left.
        """
        total = sum(points[0].bytes for points in self.points.values())
        means: dict[str, float] = {}
        for name, point in self.split(target_bytes).items():
            share = self.points[name][0].bytes / total
            rows = point.dropped.get("rows", 0.0)
            for kind, dropped in point.dropped.items():
                left = max(0.0, dropped - rows) if kind == "columns" else dropped
                means[kind] = means.get(kind, 0.0) + share * left
        return means

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds."""
        points = {name: [asdict(p) for p in points] for name, points in self.points.items()}
        return {"method": self.method, "points": points}

    @classmethod
    def from_dict(cls, block: Mapping[str, Any], source: str) -> Paths:
        """
        Raises:
            FormatError: If it is not what :meth:`to_dict` gave.
        """
        try:
            points = {n: [Point(**point) for point in path] for n, path in block["points"].items()}
            return cls(method=block["method"], points=points)
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{source}: damaged paths ({error}); delete the file") from error


def staged_method(name: str) -> StagedMethod:
    """
    Raises:
        ConfigError: If there is no such method, or it has one threshold per MLP.
    """
    method = get_method(name)
    if not isinstance(method, StagedMethod):
        raise ConfigError(
            f"method {name!r} has one threshold per MLP, and no split to look for: give it a "
            "sparsity instead of a share of bytes"
        )
    return method


def _steps(name: str, points: list[Point]) -> list[tuple[float, str, Point]]:
    """Error per byte, name and end of each step of a path that no longer step would beat."""
    hull = [points[0]]
    for point in points[1:]:
        if point.bytes >= hull[-1].bytes:
            continue
        hull.append(point)
        # a step that costs less per byte than the one before is taken together with it
        while len(hull) > 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-3], hull[-2]):
            del hull[-2]
    return [(_slope(a, b), name, b) for a, b in pairwise(hull)]


def _slope(start: Point, end: Point) -> float:
    return (end.error - start.error) / (start.bytes - end.bytes)


def _mlp_path(mlp: GatedMLP, method: StagedMethod, x: Tensor, weights: Tensor) -> list[Point]:
    sample = Sample(mlp, x)
    exact = sample.gate_output * sample.up_output
    scale = weights.to(exact.device)[:, None].sqrt()
    sizes = {part: getattr(mlp, part).matrix.bytes for part in ("gate", "up", "down")}
    if mlp.known_layout().gate == mlp.known_layout().up:
        sizes = {part: mlp.bytes / 3 for part in sizes}

    def point(dropped: dict[Stage, float]) -> Point:
        record = method.record(sample, dropped)
        difference = F.linear((record.products - exact) * scale, sample.down)
        return Point(
            dropped={str(stage): share for stage, share in dropped.items()},
            bytes=sum(size * record.read[part] for part, size in sizes.items()),
            error=float(difference.double().square().sum()),
        )

    path = [point(dict.fromkeys(method.stages, 0.0))]
    while True:
        here: dict[Stage, float] = path[-1].dropped  # type: ignore[assignment]
        candidates = []
        for stage in method.stages:
            # neurons whose rows are dropped need no columns either
            start = (
                max(here[stage], here["rows"])
                if stage == "columns" and "rows" in here
                else here[stage]
            )
            if start + _STEP <= _LARGEST + 1e-9:
                candidates.append(point({**here, stage: round(start + _STEP, 4)}))
        candidates = [c for c in candidates if c.bytes < path[-1].bytes]
        if not candidates:
            return path
        path.append(min(candidates, key=lambda candidate: _slope(path[-1], candidate)))


def _linear_path(layer: nn.Module, x: Tensor, weights: Tensor) -> list[Point]:
    weight = weight_of(layer)
    assert weight is not None
    numbers = weight.dequantised().float()
    x = x.to(numbers.device, torch.float32)
    scale = weights.to(numbers.device)[:, None].sqrt()
    path = []
    for step in range(round(_LARGEST / _STEP) + 1):
        share = round(step * _STEP, 4)
        kept = keep_mask(x, quantile(x.abs(), share))
        difference = F.linear(torch.where(kept, 0, x) * scale, numbers)
        path.append(
            Point(
                dropped={"inputs": share},
                bytes=weight.bytes * float(kept.float().mean()),
                error=float(difference.double().square().sum()),
            )
        )
    return path
