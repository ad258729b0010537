"""``cats bench peer``: a token and a prompt through our decode loop and llama.cpp, in turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from cats import formats
from cats.apply import sparsify_
from cats.benchmarks.busy import busy_processes
from cats.benchmarks.copies import copy_for_fusion
from cats.benchmarks.decode_bytes import token_bytes
from cats.benchmarks.decode_case import Case as DecodeCase
from cats.benchmarks.decode_runs import run_loop
from cats.benchmarks.decode_variants import GREEDY
from cats.benchmarks.peers.llama_cpp import LlamaCpp, llama_cpp, run_llama_bench
from cats.benchmarks.timing import Timing, read_bandwidth
from cats.calibration import collect
from cats.checkpoint import load_dense
from cats.decode import Decoder
from cats.errors import ConfigError, DataError
from cats.results import (
    OWN,
    PEER,
    PEER_BENCH,
    PeerBandwidth,
    PeerMemory,
    PeerPrefillTime,
    PeerResult,
    PeerTokenTime,
    Value,
    environment,
)
from cats.version import __version__

_RESIDENT = Path(__file__).with_name("resident.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed.

    Attributes:
        path: The GGUF file.
        model: Name of the model in the results.
        sparsities: Targets of CATS; 0 is the dense model.
        engine: Of our decode loop.
        dtype: That our loop computes in.
        threads: Of each program.
        load: Processes that keep processors busy meanwhile.
        prompt_length: Tokens before those that are timed.
        new_tokens: Tokens that are generated; those after the first are timed.
        prefill: Tokens of the prompt whose first token is timed; 0 for none.
        rounds: How often each program runs, in turns with the others.
        peer_python: An interpreter that has the package ``cyllama``; None for no peer.
        llama_bench: The peer's own program ``llama-bench``; None to leave it out.
        read_bytes: Size of the read that gives the memory limit.
    """

    path: Path
    model: str
    sparsities: tuple[float, ...] = (0.0, 0.5)
    engine: str = "auto"
    dtype: torch.dtype = torch.float32
    threads: int = 1
    load: int = 0
    prompt_length: int = 32
    new_tokens: int = 128
    prefill: int = 512
    rounds: int = 5
    peer_python: str | None = sys.executable
    llama_bench: Path | None = None
    read_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.new_tokens < 3 or self.prompt_length < 1 or self.prefill < 0:
            raise ConfigError("expected rounds >= 2, new tokens >= 3, prompts of >= 1 token")
        if not self.sparsities or not all(0 <= s < 1 for s in self.sparsities):
            raise ConfigError(f"sparsities must lie in [0, 1), got {list(self.sparsities)}")
        if self.threads < 1 or self.load < 0:
            raise ConfigError("expected at least one thread, and a load of 0 or more processes")


def measure(
    case: Case,
    blocks: Tensor,
    *,
    commit: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Iterator[PeerResult]:
    """Time our decode loop, dense and sparse, and llama.cpp, in turns in the same minutes.

    Args:
        case: What to time.
        blocks: Token ids ``[N, T]``: thresholds are calibrated on them, and the first ones give the
            prompts.
        commit: Commit of the sources, where they are not a checkout.
        on_stage: Called with what comes next, in words; never while something is timed.

    Yields:
        The read bandwidth; of each program the time of a token, of a prompt, and its memory.

    Raises:
        ConfigError: If the peer cannot run.
        DataError: If the text is too short for a prompt.
    """
    needed = max(case.prompt_length, case.prefill)
    text = blocks.flatten()[:needed]
    if len(text) < needed:
        raise DataError(f"the text gives {blocks.numel()} tokens, too few for {needed}")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        bench = _Bench(case, text, environment("cpu", commit=commit), on_stage)
        yield from bench.run(blocks)
    finally:
        torch.set_num_threads(threads_before)


class _Fields(TypedDict):
    """What all records of a run share."""

    model: str
    kind: str
    threads: int
    load: int
    environment: dict[str, Value]


class _Bench:
    """One run of :func:`measure`."""

    def __init__(
        self,
        case: Case,
        text: Tensor,
        environment_: dict[str, Value],
        on_stage: Callable[[str], None],
    ) -> None:
        kinds = formats.gguf_kinds(case.path)
        self.fields = _Fields(
            model=case.model,
            kind=max(kinds, key=lambda name: kinds[name]),
            threads=case.threads,
            load=case.load,
            environment=environment_,
        )
        self.case, self.text, self.on_stage = case, text, on_stage

    def run(self, blocks: Tensor) -> Iterator[PeerResult]:
        case = self.case
        yield from self._memory()
        models = self._models(blocks)
        decoders = {s: Decoder(model, engine=case.engine) for s, model in models.items()}
        with ExitStack() as stack:
            peer = None
            if case.peer_python is not None:
                self.on_stage("llama.cpp: loading")
                context = max(case.prompt_length + case.new_tokens, case.prefill + 1) + 32
                peer = stack.enter_context(
                    llama_cpp(case.peer_python, case.path, threads=case.threads, context=context)
                )
            # the first runs trace, pack and read the file
            for name, run in self._runs(decoders, peer, case.prompt_length, 3).items():
                self.on_stage(f"{name}: first run")
                run()
            stack.enter_context(busy_processes(case.load))
            yield from self._timed(models, decoders, peer)
        yield from self._own_program()

    def _timed(
        self,
        models: dict[float, nn.Module],
        decoders: dict[float, Decoder],
        peer: LlamaCpp | None,
    ) -> Iterator[PeerResult]:
        case = self.case
        self.on_stage("timing a read of memory")
        read = read_bandwidth(torch.device("cpu"), size=case.read_bytes, rounds=case.rounds)
        rate = read.as_rate(case.read_bytes / 1e9)
        yield PeerBandwidth(**self.fields, **rate.quartiles)
        samples = self._in_turns(decoders, peer, case.prompt_length, case.new_tokens)
        peer_runs = samples.get("llama.cpp")
        peer_time = None if peer_runs is None else Timing.of([s.milliseconds for s in peer_runs])
        dense = samples.get("dense")
        dense_time = None if dense is None else Timing.of([s.milliseconds for s in dense])
        dense_bytes = 0.0
        for sparsity, model in models.items():
            runs = samples[_label(sparsity)]
            self.on_stage(f"{_label(sparsity)}: counting bytes")
            size, _ = token_bytes(model, runs[0].tokens, self._decode_case())
            dense_bytes = dense_bytes or size
            agreed = None
            if peer_runs is not None and not sparsity:
                new = runs[0].tokens[0, case.prompt_length :].tolist()
                agreed = _agreement(new, peer_runs[0].tokens[0].tolist())
            yield PeerTokenTime(
                **self.fields,
                **Timing.of([s.milliseconds for s in runs]).quartiles,
                program=OWN,
                release=__version__,
                variant=decoders[sparsity].engine,
                sparsity=sparsity,
                prompt_length=case.prompt_length,
                new_tokens=case.new_tokens,
                bytes=size,
                limit_ms=1e3 * size / case.read_bytes * read.median,
                peer_ms=None if peer_time is None else peer_time.median,
                dense_ms=None if dense_time is None else dense_time.median,
                agreed=agreed,
            )
        if peer is not None and peer_time is not None:
            yield PeerTokenTime(
                **self.fields,
                **peer_time.quartiles,
                program=PEER,
                release=peer.release,
                variant="",
                sparsity=0.0,
                prompt_length=case.prompt_length,
                new_tokens=case.new_tokens,
                bytes=dense_bytes,
                limit_ms=1e3 * dense_bytes / case.read_bytes * read.median,
                dense_ms=None if dense_time is None else dense_time.median,
            )
        if case.prefill:
            yield from self._prefill(decoders, peer)

    def _prefill(
        self, decoders: dict[float, Decoder], peer: LlamaCpp | None
    ) -> Iterator[PeerResult]:
        samples = self._in_turns(decoders, peer, self.case.prefill, 1)
        runs = samples.get("llama.cpp")
        peer_time = None if runs is None else Timing.of([run.first for run in runs])
        for sparsity, decoder in decoders.items():
            yield PeerPrefillTime(
                **self.fields,
                **Timing.of([run.first for run in samples[_label(sparsity)]]).quartiles,
                program=OWN,
                release=__version__,
                variant=decoder.engine,
                sparsity=sparsity,
                prompt_length=self.case.prefill,
                peer_ms=None if peer_time is None else peer_time.median,
            )
        if peer is not None and peer_time is not None:
            yield PeerPrefillTime(
                **self.fields,
                **peer_time.quartiles,
                program=PEER,
                release=peer.release,
                variant="",
                sparsity=0.0,
                prompt_length=self.case.prefill,
            )

    def _in_turns(
        self, decoders: dict[float, Decoder], peer: LlamaCpp | None, prompt: int, new_tokens: int
    ) -> dict[str, list[_Sample]]:
        samples: defaultdict[str, list[_Sample]] = defaultdict(list)
        runs = self._runs(decoders, peer, prompt, new_tokens)
        for number in range(self.case.rounds):
            for name, run in runs.items():
                self.on_stage(f"{name}, prompt {prompt}: round {number + 1} of {self.case.rounds}")
                samples[name].append(run())
        return samples

    def _runs(
        self, decoders: dict[float, Decoder], peer: LlamaCpp | None, prompt: int, new_tokens: int
    ) -> dict[str, Callable[[], _Sample]]:
        ids = self.text[:prompt]

        def own(decoder: Decoder) -> _Sample:
            run = run_loop(decoder, ids[None], max_new_tokens=new_tokens, **GREEDY)
            return _Sample(run.tokens, run.times)

        def others(peer: LlamaCpp) -> _Sample:
            run = peer.generate(ids.tolist(), new_tokens)
            return _Sample(torch.tensor(run.tokens)[None], run.times)

        runs: dict[str, Callable[[], _Sample]] = {
            _label(sparsity): partial(own, decoder) for sparsity, decoder in decoders.items()
        }
        if peer is not None:
            runs["llama.cpp"] = partial(others, peer)
        return runs

    def _models(self, blocks: Tensor) -> dict[float, nn.Module]:
        """Each target to its model; sparse ones are copies that share codes with the dense one."""
        case = self.case
        self.on_stage("loading")
        dense: nn.Module = load_dense(case.path, dtype=case.dtype)
        models: dict[float, nn.Module] = {}
        counts = None
        # lays codes out as the engine reads them: prompts are faster then, and copies share them
        self.on_stage("making the engine")
        _ = Decoder(dense, engine=case.engine).engine
        if any(case.sparsities):
            self.on_stage(f"calibrating on {blocks.numel():,} tokens")
            counts = collect(dense, blocks.split(4))
        for sparsity in sorted(case.sparsities):
            model = dense
            if sparsity:
                assert counts is not None
                model = sparsify_(copy_for_fusion(dense), counts.config(sparsity))
            models[sparsity] = model
        return models

    def _memory(self) -> Iterator[PeerMemory]:
        """In processes of their own, which hold nothing else."""
        case = self.case
        ids = self.text[: case.prompt_length].tolist()
        self.on_stage("memory of our loop")
        options = [str(case.path), str(case.dtype).removeprefix("torch."), case.engine]
        question = json.dumps({"ids": ids, "threads": case.threads})
        command = [sys.executable, str(_RESIDENT), *options, question]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"the process that measures memory failed: {last}")
        own = json.loads(done.stdout.strip().splitlines()[-1])
        sizes = [(OWN, __version__, str(own["engine"]), int(own["resident"]))]
        if case.peer_python is not None:
            self.on_stage("memory of llama.cpp")
            context = case.prompt_length + 32
            arguments = case.peer_python, case.path
            with llama_cpp(*arguments, threads=case.threads, context=context) as peer:
                sizes.append((PEER, peer.release, "", peer.generate(ids, 8).resident))
        for program, release, variant, size in sizes:
            yield PeerMemory(
                **self.fields,
                **Timing.once(size).quartiles,
                program=program,
                release=release,
                variant=variant,
                sparsity=0.0,
                prompt_length=case.prompt_length,
                file_bytes=case.path.stat().st_size,
            )

    def _own_program(self) -> Iterator[PeerResult]:
        """The peer's own benchmark program, under the same load."""
        case = self.case
        if case.llama_bench is None:
            return
        self.on_stage("llama-bench")
        with busy_processes(case.load):
            tests = run_llama_bench(
                case.llama_bench,
                case.path,
                threads=case.threads,
                prompt=case.prefill,
                new_tokens=case.new_tokens,
                rounds=case.rounds,
            )
        for test in tests:
            timing = Timing.of(test.milliseconds).quartiles
            if test.new_tokens:
                yield PeerTokenTime(
                    **self.fields,
                    **timing,
                    program=PEER_BENCH,
                    release=test.commit,
                    variant="",
                    sparsity=0.0,
                    prompt_length=0,
                    new_tokens=test.new_tokens,
                    bytes=0.0,
                    limit_ms=0.0,
                )
            else:
                yield PeerPrefillTime(
                    **self.fields,
                    **timing,
                    program=PEER_BENCH,
                    release=test.commit,
                    variant="",
                    sparsity=0.0,
                    prompt_length=test.prompt,
                )

    def _decode_case(self) -> DecodeCase:
        case = self.case
        return DecodeCase(
            model=case.model, prompt_length=case.prompt_length, new_tokens=case.new_tokens
        )


@dataclass(frozen=True, slots=True)
class _Sample:
    """One generation: tokens ``[1, N]``, and when each new one was there, in seconds."""

    tokens: Tensor
    times: Sequence[float]

    @property
    def first(self) -> float:
        """Milliseconds until the first token."""
        return 1e3 * self.times[0]

    @property
    def milliseconds(self) -> float:
        """Of a token after the first."""
        return 1e3 * (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def _label(sparsity: float) -> str:
    return f"cats-{round(100 * sparsity)}" if sparsity else "dense"


def _agreement(actual: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the new tokens before the first that differs."""
    pairs = enumerate(zip(actual, expected, strict=True))
    first = next((i for i, (a, b) in pairs if a != b), len(actual))
    return first / len(actual)
