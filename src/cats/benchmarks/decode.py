"""``cats bench decode``: the time of a token, dense and CATS, beside the limit of its bytes."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cats.apply import sparsify_
from cats.benchmarks.decode_runs import Run, run_loop, run_transformers
from cats.benchmarks.launches import profile_steps
from cats.benchmarks.timing import Timing, read_bandwidth
from cats.calibration import collect
from cats.config import label_of
from cats.decode import Decoder
from cats.decode.forward import cache_argument
from cats.errors import BackendError, ConfigError
from cats.fusion import fuse_, fused_mlps
from cats.metrics import realized_sparsity
from cats.model import find_gated_mlps, traffic
from cats.results import (
    DecodeBandwidth,
    FirstTokenTime,
    LaunchTime,
    PeakMemory,
    Result,
    StartUpTime,
    TokenTime,
    environment,
)

GENERATE = "generate"
GENERATE_COMPILED = "generate_compiled"
# Tokens on which each engine is checked.
_CHECKED = 64
# Kernels of a step that stand in the results; the rest is summed up.
_TOP_LAUNCHES = 12

_Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed.

    Attributes:
        model: Name that stands in the results.
        sparsities: Targets of CATS; 0 is the dense model.
        engines: Engines of the decode loop.
        batch: Rows.
        prompt_length: Tokens of the prompt.
        new_tokens: Tokens that are generated; those after the first are timed.
        rounds: How often the loop runs with each engine, in turns with all others.
        generate_rounds: How often transformers' ``generate`` does, which takes longer.
        read_bytes: Size of the read that gives the memory limit.
        generate: Whether transformers' ``generate`` is timed, on the same models.
        generate_compiled: Whether that with a static cache and compilation is timed too.
        launches: Whether the kernels of a step are listed, from a run of its own; on a GPU.
    """

    model: str
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.7)
    engines: tuple[str, ...] = ("auto",)
    batch: int = 1
    prompt_length: int = 32
    new_tokens: int = 128
    rounds: int = 5
    generate_rounds: int = 2
    read_bytes: int = 4 * 2**30
    generate: bool = True
    generate_compiled: bool = False
    launches: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.prompt_length < 1 or self.new_tokens < 3:
            raise ConfigError("expected batch and prompt >= 1, and new tokens >= 3")
        if self.rounds < 2 or self.generate_rounds < 2:
            raise ConfigError("expected at least 2 rounds")
        if not self.sparsities or not all(0 <= s < 1 for s in self.sparsities):
            raise ConfigError(f"sparsities must lie in [0, 1), got {list(self.sparsities)}")


def measure(
    model: nn.Module,
    blocks: Tensor,
    case: Case,
    *,
    commit: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:
    """Time a dense model and sparse copies of it, one sparsity after the other.

    The variants of one sparsity run in turns with each other and with the decode loops of the dense
    model, so that each is compared with a dense one in the same minute. The copies share every
    weight but those of ``down``.

    Args:
        model: A dense Hugging Face causal model; it stays so, though an engine may lay out its
            weights anew.
        blocks: Token ids ``[N, T]``: thresholds are calibrated on them. The beginnings of the first
            ones are the prompts, and what follows is run through each engine for its check.
        case: What to time.
        commit: Of the sources, where they are no checkout that could tell it.
        on_stage: Called with what comes next, in words; never while something is timed.

    Yields:
        As soon as it is known: the read bandwidth, then for each variant and sparsity the time of
        a token and of the first token (ms), the start-up time, the peak memory of a GPU, and the
        launches of a step.
    """
    device = next(model.parameters()).device
    if case.launches and device.type != "cuda":
        raise ConfigError("launches can be timed on a CUDA device only")
    checked = min(_CHECKED, case.new_tokens)
    text = blocks[: case.batch, : case.prompt_length + checked].to(device)
    if tuple(text.shape) != (case.batch, case.prompt_length + checked):
        raise ConfigError(
            f"the text gives {list(blocks.shape)} tokens, too few for {case.batch} prompts of "
            f"{case.prompt_length} tokens and {checked} after them"
        )
    on_stage("timing a read of memory")
    bench = _Bench(
        case=case,
        environment=environment(str(device), commit=commit),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        read=read_bandwidth(device, size=case.read_bytes, rounds=max(2, case.rounds)),
        text=text,
        dense_bytes=_own_bytes(model),
        on_stage=on_stage,
    )
    yield bench.bandwidth()
    counts = None
    if any(case.sparsities):
        on_stage(f"calibrating on {blocks.numel():,} tokens")
        counts = collect(model, blocks.to(device).split(4))
    dense_loops: list[_Variant] = []
    for sparsity in sorted(case.sparsities):
        on_stage(f"{_label(sparsity)}: running the modules, for the check")
        if sparsity == 0:
            measured, check = model, _Check.run(model, text, case.prompt_length)
        else:
            assert counts is not None
            measured = copy_for_fusion(model)
            sparsify_(measured, counts.config(sparsity))
            check = _Check.run(measured, text, case.prompt_length)
            fuse_(measured)
        variants = yield from bench.group(measured, sparsity, check, dense_loops)
        if sparsity == 0:
            dense_loops = [v for v in variants if v.decoder is not None]
        del measured, variants
        # modules and compiled steps refer to each other, and hold the memory of a GPU
        gc.collect()


@dataclass(frozen=True, slots=True)
class _Check:
    """What the engines must agree with: modules on the exact path, given the same tokens.

    At its thresholds a sparse model turns a rounding into a neuron, so that even the modules differ
    from themselves where they run a token at a time instead of all in one pass.

    Attributes:
        exact: Log-probabilities behind each token after the prompt, ``[B, N, V]``, float32, of one
            pass.
        rounding: Divergence of the modules from that where they run a token at a time.
        dropped: Realised sparsity, mean over the MLPs.
    """

    exact: Tensor
    rounding: float
    dropped: float

    @classmethod
    def run(cls, model: Any, text: Tensor, prompt_length: int) -> _Check:
        """Of a model that is not fused, on ``[B, T]`` tokens."""
        with torch.inference_mode():
            exact = model(input_ids=text, use_cache=False).logits[:, prompt_length:]
            exact = exact.float().log_softmax(-1)
            cached = {cache_argument(model): DynamicCache(config=model.config), "use_cache": True}
            model(input_ids=text[:, :prompt_length], **cached)
            tokens = text[:, prompt_length:].split(1, dim=1)
            logits = [model(input_ids=token, **cached).logits for token in tokens]
        rounding = _divergence(exact, torch.cat(logits, dim=1))
        return cls(exact, rounding, _dropped(model, text))

    def of(self, decoder: Decoder, text: Tensor) -> _Fields:
        """How far the steps of a decoder and the decisions of its MLPs are from the modules."""
        logits = decoder.logits(text, prompt_length=text.shape[1] - self.exact.shape[1])
        same = (self.exact.argmax(-1) == logits.argmax(-1)).float().mean()
        return {
            "kl": _divergence(self.exact, logits),
            "kl_of_rounding": self.rounding,
            "same_choice": float(same),
            "sparsity_error": _dropped(decoder.model, text) - self.dropped,
        }


@dataclass(frozen=True, slots=True)
class _Variant:
    """One way to generate with one model.

    Attributes:
        name: What the results call it.
        model: What a stage calls the model.
        run: Generates once.
        rounds: How often it is timed.
        decoder: Of the loop; None of transformers.
        seconds: What making the engine took, before the first run.
        held_bytes: What the engine holds on a GPU from then on.
    """

    name: str
    model: str
    run: Callable[[], Run]
    rounds: int
    decoder: Decoder | None = None
    seconds: float = 0.0
    held_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Start:
    """What the first run of a variant took, with all its preparation.

    Attributes:
        seconds: Until the third token was there: some compilers only finish in the second step.
        compilations: Graphs that were compiled because no cache on disk held them.
        extra_bytes: Peak of a GPU's memory above what was in use before; None on a CPU.
    """

    seconds: float
    compilations: int
    extra_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bench:
    """What all rows of a run have in common."""

    case: Case
    environment: _Fields
    dtype: str
    read: Timing
    text: Tensor
    dense_bytes: int
    on_stage: Callable[[str], None]

    @property
    def prompt(self) -> Tensor:
        return self.text[:, : self.case.prompt_length]

    def bandwidth(self) -> DecodeBandwidth:
        size = self.case.read_bytes
        rate = Timing(
            median=size / self.read.median / 1e9,
            low=size / self.read.high / 1e9,
            high=size / self.read.low / 1e9,
            samples=self.read.samples,
        )
        return DecodeBandwidth(**self._case, **rate.quartiles)

    def group(
        self, model: nn.Module, sparsity: float, check: _Check, dense_loops: list[_Variant]
    ) -> Generator[Result, None, list[_Variant]]:
        """Yields the results of one sparsity; returns its variants."""
        started: list[tuple[_Variant, _Start]] = []
        # all are made before one is timed: an engine may lay out weights anew
        for variant in list(self._variants(model, sparsity)):
            self.on_stage(f"{variant.model}, {variant.name}: first run")
            try:
                started.append((variant, _started(variant, self.text.device)))
            except BackendError as error:
                _leave_out(variant.name, sparsity, error)
        if not started:
            return []
        variants = [variant for variant, _ in started]
        runs = _in_turns([*variants, *dense_loops], self.on_stage)
        loops = variants if sparsity == 0 else dense_loops
        dense = [runs[id(v)] for v in loops if v.decoder is not None]
        dense_ms, first_dense_ms = _shortest(dense, _milliseconds), _shortest(dense, _first_ms)
        for variant, start in started:
            samples = runs[id(variant)]
            self.on_stage(f"{variant.model}, {variant.name}: check")
            token_bytes, dropped = _token_bytes(model, samples[0].tokens, self.case)
            limit = token_bytes / self.case.read_bytes * self.read.median
            row: _Fields = {**self._case, "variant": variant.name, "sparsity": sparsity}
            checked = {} if variant.decoder is None else check.of(variant.decoder, self.text)
            yield TokenTime(
                **row, **_milliseconds(samples).quartiles, realized_sparsity=dropped,
                bytes=token_bytes, limit_ms=limit * 1e3, dense_ms=dense_ms, **checked,
            )  # fmt: skip
            yield from self._costs(model, samples, start, row, first_dense_ms)
            if self.case.launches and variant.decoder is not None:
                yield from self._launches(variant.decoder, row)
        return variants

    def _costs(
        self,
        model: nn.Module,
        samples: list[Run],
        start: _Start,
        row: _Fields,
        first_dense_ms: float | None,
    ) -> Iterator[Result]:
        """What a token takes besides its time."""
        yield FirstTokenTime(**row, **_first_ms(samples).quartiles, dense_ms=first_dense_ms)
        seconds = _once(start.seconds).quartiles
        yield StartUpTime(**row, **seconds, compilations=start.compilations)
        if start.extra_bytes is not None:
            peak = _own_bytes(model) + start.extra_bytes
            over = peak / self.dense_bytes - 1
            yield PeakMemory(**row, **_once(peak).quartiles, over_dense_weights=over)

    def _launches(self, decoder: Decoder, row: _Fields) -> Iterator[LaunchTime]:
        step = profile_steps(decoder, self.prompt, **_GREEDY)
        total = sum(launch.time for launch in step.launches)
        top, rest = step.launches[:_TOP_LAUNCHES], step.launches[_TOP_LAUNCHES:]
        times = [(launch.name, launch.time, launch.calls) for launch in top]
        times.append(("others", sum(r.time for r in rest), sum(r.calls for r in rest)))
        times.append(("gaps", step.gaps, 0.0))
        for name, microseconds, calls in times:
            yield LaunchTime(
                **row, **_once(microseconds).quartiles, kernel=name[:160], calls=calls,
                share=microseconds / (total + step.gaps),
            )  # fmt: skip

    def _variants(self, model: nn.Module, sparsity: float) -> Iterator[_Variant]:
        case = self.case
        for engine in case.engines:
            start, before = time.perf_counter(), _allocated(self.text.device)
            self.on_stage(f"{_label(sparsity)}, {engine}: making the engine")
            try:
                decoder = Decoder(model, engine=engine)
                name = decoder.engine_for(case.batch)
            except BackendError as error:
                _leave_out(engine, sparsity, error)
                continue
            yield _Variant(
                name, _label(sparsity), _loop(decoder, self.prompt, case), case.rounds, decoder,
                seconds=time.perf_counter() - start,
                held_bytes=_allocated(self.text.device) - before,
            )  # fmt: skip
        if case.generate:
            plain = _transformers(model, self.prompt, case, compiled=False)
            yield _Variant(GENERATE, _label(sparsity), plain, case.generate_rounds)
        if case.generate_compiled:
            compiled = _transformers(model, self.prompt, case, compiled=True)
            yield _Variant(GENERATE_COMPILED, _label(sparsity), compiled, case.generate_rounds)

    @property
    def _case(self) -> _Fields:
        """The fields that all records of the run share."""
        case = self.case
        return {
            "model": case.model, "batch": case.batch, "prompt_length": case.prompt_length,
            "new_tokens": case.new_tokens, "dtype": self.dtype, "environment": self.environment,
        }  # fmt: skip


_GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


def _loop(decoder: Decoder, prompt: Tensor, case: Case) -> Callable[[], Run]:
    return lambda: run_loop(decoder, prompt, max_new_tokens=case.new_tokens, **_GREEDY)


def _transformers(
    model: nn.Module, prompt: Tensor, case: Case, *, compiled: bool
) -> Callable[[], Run]:
    options: dict[str, Any] = dict(
        min_new_tokens=case.new_tokens, max_new_tokens=case.new_tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    if compiled:
        # on a GPU transformers compiles by itself where the cache is static
        options["cache_implementation"] = "static"
    return lambda: run_transformers(model, prompt, **options)


def _started(variant: _Variant, device: torch.device) -> _Start:
    """Run a variant for the first time."""
    compiled = _compilations()
    if device.type != "cuda":
        seconds = variant.seconds + variant.run().times[2]
        return _Start(seconds, _compilations() - compiled, None)
    before = _allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run = variant.run()
    extra = torch.cuda.max_memory_allocated(device) - before + variant.held_bytes
    return _Start(variant.seconds + run.times[2], _compilations() - compiled, extra)


def _allocated(device: torch.device) -> int:
    """Bytes in use on a GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _leave_out(name: str, sparsity: float, error: BackendError) -> None:
    warnings.warn(f"{name} at {sparsity:.0%} is left out: {error}", stacklevel=3)


def _label(sparsity: float) -> str:
    """What a stage calls the model of a target."""
    return label_of("cats", sparsity) if sparsity else "dense"


def _compilations() -> int:
    """Graphs that torch.compile did not find in its cache on disk, in this process so far."""
    from torch._dynamo.utils import counters

    names = ("fxgraph_cache_miss", "fxgraph_cache_bypass")
    return sum(int(counters["inductor"][name]) for name in names)


def _in_turns(variants: list[_Variant], on_stage: Callable[[str], None]) -> dict[int, list[Run]]:
    """The runs of each variant, by its ``id``."""
    runs: dict[int, list[Run]] = {id(v): [] for v in variants}
    for number in range(max(v.rounds for v in variants)):
        for variant in variants:
            if number < variant.rounds:
                on_stage(f"{variant.model}, {variant.name}: round {number + 1} of {variant.rounds}")
                runs[id(variant)].append(variant.run())
    return runs


def copy_for_fusion(model: nn.Module) -> nn.Module:
    """A copy that shares all weights but those whose layout ``fuse_`` changes."""
    moved = {id(t) for mlp in find_gated_mlps(model) for t in mlp.down.matrix.tensors}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in moved})


def _divergence(exact: Tensor, logits: Tensor) -> float:
    """Mean KL divergence, in nats, of logits ``[B, N, V]`` from log-probabilities."""
    actual = logits.float().log_softmax(-1)
    # below zero by rounding alone; NaN stays
    return float((exact.exp() * (exact - actual)).sum(-1).mean().clamp(min=0))


def _dropped(model: nn.Module, text: Tensor) -> float:
    """Realised sparsity on ``[B, T]`` tokens, mean over the MLPs; 0 of a dense model."""
    if not getattr(model.config, "cats", None):
        return 0.0
    return _mean(realized_sparsity(model, [text]))


def _token_bytes(model: nn.Module, tokens: Tensor, case: Case) -> tuple[float, float]:
    """Bytes that a step must read, and the realised sparsity of the tokens that were timed.

    Of weights: all but an embedding that is only looked up in, and of each MLP the kept rows of
    ``up`` and columns of ``down``. Of the cache: the used slots, on average. With several rows it
    is a lower bound, since a neuron is read that any row keeps.
    """
    shares = {}
    if list(fused_mlps(model)):
        shares = _realized_after(model, tokens, case.prompt_length)
    weights = traffic.token_bytes(model, shares)
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots = case.prompt_length + case.new_tokens / 2
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    cache = 2 * config.num_hidden_layers * heads * size * dtype.itemsize * slots
    return weights + case.batch * cache, _mean(shares)


def _realized_after(model: nn.Module, tokens: Tensor, prompt_length: int) -> dict[str, float]:
    """Realised sparsity of each MLP on the inputs of the steps: all tokens after the prompt's."""
    whole, prompt = tokens[:, :-1], tokens[:, :prompt_length]
    n, p = whole.shape[1], prompt_length
    in_whole, in_prompt = (realized_sparsity(model, [part]) for part in (whole, prompt))
    # a causal model computes the same for the prompt with and without what follows
    return {name: (in_whole[name] * n - in_prompt[name] * p) / (n - p) for name in in_whole}


def _own_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _mean(shares: dict[str, float]) -> float:
    return sum(shares.values()) / len(shares) if shares else 0.0


def _milliseconds(runs: Iterable[Run]) -> Timing:
    """Of a token."""
    return Timing.of([1e3 * run.seconds_a_token for run in runs])


def _first_ms(runs: Iterable[Run]) -> Timing:
    """Of the first token."""
    return Timing.of([1e3 * run.times[0] for run in runs])


def _shortest(
    loops: Iterable[list[Run]], measure: Callable[[Iterable[Run]], Timing]
) -> float | None:
    """The smallest median of what is measured of each loop's runs; None without a loop."""
    return min((measure(runs).median for runs in loops), default=None)


def _once(value: float) -> Timing:
    return Timing(median=value, low=value, high=value, samples=1)
