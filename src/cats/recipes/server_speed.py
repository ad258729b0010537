"""How much slower a model is behind the HTTP server than its engine alone, in one run."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import nn

from cats.benchmarks.timing import Timing
from cats.errors import ConfigError, DataError
from cats.protocols import Tokenizer
from cats.results import (
    ServedFirstToken,
    ServedRate,
    ServingOverhead,
    ServingResult,
    Value,
    environment,
)
from cats.serving.clients import Round, clients_round
from cats.serving.models import Models, ServedModel, serve_models
from cats.serving.run import listen, make_server
from cats.serving.settings import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed.

    Attributes:
        name: Of the model, in results.
        target: Target of its thresholds, in results; 0 for a dense model.
        streams: Numbers of answers at a time.
        prompt_length: Tokens of each prompt, which all differ.
        new_tokens: Tokens of each answer.
        rounds: How often engine and server are timed, in turns.
    """

    name: str
    target: float = 0.0
    streams: tuple[int, ...] = (1, 16)
    prompt_length: int = 32
    new_tokens: int = 128
    rounds: int = 5

    def __post_init__(self) -> None:
        if not self.streams or min(self.streams) < 1:
            raise ConfigError(f"expected positive numbers of streams, got {self.streams}")
        if self.rounds < 2:
            raise ConfigError(f"expected at least 2 rounds, got {self.rounds}")


def measure(
    model: nn.Module,
    tokenizer: Tokenizer,
    case: Case,
    *,
    commit: str | None = None,
    on_stage: Callable[[str], object] = lambda text: None,
) -> Iterator[ServingResult]:
    """Time sessions of the engine, and streams of a server over the same sessions, in turns.

    The clients of the server are a process of their own.

    Args:
        model: On its device, fused if it is sparse.
        tokenizer: Of the model.
        case: What is timed.
        commit: As for :func:`cats.results.environment`.
        on_stage: Told what is timed.

    Yields:
        For each number of streams: the rates of both, the overhead, and the time to first token.
    """
    parameter = next(model.parameters())
    shared = environment(str(parameter.device), commit=commit)
    models = serve_models(
        model,
        tokenizer,
        name=case.name,
        rows=max(case.streams),
        context=case.prompt_length + case.new_tokens,
        dense_rows=0,
        queue=0,
    )
    served = models.get(case.name)
    try:
        with (
            _live(models) as port,
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as clients,
        ):
            for streams in case.streams:
                rounds: dict[str, list[Round]] = {"engine": [], "server": []}
                # the first round warms up
                for number in range(case.rounds + 1):
                    on_stage(f"timing {streams} streams, round {number} of {case.rounds}")
                    prompts = _prompts(served, case, streams)
                    engine = _engine_round(served, prompts, case.new_tokens)
                    prompts = _prompts(served, case, streams)
                    bodies = [_body(case, ids) for ids in prompts]
                    server = clients.submit(clients_round, port, bodies, case.new_tokens).result()
                    if number:
                        rounds["engine"].append(engine)
                        rounds["server"].append(server)
                yield from _records(case, streams, rounds, str(parameter.dtype), shared)
    finally:
        models.close()


def _records(
    case: Case,
    streams: int,
    rounds: dict[str, list[Round]],
    dtype: str,
    shared: dict[str, Value],
) -> Iterator[ServingResult]:
    settings: dict[str, Value] = {
        "model": case.name,
        "target": case.target,
        "dtype": dtype.removeprefix("torch."),
        "streams": streams,
        "prompt_length": case.prompt_length,
        "new_tokens": case.new_tokens,
    }
    for by, of_one in rounds.items():
        rate = Timing.of([r.seconds for r in of_one]).as_rate(streams * case.new_tokens)
        yield ServedRate.of({**settings, "by": by}, **rate.quartiles, environment=shared)
    pairs = zip(rounds["engine"], rounds["server"], strict=True)
    overhead = Timing.of([100 * (server.seconds / engine.seconds - 1) for engine, server in pairs])
    yield ServingOverhead.of(settings, **overhead.quartiles, environment=shared)
    firsts = [1e3 * first for r in rounds["server"] for first in r.firsts]
    cuts = statistics.quantiles(firsts, n=100, method="inclusive")
    yield ServedFirstToken.of(
        {**settings, "p95": cuts[94], "p99": cuts[98]},
        **Timing.of(firsts).quartiles,
        environment=shared,
    )


def _prompts(served: ServedModel, case: Case, count: int) -> list[list[int]]:
    """Random prompts, so that the cache holds nothing of them."""
    special = frozenset(served.tokenizer.all_special_ids)
    tokens = [i for i in served.tokenizer.get_vocab().values() if i not in special]
    chosen = torch.randint(len(tokens), (count, case.prompt_length))
    return [[tokens[i] for i in row] for row in chosen.tolist()]


def _engine_round(served: ServedModel, prompts: list[list[int]], new_tokens: int) -> Round:
    start = time.perf_counter()
    sessions = [
        served.sessions.open(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
        for ids in prompts
    ]
    for session in sessions:
        # not its text, which the server makes
        count = sum(1 for _ in session.tokens())
        if count != new_tokens:
            raise DataError(f"expected {new_tokens} tokens, the engine gave {count}")
    return Round(time.perf_counter() - start)


def _body(case: Case, ids: list[int]) -> bytes:
    return json.dumps(
        {
            "model": case.name,
            "prompt": ids,
            "max_tokens": case.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


@contextmanager
def _live(models: Models) -> Iterator[int]:
    """A running server; gives its port."""
    settings = Settings(port=0)
    listener = listen(settings)
    server = make_server(models, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
