"""``cats bench costs``: what each kind of mask saves on this device, and the time of a token.

``cats calibrate --speed`` reads these numbers. Each mask is timed alone, at some shares that it
drops, over the model's own MLPs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from cats import fingerprint
from cats.benchmarks.timing import Timing, cache_size, time_passes
from cats.decode import Decoder
from cats.errors import UnsupportedModelError
from cats.model import GatedMLP, find_gated_mlps
from cats.ops import GatedMLPArguments, call
from cats.protocols import CausalModel
from cats.results import MaskTime, Result, TokenCost, environment
from cats.weights.placement import input_device

SHARES = (0.3, 0.6, 0.9)
"""Shares of the entries of a mask at which it is timed."""
MASKS = ("gate", "rows", "columns")
_TOKENS, _PROMPT = 24, 16


def measure(
    model: nn.Module,
    *,
    name: str,
    rounds: int = 7,
    commit: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:
    """Time a token of the dense model, then its MLPs without and with each mask.

    Args:
        model: A dense model of ordinary weights.
        name: Its name in the results.
        rounds: Timed passes of each case, in turns.
        commit: Of the sources, for the results.
        on_stage: Told what begins now.

    Raises:
        UnsupportedModelError: If the operator cannot run the model's MLPs.
    """
    device = input_device(model)
    mlps = find_gated_mlps(model)
    about: dict[str, Any] = {
        "model": name,
        "dtype": str(cast(CausalModel, model).dtype).removeprefix("torch."),
        "weights": fingerprint.of_model(model),
        "environment": environment(str(device), commit=commit),
    }
    on_stage("timing tokens of the dense model")
    yield TokenCost(**about, **Timing.of(_token_milliseconds(model, rounds)).quartiles)
    on_stage("timing the MLPs with each mask")
    # as many as no cache holds
    some = mlps[: max(1, -(-4 * cache_size(device) // mlps[0].bytes))]
    cases = {("none", 0.0): _pass(some, "none", 0.0)}
    cases |= {(mask, share): _pass(some, mask, share) for mask in MASKS for share in SHARES}
    with torch.inference_mode():
        timings = time_passes(cases, len(some), device=device, rounds=rounds)
    for (mask, share), timing in timings.items():
        of_all = timing.scaled(1e3 * len(mlps))
        yield MaskTime(**about, mask=mask, dropped=share, **of_all.quartiles)


def _token_milliseconds(model: nn.Module, rounds: int) -> list[float]:
    """The median time of a token after the first, of each round; the first round is left out."""
    embedding = cast(nn.Embedding, cast(CausalModel, model).get_input_embeddings())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embedding.num_embeddings, (1, _PROMPT), generator=generator)
    decoder, medians = Decoder(model), []
    for _ in range(1 + max(2, rounds // 2)):
        times: list[float] = []

        def stamp(_: Tensor, times: list[float] = times) -> None:
            times.append(time.perf_counter())

        decoder.generate(
            ids, callback=stamp, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False
        )
        medians.append(1e3 * median(b - a for a, b in pairwise(times[1:])))
    return medians[1:]


def _pass(mlps: list[GatedMLP], mask: str, share: float) -> Callable[[], object]:
    """One call of each MLP for one token; ``mask`` drops the share, and the others nothing."""
    calls = [_arguments(mlp, mask, share) for mlp in mlps]
    return lambda: [call(arguments, "auto") for arguments in calls]


def _arguments(mlp: GatedMLP, mask: str, share: float) -> GatedMLPArguments:
    operands = mlp.operands()
    weights: Mapping[str, Any] = {
        part: getattr(operands, part).weight.detach() for part in ("gate", "up", "down")
    }
    if not all(w.dtype in (torch.float32, torch.float16, torch.bfloat16) for w in weights.values()):
        raise UnsupportedModelError(f"{mlp.name}: costs are measured of 16- and 32-bit weights")
    gate, device = weights["gate"], weights["gate"].device
    generator = torch.Generator().manual_seed(0)

    def dropping(size: int) -> Tensor:
        order = torch.randperm(size, generator=generator)
        thresholds = torch.zeros(size)
        thresholds[order[: round(share * size)]] = torch.inf
        return thresholds.to(device)

    inputs = dropping(mlp.hidden_size) if mask == "gate" else None
    x = torch.randn(1, mlp.hidden_size, generator=generator)
    return GatedMLPArguments(
        x.to(device, gate.dtype),
        _by_columns(gate) if inputs is not None else gate.contiguous(),
        weights["up"].contiguous(),
        _by_columns(weights["down"]),
        dropping(mlp.intermediate_size)
        if mask == "rows"
        else torch.zeros(mlp.intermediate_size, device=device),
        operands.activation,
        "gate",
        operands.gate.bias,
        operands.up.bias,
        operands.down.bias,
        dropping(mlp.intermediate_size) if mask == "columns" else None,
        inputs,
    )


def _by_columns(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()
