"""``cats bench decode``: the time of a token, dense and CATS, beside the limit of its bytes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cats.apply import sparsify_
from cats.benchmarks.timing import Timing, read_bandwidth
from cats.calibration import calibrate
from cats.decode import Decoder
from cats.errors import ConfigError
from cats.fusion import fuse_, fused_mlps
from cats.metrics import realized_sparsity
from cats.results import Result, environment

NAME = "decode"
GENERATE = "generate"
GENERATE_COMPILED = "generate_compiled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed.

    Attributes:
        model: Name that stands in the results.
        sparsities: Targets of CATS; the dense model is always timed.
        engines: Engines of the decode loop.
        batch: Rows.
        prompt_length: Tokens of the prompt.
        new_tokens: Tokens that are generated; those after the first are timed.
        rounds: How often each variant runs, in turns with all others.
        read_bytes: Size of the read that gives the memory limit.
        generate: Whether transformers' ``generate`` is timed, on the model as it was.
        generate_compiled: Whether that with a static cache and compilation is timed too.
    """

    model: str
    sparsities: tuple[float, ...] = (0.5, 0.7)
    engines: tuple[str, ...] = ("auto",)
    batch: int = 1
    prompt_length: int = 32
    new_tokens: int = 128
    rounds: int = 5
    read_bytes: int = 4 * 2**30
    generate: bool = True
    generate_compiled: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.prompt_length < 1 or self.new_tokens < 3 or self.rounds < 2:
            raise ConfigError("expected batch, prompt >= 1, new tokens >= 3, and rounds >= 2")
        if not all(0 < s < 1 for s in self.sparsities):
            raise ConfigError(f"sparsities must lie in (0, 1), got {list(self.sparsities)}")


def measure(
    model: nn.Module, blocks: Tensor, case: Case, *, commit: str | None = None
) -> Iterator[Result]:
    """Time dense and sparse copies of a model in turns.

    Args:
        model: A dense Hugging Face causal model; it stays as it is.
        blocks: Token ids ``[N, T]``: thresholds are calibrated on them, and the prompts are the
            beginnings of the first blocks.
        case: What to time.
        commit: Of the sources, where they are no checkout that could tell it.

    Yields:
        The read bandwidth, then for each variant the time of a token (ms), of the first token and
        of the first call with all its preparation.
    """
    device = next(model.parameters()).device
    where = environment(str(device), commit=commit)
    read = read_bandwidth(device, size=case.read_bytes, rounds=max(2, case.rounds))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    rate = _rate(read, case.read_bytes)
    yield _result(case, where, "read_bandwidth", "GB/s", rate, {"dtype": dtype})

    ids = blocks[: case.batch, : case.prompt_length].to(device)
    if tuple(ids.shape) != (case.batch, case.prompt_length):
        raise ConfigError(f"the text gives {list(blocks.shape)} tokens, too few for the prompts")
    models = {0.0: model} | {s: _sparse(model, blocks, s) for s in case.sparsities}
    variants: dict[tuple[str, float], Callable[[], Run]] = {}
    for sparsity, m in models.items():
        for engine in case.engines:
            decoder = Decoder(m, engine=engine)
            variants[decoder.engine, sparsity] = _loop(decoder, ids, case)
        if case.generate:
            variants[GENERATE, sparsity] = _transformers(m, ids, case, compiled=False)
        if case.generate_compiled:
            variants[GENERATE_COMPILED, sparsity] = _transformers(m, ids, case, compiled=True)

    first = {key: run() for key, run in variants.items()}
    runs: dict[tuple[str, float], list[Run]] = {key: [] for key in variants}
    for _ in range(case.rounds):
        for key, run in variants.items():
            runs[key].append(run())
    for (variant, sparsity), samples in runs.items():
        token_bytes, dropped = _token_bytes(models[sparsity], samples[0].tokens, case)
        limit = token_bytes / case.read_bytes * read.median
        settings: dict[str, str | int | float | bool | None] = {
            "dtype": dtype, "variant": variant, "sparsity": sparsity, "realized_sparsity": dropped,
            "bytes": token_bytes, "limit_ms": limit * 1e3,
        }  # fmt: skip
        steps = Timing.of([run.seconds_a_token for run in samples])
        yield _result(case, where, "time", "ms", _scaled(steps, 1e3), settings)
        waits = Timing.of([run.times[0] for run in samples])
        yield _result(case, where, "time_to_first_token", "ms", _scaled(waits, 1e3), settings)
        start = first[variant, sparsity].times[-1] - samples[0].times[-1]
        once = Timing(median=start, low=start, high=start, samples=1)
        yield _result(case, where, "start_up", "s", once, settings)


@dataclass(frozen=True, slots=True)
class Run:
    """One generation.

    Attributes:
        tokens: Prompts and new tokens, ``[B, T + N]``.
        times: When each step's tokens were there, in seconds after the start.
    """

    tokens: Tensor
    times: list[float]

    @property
    def seconds_a_token(self) -> float:
        """Mean time of a step after the first, which runs the prompt."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def run_loop(decoder: Decoder, ids: Tensor, **options: Any) -> Run:
    """Generate with the decode loop, from an empty cache."""
    decoder.reset()
    start, times = time.perf_counter(), list[float]()
    tokens = decoder.generate(
        ids, callback=lambda _: times.append(time.perf_counter() - start), **options
    )
    return Run(tokens, times)


def run_transformers(model: nn.Module, ids: Tensor, **options: Any) -> Run:
    """Generate with ``model.generate``; options as it takes them."""
    from transformers import StoppingCriteriaList

    times: list[float] = []

    def stamp(tokens: Tensor, scores: Any) -> Tensor:
        if tokens.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    generate: Any = model.generate
    start = time.perf_counter()
    tokens: Tensor = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        stopping_criteria=StoppingCriteriaList([stamp]),
        **options,
    )
    return Run(tokens, times)


def _sparse(model: nn.Module, blocks: Tensor, sparsity: float) -> nn.Module:
    device = next(model.parameters()).device
    config = calibrate(model, blocks.to(device).split(4), target_sparsity=sparsity)
    return fuse_(sparsify_(copy.deepcopy(model), config))


def _loop(decoder: Decoder, ids: Tensor, case: Case) -> Callable[[], Run]:
    return lambda: run_loop(
        decoder, ids, max_new_tokens=case.new_tokens, do_sample=False, eos_token_id=None
    )


def _transformers(
    model: nn.Module, ids: Tensor, case: Case, *, compiled: bool
) -> Callable[[], Run]:
    options: dict[str, Any] = dict(
        min_new_tokens=case.new_tokens, max_new_tokens=case.new_tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    if compiled:
        # on a GPU transformers compiles by itself where the cache is static
        options["cache_implementation"] = "static"
    return lambda: run_transformers(model, ids, **options)


def _token_bytes(model: nn.Module, tokens: Tensor, case: Case) -> tuple[float, float]:
    """Bytes that a step must read, and the realised sparsity of the tokens that were timed.

    Of weights: all but an embedding that is only looked up in, and of each MLP the kept rows of
    ``up`` and columns of ``down``. Of the cache: the used slots, on average. With several rows it
    is a lower bound, since a neuron is read that any row keeps.
    """
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    weights = float(sum(p.nbytes for p in model.parameters()))
    if embedding is not head:
        weights -= embedding.nbytes
    shares = {}
    if list(fused_mlps(model)):
        shares = _realized_after(model, tokens, case.prompt_length)
    for name, mlp in fused_mlps(model):
        down = getattr(mlp, mlp.layout.down).weight
        weights -= 2 * down.nbytes * shares[name]
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots = case.prompt_length + case.new_tokens / 2
    cache = 2 * config.num_hidden_layers * heads * size * embedding.element_size() * slots
    mean = sum(shares.values()) / len(shares) if shares else 0.0
    return weights + case.batch * cache, mean


def _realized_after(model: nn.Module, tokens: Tensor, prompt_length: int) -> dict[str, float]:
    """Realised sparsity of each MLP on the inputs of the steps: all tokens after the prompt's."""
    whole, prompt = tokens[:, :-1], tokens[:, :prompt_length]
    n, p = whole.shape[1], prompt_length
    in_whole, in_prompt = (realized_sparsity(model, [part]) for part in (whole, prompt))
    # a causal model computes the same for the prompt with and without what follows
    return {name: (in_whole[name] * n - in_prompt[name] * p) / (n - p) for name in in_whole}


def _rate(read: Timing, size: int) -> Timing:
    """Seconds for ``size`` bytes as GB/s."""
    return Timing(
        median=size / read.median / 1e9,
        low=size / read.high / 1e9,
        high=size / read.low / 1e9,
        samples=read.samples,
    )


def _scaled(timing: Timing, factor: float) -> Timing:
    return Timing(
        median=timing.median * factor,
        low=timing.low * factor,
        high=timing.high * factor,
        samples=timing.samples,
    )


def _result(
    case: Case,
    where: dict[str, str | int | float | bool | None],
    quantity: str,
    unit: str,
    timing: Timing,
    settings: dict[str, str | int | float | bool | None],
) -> Result:
    return Result(
        benchmark=NAME, quantity=quantity, unit=unit, value=timing.median, low=timing.low,
        high=timing.high, samples=timing.samples,
        settings={
            "model": case.model, "batch": case.batch, "prompt_length": case.prompt_length,
            "new_tokens": case.new_tokens, **settings,
        },
        environment=where,
    )  # fmt: skip
