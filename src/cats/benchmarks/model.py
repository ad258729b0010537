"""``cats bench model``: prefill and ``model.generate`` of a whole model, dense, sparse and fused.

Random weights of real shapes, thresholds calibrated on the model's own activations.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cats.apply import densify_, sparsify_
from cats.benchmarks.shapes import random_model
from cats.benchmarks.timing import Timing
from cats.calibration import calibrate
from cats.config import CatsConfig
from cats.errors import ConfigError
from cats.fusion import fuse_
from cats.results import GenerateRate, PrefillTime, environment

VARIANTS = ("dense", "sparse", "fused")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed: ``layers`` of the shape's layers, a prompt's prefill, ``new_tokens`` tokens.

    ``caches`` are those of ``generate``: ``"dynamic"`` runs eagerly, ``"static"`` is compiled by
    transformers on a GPU.
    """

    shape: str = "mistral-7b"
    layers: int | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    sparsity: float = 0.5
    prefill: int = 2048
    new_tokens: int = 128
    caches: tuple[str, ...] = ("dynamic", "static")
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.new_tokens < 2 or self.prefill < 1:
            raise ConfigError("rounds and new tokens must be at least 2, prefill at least 1")


def measure(case: Case) -> Iterator[PrefillTime | GenerateRate]:
    """Time each variant of one model.

    Yields milliseconds of the prefill, and tokens a second of decoding after the first token.
    """
    model: Any = random_model(case.shape, case.dtype, torch.device(case.device), layers=case.layers)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (4, 512), device=case.device)
    config = calibrate(model, ids.split(1), target_sparsity=case.sparsity)
    where = environment(case.device)

    common: dict[str, Any] = {
        "shape": case.shape,
        "layers": model.config.num_hidden_layers,
        "dtype": str(case.dtype).removeprefix("torch."),
        "sparsity": case.sparsity,
        "prefill": case.prefill,
        "new_tokens": case.new_tokens,
        "environment": where,
    }

    prompt = torch.randint(vocabulary, (1, case.prefill), device=case.device)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    # in turns, so that all meet the same machine; the first round warms up
    for i in range(case.rounds + 1):
        for name in VARIANTS:
            _become(model, name, config)
            for _ in range(2):  # the first call after a change allocates
                took = _seconds(lambda: model(prompt, use_cache=False, logits_to_keep=1))
            if i:
                seconds[name].append(took)
    for name in VARIANTS:
        timing = Timing.of([1e3 * s for s in seconds[name]])
        yield PrefillTime(variant=name, **common, **timing.quartiles)
    for cache in case.caches:
        rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
        running = ""
        for turn, name in _turns(cache, case.rounds):
            if name != running:
                torch.compiler.reset()
                _become(model, name, config)
                running = name
            rate = _decode_rate(model, ids[:1, :32], case.new_tokens, cache)
            if turn >= 0:
                rates[name].append(rate)
        for name in VARIANTS:
            median = Timing.of(rates[name])
            yield GenerateRate(variant=name, cache=cache, **common, **median.quartiles)


def _turns(cache: str, rounds: int) -> list[tuple[int, str]]:
    """Which variant runs when; a turn below 0 warms up."""
    if cache == "static":  # transformers compiles: once for each variant
        return [(turn, name) for name in VARIANTS for turn in range(-2, rounds)]
    return [(turn, name) for turn in range(-1, rounds) for name in VARIANTS]


def _become(model: nn.Module, variant: str, config: CatsConfig) -> None:
    densify_(model)
    if variant != "dense":
        sparsify_(model, config)
    if variant == "fused":
        fuse_(model)


def _decode_rate(model: Any, prompt: Tensor, new_tokens: int, cache: str) -> float:
    """Tokens a second after the first one."""

    def generate(tokens: int) -> Callable[[], object]:
        return lambda: model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
            max_new_tokens=tokens, min_new_tokens=tokens, cache_implementation=cache,
        )  # fmt: skip

    generate(1)()  # the first call after a change allocates
    first = _seconds(generate(1))
    return (new_tokens - 1) / (_seconds(generate(new_tokens)) - first)


def _seconds(run: Callable[[], object]) -> float:
    with torch.no_grad():
        _synchronize()
        start = time.perf_counter()
        run()
        _synchronize()
        return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
