"""The ways to generate with one model: what they are, their first run, and their timed runs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cats.benchmarks.decode_case import Case
from cats.benchmarks.decode_runs import Run, run_loop, run_transformers
from cats.benchmarks.torch_int4 import with_torch_int4
from cats.config import label_of
from cats.decode import Decoder
from cats.errors import BackendError

GENERATE = "generate"
GENERATE_COMPILED = "generate_compiled"
TORCH_INT4 = "compiled_torch_int4"
GREEDY = {"do_sample": False, "eos_token_id": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to generate with one model.

    Attributes:
        name: Its name in the results.
        label: Its model and name, for messages.
        generate: Generates once.
        rounds: How often it is timed.
        decoder: The decoder of our own loop; None for transformers.
        making_seconds: Time to make the engine, before the first run.
        held_bytes: Bytes that the engine holds on a GPU from then on.
    """

    name: str
    label: str
    generate: Callable[[], Run]
    rounds: int
    decoder: Decoder | None = None
    making_seconds: float = 0.0
    held_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FirstRun:
    """What the first run of a variant took, with all its preparation.

    Attributes:
        seconds: Time until the third token: some compilers finish in the second step only.
        compilations: Graphs that were compiled because no cache on disk held them.
        extra_bytes: Peak of a GPU's memory above what was in use before; None on a CPU.
    """

    seconds: float
    compilations: int
    extra_bytes: int | None


def make_variants(
    model: nn.Module,
    sparsity: float,
    prompt: Tensor,
    case: Case,
    on_stage: Callable[[str], None],
) -> Iterator[Variant]:
    """Each way to generate with a model. An engine that cannot run it is left out, with a warning.

    Args:
        model: A dense model, or a fused one of this target ``sparsity``.
        sparsity: 0 for a dense model.
        prompt: ``[B, T]`` token ids.
        case: What is timed.
        on_stage: Called with what comes next, in words.
    """
    model_label = label_of_target(sparsity)
    runners = [(engine, engine, model) for engine in case.engines]
    if case.torch_int4 and not sparsity:
        runners.append((TORCH_INT4, "compiled", with_torch_int4(model)))
    for name, engine, run_model in runners:
        start, bytes_before = time.perf_counter(), _allocated_bytes(prompt.device)
        on_stage(f"{model_label}, {name}: making the engine")
        try:
            decoder = Decoder(run_model, engine=engine)
            engine_name = decoder.engine_for(case.batch)
        except BackendError as error:
            warn_left_out(name, sparsity, error)
            continue
        variant_name = name if name == TORCH_INT4 else engine_name
        yield Variant(
            name=variant_name,
            label=f"{model_label}, {variant_name}",
            generate=partial(run_loop, decoder, prompt, max_new_tokens=case.new_tokens, **GREEDY),
            rounds=case.rounds,
            decoder=decoder,
            making_seconds=time.perf_counter() - start,
            held_bytes=_allocated_bytes(prompt.device) - bytes_before,
        )
    options: dict[str, dict[str, str]] = {}
    if case.generate:
        options[GENERATE] = {}
    if case.generate_compiled:
        # on a GPU transformers compiles by itself where the cache is static
        options[GENERATE_COMPILED] = {"cache_implementation": "static"}
    for name, cache_options in options.items():
        generate = partial(
            run_transformers,
            model,
            prompt,
            min_new_tokens=case.new_tokens,
            max_new_tokens=case.new_tokens,
            do_sample=False,
            pad_token_id=0,
            **cache_options,
        )
        yield Variant(
            name=name,
            label=f"{model_label}, {name}",
            generate=generate,
            rounds=case.generate_rounds,
        )


def label_of_target(sparsity: float) -> str:
    """What messages call the model of a target."""
    return label_of("cats", sparsity) if sparsity else "dense"


def warn_left_out(name: str, sparsity: float, error: BackendError) -> None:
    warnings.warn(f"{name} at {sparsity:.0%} is left out: {error}", stacklevel=3)


def run_first(variant: Variant, device: torch.device) -> FirstRun:
    """Run a variant for the first time, and measure what that takes.

    Raises:
        BackendError: If the engine cannot run the model.
    """
    compilations, bytes_before = _compilations(), _allocated_bytes(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    run = variant.generate()
    extra_bytes = None
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device)
        extra_bytes = peak - bytes_before + variant.held_bytes
    seconds = variant.making_seconds + run.times[2]
    return FirstRun(seconds, _compilations() - compilations, extra_bytes)


def run_in_turns(
    variants: Sequence[Variant], on_stage: Callable[[str], None]
) -> dict[int, list[Run]]:
    """The runs of each variant, by its ``id``."""
    runs: dict[int, list[Run]] = {id(variant): [] for variant in variants}
    for number in range(max(variant.rounds for variant in variants)):
        for variant in variants:
            if number < variant.rounds:
                on_stage(f"{variant.label}: round {number + 1} of {variant.rounds}")
                runs[id(variant)].append(variant.generate())
    return runs


def _allocated_bytes(device: torch.device) -> int:
    """Bytes in use on a GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _compilations() -> int:
    """Graphs that torch.compile did not find in its cache on disk, in this process so far."""
    from torch._dynamo.utils import counters

    names = ("fxgraph_cache_miss", "fxgraph_cache_bypass")
    return sum(int(counters["inductor"][name]) for name in names)
