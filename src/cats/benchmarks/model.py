"""``cats bench model``: prefill and ``model.generate`` of a whole model, dense, sparse and fused.

Random weights of real shapes, thresholds calibrated on the model's own activations.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypedDict, cast

import torch
from torch import Tensor, nn

from cats.apply import densify_, sparsify_
from cats.benchmarks.shapes import random_model
from cats.benchmarks.timing import Timing
from cats.calibration import calibrate
from cats.config import CatsConfig
from cats.errors import ConfigError
from cats.fusion import fuse_
from cats.protocols import CausalModel
from cats.results import GenerateRate, PrefillTime, Value, environment

VARIANTS = ("dense", "sparse", "fused")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed.

    Attributes:
        shape: One of :data:`cats.benchmarks.shapes.SHAPES`.
        layers: How many of its layers; by default all.
        prefill: Tokens of the prompt.
        new_tokens: Tokens that ``generate`` adds to a short prompt.
        caches: Caches of ``generate``: ``"dynamic"`` runs eagerly, ``"static"`` is compiled by
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


class _CaseFields(TypedDict):
    """The fields that all records of a case share."""

    shape: str
    layers: int
    dtype: str
    sparsity: float
    prefill: int
    new_tokens: int
    environment: dict[str, Value]


def measure(case: Case) -> Iterator[PrefillTime | GenerateRate]:
    """Time each variant of one model.

    Yields:
        Milliseconds of the prefill, then tokens per second of decoding after the first token.
    """
    model = random_model(case.shape, case.dtype, torch.device(case.device), layers=case.layers)
    causal = cast(CausalModel, model)
    vocabulary = causal.config.vocab_size
    ids = torch.randint(vocabulary, (4, 512), device=case.device)
    config = calibrate(model, ids.split(1), target_sparsity=case.sparsity)
    fields: _CaseFields = {
        "shape": case.shape,
        "layers": causal.config.num_hidden_layers,
        "dtype": str(case.dtype).removeprefix("torch."),
        "sparsity": case.sparsity,
        "prefill": case.prefill,
        "new_tokens": case.new_tokens,
        "environment": environment(case.device),
    }

    prompt = torch.randint(vocabulary, (1, case.prefill), device=case.device)
    run_prompt = partial(model, prompt, use_cache=False, logits_to_keep=1)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    # in turns, so that all meet the same machine; the first round warms up
    for i in range(case.rounds + 1):
        for name in VARIANTS:
            _become(model, name, config)
            for _ in range(2):  # the first call after a change allocates
                duration = _seconds(run_prompt)
            if i:
                seconds[name].append(duration)
    for name in VARIANTS:
        timing = Timing.of([1e3 * s for s in seconds[name]])
        yield PrefillTime(variant=name, **fields, **timing.quartiles)
    for cache in case.caches:
        rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
        current = ""
        for turn, name in _turns(cache, case.rounds):
            if name != current:
                torch.compiler.reset()
                _become(model, name, config)
                current = name
            rate = _decode_rate(causal, ids[:1, :32], case.new_tokens, cache)
            if turn >= 0:
                rates[name].append(rate)
        for name in VARIANTS:
            timing = Timing.of(rates[name])
            yield GenerateRate(variant=name, cache=cache, **fields, **timing.quartiles)


def _turns(cache: str, rounds: int) -> list[tuple[int, str]]:
    """Turns and their variants, in order; a turn below 0 warms up."""
    if cache == "static":  # transformers compiles: once for each variant
        return [(turn, name) for name in VARIANTS for turn in range(-2, rounds)]
    return [(turn, name) for turn in range(-1, rounds) for name in VARIANTS]


def _become(model: nn.Module, variant: str, config: CatsConfig) -> None:
    densify_(model)
    if variant != "dense":
        sparsify_(model, config)
    if variant == "fused":
        fuse_(model)


def _decode_rate(model: CausalModel, prompt: Tensor, new_tokens: int, cache: str) -> float:
    """Tokens per second after the first one."""

    def seconds(tokens: int) -> float:
        generate = partial(
            model.generate,
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            pad_token_id=0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            cache_implementation=cache,
        )
        return _seconds(generate)

    seconds(1)  # the first call after a change allocates
    first = seconds(1)
    return (new_tokens - 1) / (seconds(new_tokens) - first)


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
