"""``cats bench decode``: the time of a token, dense and CATS, beside the limit of its bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from torch import Tensor, nn

from cats.apply import sparsify_
from cats.benchmarks.copies import copy_for_fusion
from cats.benchmarks.decode_bytes import own_bytes, token_bytes
from cats.benchmarks.decode_case import Case
from cats.benchmarks.decode_check import CheckFields, ModuleCheck
from cats.benchmarks.decode_runs import first_token_milliseconds, token_milliseconds
from cats.benchmarks.decode_variants import (
    GENERATE,
    GENERATE_COMPILED,
    GREEDY,
    FirstRun,
    Variant,
    label_of_target,
    make_variants,
    run_first,
    run_in_turns,
    warn_left_out,
)
from cats.benchmarks.launches import profile_steps
from cats.benchmarks.timing import Timing, read_bandwidth
from cats.calibration import collect
from cats.decode import Decoder
from cats.errors import BackendError, ConfigError
from cats.fusion import fuse_
from cats.results import (
    DecodeBandwidth,
    FirstTokenTime,
    LaunchTime,
    PeakMemory,
    Result,
    StartUpTime,
    TokenTime,
    Value,
    environment,
)

__all__ = ["GENERATE", "GENERATE_COMPILED", "Case", "copy_for_fusion", "measure"]

# Tokens on which each engine is checked.
_CHECKED_TOKENS = 64
# Kernels of a step that the results name; the others are summed up.
_NAMED_LAUNCHES = 12


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
    model. So each is compared with a dense one in the same minute. The copies share every weight
    except those of ``down``.

    Args:
        model: A dense Hugging Face causal model. It stays dense, but an engine may change the
            layout of its weights.
        blocks: Token ids ``[N, T]``. Thresholds are calibrated on them. The beginnings of the first
            blocks are the prompts; what follows is run through each engine for its check.
        case: What to time.
        commit: Commit of the sources, where they are not a checkout.
        on_stage: Called with what comes next, in words; never while something is timed.

    Quantised models are not fused: the engine ``stream`` runs them as they are.

    Yields:
        Each result as soon as it is known. First comes the read bandwidth. Then, for each variant
        and sparsity, come the time of a token and of the first token (ms), the start-up time, the
        peak memory of a GPU, and the launches of a step.
    """
    device = next(model.parameters()).device
    if case.launches and device.type != "cuda":
        raise ConfigError("launches can be timed on a CUDA device only")
    checked = min(_CHECKED_TOKENS, case.new_tokens)
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
        dense_bytes=own_bytes(model),
        on_stage=on_stage,
    )
    yield bench.bandwidth()
    counts = None
    if any(case.sparsities):
        on_stage(f"calibrating on {blocks.numel():,} tokens")
        counts = collect(model, blocks.to(device).split(4))
    dense_loops: list[Variant] = []
    for sparsity in sorted(case.sparsities):
        on_stage(f"{label_of_target(sparsity)}: running the modules, for the check")
        if sparsity == 0:
            measured, check = model, ModuleCheck.run(model, text, case.prompt_length)
        else:
            assert counts is not None
            measured = copy_for_fusion(model)
            sparsify_(measured, counts.config(sparsity))
            check = ModuleCheck.run(measured, text, case.prompt_length)
            if case.bits is None:
                fuse_(measured)
        variants = yield from bench.measure_model(measured, sparsity, check, dense_loops)
        if sparsity == 0:
            dense_loops = [variant for variant in variants if variant.decoder is not None]
        del measured, variants
        # modules and compiled steps refer to each other, and hold the memory of a GPU
        gc.collect()


class _CaseFields(TypedDict):
    """The fields that all records of a run share."""

    model: str
    batch: int
    prompt_length: int
    new_tokens: int
    dtype: str
    environment: dict[str, Value]
    bits: NotRequired[int]
    group_size: NotRequired[int | None]
    load: NotRequired[int]


class _VariantFields(_CaseFields):
    """The fields that all records of a variant share."""

    variant: str
    sparsity: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bench:
    """One run: what it times, and what all its records share."""

    case: Case
    environment: dict[str, Value]
    dtype: str
    read: Timing
    text: Tensor
    dense_bytes: int
    on_stage: Callable[[str], None]

    @property
    def prompt(self) -> Tensor:
        return self.text[:, : self.case.prompt_length]

    @property
    def case_fields(self) -> _CaseFields:
        fields: _CaseFields = {
            "model": self.case.model,
            "batch": self.case.batch,
            "prompt_length": self.case.prompt_length,
            "new_tokens": self.case.new_tokens,
            "dtype": self.dtype,
            "environment": self.environment,
        }
        if self.case.bits is not None:
            fields |= {"bits": self.case.bits, "group_size": self.case.group_size}
        if self.case.load:
            fields["load"] = self.case.load
        return fields

    def bandwidth(self) -> DecodeBandwidth:
        rate = self.read.as_rate(self.case.read_bytes / 1e9)
        return DecodeBandwidth(**self.case_fields, **rate.quartiles)

    def measure_model(
        self, model: nn.Module, sparsity: float, check: ModuleCheck, dense_loops: list[Variant]
    ) -> Generator[Result, None, list[Variant]]:
        """Yields the results of one sparsity; returns its variants."""
        first_runs: list[tuple[Variant, FirstRun]] = []
        # all are made before one is timed: an engine may change the layout of weights
        for variant in list(make_variants(model, sparsity, self.prompt, self.case, self.on_stage)):
            self.on_stage(f"{variant.label}: first run")
            try:
                first_runs.append((variant, run_first(variant, self.text.device)))
            except BackendError as error:
                warn_left_out(variant.name, sparsity, error)
        if not first_runs:
            return []
        variants = [variant for variant, _ in first_runs]
        runs = run_in_turns([*variants, *dense_loops], self.on_stage)
        loops = [v for v in variants if v.decoder is not None] if sparsity == 0 else dense_loops
        dense_runs = [runs[id(variant)] for variant in loops]
        dense_ms = _shortest(map(token_milliseconds, dense_runs))
        first_dense_ms = _shortest(map(first_token_milliseconds, dense_runs))
        for variant, first_run in first_runs:
            self.on_stage(f"{variant.label}: check")
            samples = runs[id(variant)]
            bytes_read, dropped = token_bytes(model, samples[0].tokens, self.case)
            fields: _VariantFields = {
                **self.case_fields,
                "variant": variant.name,
                "sparsity": sparsity,
            }
            checked: CheckFields = {}
            if variant.decoder is not None:
                checked = check.compare(variant.decoder, self.text)
            yield TokenTime(
                **fields,
                **token_milliseconds(samples).quartiles,
                realized_sparsity=dropped,
                bytes=bytes_read,
                limit_ms=1e3 * bytes_read / self.case.read_bytes * self.read.median,
                dense_ms=dense_ms,
                **checked,
            )
            first = first_token_milliseconds(samples).quartiles
            yield FirstTokenTime(**fields, **first, dense_ms=first_dense_ms)
            yield from self._start_up(model, first_run, fields)
            if self.case.launches and variant.decoder is not None:
                yield from self._launches(variant.decoder, fields)
        return variants

    def _start_up(
        self, model: nn.Module, first_run: FirstRun, fields: _VariantFields
    ) -> Iterator[StartUpTime | PeakMemory]:
        seconds = Timing.once(first_run.seconds).quartiles
        yield StartUpTime(**fields, **seconds, compilations=first_run.compilations)
        if first_run.extra_bytes is not None:
            peak = own_bytes(model) + first_run.extra_bytes
            over = peak / self.dense_bytes - 1
            yield PeakMemory(**fields, **Timing.once(peak).quartiles, over_dense_weights=over)

    def _launches(self, decoder: Decoder, fields: _VariantFields) -> Iterator[LaunchTime]:
        step = profile_steps(decoder, self.prompt, **GREEDY)
        total = sum(launch.time for launch in step.launches) + step.gaps
        named, others = step.launches[:_NAMED_LAUNCHES], step.launches[_NAMED_LAUNCHES:]
        rows = [(launch.name, launch.time, launch.calls) for launch in named]
        rows.append(("others", sum(o.time for o in others), sum(o.calls for o in others)))
        rows.append(("gaps", step.gaps, 0.0))
        for name, microseconds, calls in rows:
            yield LaunchTime(
                **fields,
                **Timing.once(microseconds).quartiles,
                kernel=name[:160],
                calls=calls,
                share=microseconds / total,
            )


def _shortest(timings: Iterable[Timing]) -> float | None:
    """The smallest median; None without a timing."""
    return min((timing.median for timing in timings), default=None)
