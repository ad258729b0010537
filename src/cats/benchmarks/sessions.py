"""``cats bench sessions``: sessions that come at random times, and how long they wait."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor, nn

from cats.benchmarks.decode_variants import label_of_target
from cats.benchmarks.session_times import TimedSession
from cats.benchmarks.sparse_copies import models_of
from cats.benchmarks.timing import Quartiles, Timing
from cats.decode import Sessions
from cats.errors import ConfigError
from cats.results import (
    FirstTokenWait,
    Result,
    SessionLatency,
    SessionsRate,
    TokenGap,
    Value,
    environment,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed.

    Attributes:
        model: Name of the model in the results.
        sparsities: Targets of CATS; 0 is the dense model.
        engine: Of :class:`cats.Sessions`.
        sessions: How many come.
        seconds: Within how many they come, at random times.
        rows: How many decode together at most.
        shortest_prompt: Tokens; prompts have lengths from here on, as many short as long ones on a
            logarithmic scale.
        longest_prompt: Tokens.
        fewest_tokens: New tokens of a session, at least.
        most_tokens: At most.
        longest_wait: As in :class:`cats.Sessions`.
        seed: Of times and lengths.
    """

    model: str
    sparsities: tuple[float, ...] = (0.0, 0.5)
    engine: str = "modules"
    sessions: int = 32
    seconds: float = 60.0
    rows: int = 16
    shortest_prompt: int = 32
    longest_prompt: int = 512
    fewest_tokens: int = 32
    most_tokens: int = 128
    longest_wait: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sessions < 2 or self.seconds < 0:
            raise ConfigError("expected at least 2 sessions, and seconds >= 0")
        if not 1 <= self.shortest_prompt <= self.longest_prompt:
            raise ConfigError("expected prompts of 1 token or more, the shortest one first")
        if not 2 <= self.fewest_tokens <= self.most_tokens:
            raise ConfigError("expected 2 new tokens or more, the smaller number first")

    @property
    def context(self) -> int:
        return self.longest_prompt + self.most_tokens


@dataclass(frozen=True, slots=True)
class Arrival:
    """A session that is to come.

    Attributes:
        at: Seconds after the first moment.
        prompt: Tokens of its prompt.
        new: Tokens of its answer.
    """

    at: float
    prompt: int
    new: int


def arrivals(case: Case) -> list[Arrival]:
    """The sessions of a case in the order in which they come."""
    drawn = random.Random(case.seed)
    bounds = math.log(case.shortest_prompt), math.log(case.longest_prompt)
    times = sorted(drawn.uniform(0, case.seconds) for _ in range(case.sessions))
    return [
        Arrival(
            at,
            round(math.exp(drawn.uniform(*bounds))),
            drawn.randint(case.fewest_tokens, case.most_tokens),
        )
        for at in times
    ]


def measure(
    model: nn.Module,
    blocks: Tensor,
    case: Case,
    *,
    commit: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:
    """Open sessions at random times; then the same ones all at once, as a full batch.

    Args:
        model: A dense Hugging Face causal model. An engine may change the layout of its weights.
        blocks: Token ids ``[N, T]``, a text for each session. Thresholds are calibrated on them,
            and their beginnings are the prompts.
        case: What to time.
        commit: Commit of the sources, where they are not a checkout.
        on_stage: Called with what comes next, in words.

    Yields:
        For each target, tokens per second, and how long first tokens, next tokens and whole answers
        took.
    """
    if len(blocks) < case.sessions or blocks.shape[1] < case.longest_prompt:
        raise ConfigError(
            f"the text gives {list(blocks.shape)} tokens, too few for {case.sessions} prompts of "
            f"up to {case.longest_prompt}"
        )
    device = next(model.parameters()).device
    where = environment(str(device), commit=commit)
    for sparsity, measured in models_of(model, blocks, case.sparsities, on_stage):
        label = label_of_target(sparsity)
        on_stage(f"{label}: {case.sessions} sessions at once")
        full = _run(measured, blocks, case, at_once=True)
        on_stage(f"{label}: {case.sessions} sessions within {case.seconds:g} seconds")
        timed = _run(measured, blocks, case, at_once=False)
        fields: _Fields = {
            "model": case.model,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "sparsity": sparsity,
            "engine": case.engine,
            "sessions": case.sessions,
            "seconds": case.seconds,
            "rows": case.rows,
            "shortest_prompt": case.shortest_prompt,
            "longest_prompt": case.longest_prompt,
            "fewest_tokens": case.fewest_tokens,
            "most_tokens": case.most_tokens,
            "longest_wait": case.longest_wait,
            "seed": case.seed,
            "environment": where,
        }
        rate, full_rate = _rate(timed), _rate(full)
        yield SessionsRate(
            **fields, **Timing.once(rate).quartiles, full_rate=full_rate, share=rate / full_rate
        )
        yield FirstTokenWait(**fields, **_waits([1e3 * session.first for session in timed]))
        yield TokenGap(**fields, **_waits([1e3 * gap for s in timed for gap in s.gaps]))
        yield SessionLatency(**fields, **_waits([session.latency for session in timed]))


def _run(model: nn.Module, blocks: Tensor, case: Case, *, at_once: bool) -> list[TimedSession]:
    """The sessions of a case, when all have ended."""
    with Sessions(
        model,
        rows=case.rows,
        context=case.context,
        longest_wait=case.longest_wait,
        engine=case.engine,
    ) as sessions:
        if sessions.refusal is not None:
            raise ConfigError(f"rows cannot run together: {sessions.refusal}")
        # another text than those that are timed, which share no beginning with it
        TimedSession(sessions, blocks[0, -2:], 2).session.result()
        start, timed = time.perf_counter(), list[TimedSession]()
        for arrival, block in zip(arrivals(case), blocks, strict=False):
            if not at_once:
                time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            timed.append(TimedSession(sessions, block[: arrival.prompt], arrival.new))
        for session in timed:
            session.session.result()
        return timed


def _rate(timed: Sequence[TimedSession]) -> float:
    """Tokens per second, over the time in which at least one session was open."""
    spans = sorted((session.opened, session.token_times[-1]) for session in timed)
    busy, end = 0.0, -math.inf
    for opened, ended in spans:
        busy += max(0.0, ended - max(opened, end))
        end = max(end, ended)
    return sum(len(session.token_times) for session in timed) / busy


class _Fields(TypedDict):
    """The fields that all records of a run share."""

    model: str
    dtype: str
    sparsity: float
    engine: str
    sessions: int
    seconds: float
    rows: int
    shortest_prompt: int
    longest_prompt: int
    fewest_tokens: int
    most_tokens: int
    longest_wait: float
    seed: int
    environment: dict[str, Value]


class _Waits(Quartiles):
    """What is known of many waits: the quartiles, and the long ones."""

    p90: float
    p99: float
    longest: float


def _waits(samples: list[float]) -> _Waits:
    hundredths = statistics.quantiles(samples, n=100, method="inclusive")
    return {
        **Timing.of(samples).quartiles,
        "p90": hundredths[89],
        "p99": hundredths[98],
        "longest": max(samples),
    }
