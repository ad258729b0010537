"""``cats bench decode --rows``: steps of sessions that decode together, beside their bytes' limit.

The limit counts a neuron's weights once where any of the rows keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cats.benchmarks.decode_bytes import bytes_of_rows
from cats.benchmarks.decode_case import Case
from cats.benchmarks.decode_variants import label_of_target
from cats.benchmarks.session_times import TimedSession
from cats.benchmarks.sparse_copies import models_of
from cats.benchmarks.timing import Timing, read_bandwidth
from cats.decode import Sessions
from cats.errors import ConfigError
from cats.results import DecodeBandwidth, Result, TokenTime, environment

# Tokens of a session beyond those that are timed, for each row: rows that have started wait for
# the prompts of the others.
_SLACK = 8
_WAIT = 60.0


def measure_rows(
    model: nn.Module,
    blocks: Tensor,
    case: Case,
    rows: Sequence[int],
    *,
    commit: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:
    """Time steps of so many sessions of :class:`cats.Sessions`, all of which decode.

    Dense and sparse models run in turns.

    Args:
        model: A dense Hugging Face causal model. An engine may change the layout of its weights.
        blocks: Token ids ``[N, T]``. Thresholds are calibrated on them; the beginnings of the first
            blocks are the prompts.
        case: What to time. Its engines are those of :class:`cats.Sessions`, its batch is not used.
        rows: Numbers of rows.
        commit: Commit of the sources, where they are not a checkout.
        on_stage: Called with what comes next, in words.

    Yields:
        For each number of rows, the read bandwidth and the time of a step of each model; the number
        of rows stands as the batch of the records.
    """
    if max(rows) > len(blocks) or case.prompt_length > blocks.shape[1]:
        raise ConfigError(
            f"the text gives {list(blocks.shape)} tokens, too few for {max(rows)} prompts of "
            f"{case.prompt_length}"
        )
    device = next(model.parameters()).device
    on_stage("timing a read of memory")
    read = read_bandwidth(device, size=case.read_bytes, rounds=max(2, case.rounds))
    where = environment(str(device), commit=commit)
    models = dict(models_of(model, blocks, case.sparsities, on_stage))
    for count in rows:
        fields = {
            "model": case.model,
            "batch": count,
            "prompt_length": case.prompt_length,
            "new_tokens": case.new_tokens,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "environment": where,
        }
        yield DecodeBandwidth.model_validate(fields | read.as_rate(case.read_bytes / 1e9).quartiles)
        prompts = [*blocks[:count, : case.prompt_length]]
        runs = _run_in_turns(models, prompts, case, on_stage)
        dense = [run.milliseconds.median for run in runs if run.sparsity == 0]
        for run in runs:
            bytes_read, dropped = bytes_of_rows(models[run.sparsity], run.texts, run.steps)
            found = {
                "realized_sparsity": dropped,
                "bytes": bytes_read,
                "limit_ms": 1e3 * bytes_read / case.read_bytes * read.median,
                "dense_ms": min(dense, default=None),
            }
            variant = {"variant": f"sessions, {run.engine}", "sparsity": run.sparsity}
            yield TokenTime.model_validate(fields | variant | found | run.milliseconds.quartiles)


@dataclass(kw_only=True, slots=True)
class _Runs:
    """The runs of one model and engine.

    Attributes:
        samples: Milliseconds of a step, for each run.
        texts: The tokens of each row of the last run, up to its last input.
        steps: How many steps were timed in it.
    """

    sparsity: float
    engine: str
    sessions: Sessions
    samples: list[float] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)
    steps: int = 0

    @property
    def milliseconds(self) -> Timing:
        return Timing.of(self.samples)

    def run(self, prompts: Sequence[Tensor], new_tokens: int) -> None:
        self.steps = new_tokens - 1
        timed = [
            TimedSession(self.sessions, prompt, new_tokens + _SLACK * len(prompts))
            for prompt in prompts
        ]
        for session in timed:
            session.wait_for(1)
        # rows that came first have more tokens than the last; from here on, all run together
        counts = [len(session.session.so_far()) for session in timed]
        for session, count in zip(timed, counts, strict=True):
            session.wait_for(count + self.steps)
        for session in timed:
            session.session.cancel()
        for session in timed:
            session.session.result()
        times = timed[-1].times[counts[-1] - 1 : counts[-1] + self.steps]
        self.samples.append(1e3 * (times[-1] - times[0]) / self.steps)
        self.texts = [
            torch.tensor([*prompt.tolist(), *session.session.so_far()[: count + self.steps - 1]])
            for prompt, session, count in zip(prompts, timed, counts, strict=True)
        ]


def _run_in_turns(
    models: dict[float, nn.Module],
    prompts: Sequence[Tensor],
    case: Case,
    on_stage: Callable[[str], None],
) -> list[_Runs]:
    count = len(prompts)
    context = case.prompt_length + case.new_tokens + _SLACK * count
    with ExitStack() as stack:
        runs = []
        for sparsity, model in models.items():
            for engine in case.engines:
                on_stage(f"{label_of_target(sparsity)}, {count} rows: making the engine")
                # so that no row waits for the prompts of the others
                sessions = Sessions(
                    model, rows=count, context=context, engine=engine, longest_wait=_WAIT
                )
                stack.enter_context(sessions)
                if sessions.refusal is not None:
                    raise ConfigError(f"rows cannot run together: {sessions.refusal}")
                runs.append(_Runs(sparsity=sparsity, engine=engine, sessions=sessions))
        # the first round is no sample
        for number in range(case.rounds + 1):
            for run in runs:
                on_stage(f"{label_of_target(run.sparsity)}, {count} rows: round {number}")
                run.run(prompts, case.new_tokens)
        for run in runs:
            del run.samples[0]
        return runs
