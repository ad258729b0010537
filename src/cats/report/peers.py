"""Tables and plot of ``cats bench peer``, from its results alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from cats.errors import DataError
from cats.report import plots
from cats.report.tables import Table, cell
from cats.results import (
    OWN,
    PEER,
    PEER_BENCH,
    PeerBandwidth,
    PeerMemory,
    PeerPrefillTime,
    PeerProgramResult,
    PeerResult,
    PeerTokenTime,
    Result,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the columns mean; it stands below the tables.
LEGEND = """\
load: busy processes beside the programs. spread: distance of the quartiles over the median.
x llama.cpp: speed over llama.cpp's through the package cyllama, medians in turns. x dense: over our
dense loop, in the same turns. limit: share of the rate at which as many threads read a large
buffer, in the same run. agreed: share of the new tokens before the first that is another one than
llama.cpp's. llama-bench: the peer's own program, which does not run in turns and begins without a
prompt. resident: memory of a process above that of the interpreter with its libraries."""

_ORDER = (OWN, PEER, PEER_BENCH)
_R = TypeVar("_R", bound=PeerProgramResult)
# Model and how it is stored, load, program, target: of these the last result counts.
_Key = tuple[str, int, str, float]


def tables(results: Iterable[Result]) -> list[Table]:
    """Tokens, prompts and memory.

    Raises:
        DataError: If there are no results of this benchmark.
    """
    own = _own(results)
    rates = {_place(r): r.value for r in own if isinstance(r, PeerBandwidth)}
    reads = ", ".join(f"{rate:.1f} at load {load}" for (_, load), rate in sorted(rates.items()))
    threads = ", ".join(map(str, sorted({r.threads for r in own})))
    title = f"{own[0].device}, {threads} threads" + (f": reads {reads} GB/s" if reads else "")
    tokens = Table(
        title=title,
        columns=(
            "model", "program", "load", "tok/s", "spread", "x llama.cpp", "x dense", "limit",
            "agreed",
        ),
        rows=[_token_row(r) for r in _last(own, PeerTokenTime)],
        names=2,
    )  # fmt: skip
    prompts = Table(
        title="prompts",
        columns=("model", "program", "load", "prompt", "tok/s", "ms", "x llama.cpp"),
        rows=[
            [
                _model(r),
                _program(r),
                str(r.load),
                str(r.prompt_length),
                f"{1e3 * r.prompt_length / r.value:.0f}",
                f"{r.value:.0f}",
                cell(None if r.peer_ms is None else r.peer_ms / r.value, ".2f"),
            ]
            for r in _last(own, PeerPrefillTime)
        ],
        names=2,
    )
    memory = Table(
        title="memory",
        columns=("model", "program", "resident, MB", "file, MB"),
        rows=[
            [_model(r), _program(r), f"{r.value / 1e6:.0f}", f"{r.file_bytes / 1e6:.0f}"]
            for r in _last(own, PeerMemory)
        ],
        names=2,
    )
    return [table for table in (tokens, prompts, memory) if table.rows]


def summary(results: Iterable[Result]) -> Table:
    """Tokens per second for a document: a row for each model and program, a column for each load.

    Raises:
        DataError: If there are no results of this benchmark.
    """
    own = _own(results)
    times = _last(own, PeerTokenTime)
    loads = sorted({r.load for r in times})
    cells = {(_model(r), _program(r), r.load): _cell(r) for r in times}
    rows = dict.fromkeys((model, program) for model, program, _ in cells)
    threads = ", ".join(map(str, sorted({r.threads for r in own})))
    return Table(
        title=f"{own[0].device}, {threads} threads: tokens per second (over llama.cpp in the same "
        "turns, share of the rate at which memory is read)",
        columns=["model", "", *(f"{load} busy" for load in loads)],
        rows=[
            [model, program, *(cells.get((model, program, load), "") for load in loads)]
            for model, program in rows
        ],
        names=2,
    )


def plot(results: Iterable[Result]) -> Figure:
    """Tokens per second over the load, a picture for each model.

    Raises:
        DataError: If there are no results of this benchmark, or matplotlib is not installed.
    """
    times = _last(_own(results), PeerTokenTime)
    models = list(dict.fromkeys(map(_model, times)))
    figure, axes = plots.panels(len(models))
    names = list(dict.fromkeys(map(_program, times)))
    for model, axis in zip(models, axes, strict=True):
        for number, name in enumerate(names):
            points = [
                (r.load, r.tokens_per_second, 1e3 / r.high, 1e3 / r.low)
                for r in sorted(times, key=lambda r: r.load)
                if (_model(r), _program(r)) == (model, name)
            ]
            if points:
                plots.line(axis, points, label=name, colour=plots.colour(number))
        plots.label(axis, x="busy processes beside it", y="tokens per second", title=model)
        axis.set_ylim(0, 1.35 * axis.get_ylim()[1])
        axis.set_xticks(sorted({r.load for r in times}))
        plots.legend(axis)
    return figure


def _own(results: Iterable[Result]) -> list[PeerResult]:
    own = [r for r in results if isinstance(r, PeerResult)]
    if not own:
        raise DataError("no result of `cats bench peer` in the file")
    return own


def _last(results: Sequence[PeerResult], kind: type[_R]) -> list[_R]:
    """The last result of each program at each place, in the order of models, loads, programs."""
    found: dict[_Key, _R] = {}
    for r in results:
        if isinstance(r, kind):
            found[_model(r), r.load, r.program, r.sparsity] = r
    models = list(dict.fromkeys(model for model, *_ in found))
    order = {name: number for number, name in enumerate(_ORDER)}
    keys = sorted(found, key=lambda k: (models.index(k[0]), k[1], order.get(k[2], 9), k[3]))
    return [found[key] for key in keys]


def _place(r: PeerResult) -> tuple[str, int]:
    return _model(r), r.load


def _model(r: PeerResult) -> str:
    return f"{r.model}, {r.kind}"


def _program(r: PeerProgramResult) -> str:
    if r.program == PEER:
        return "llama.cpp"
    if r.program != OWN:
        return r.program
    return f"cats-{round(100 * r.sparsity)}" if r.sparsity else "dense"


def _token_row(r: PeerTokenTime) -> list[str]:
    return [
        _model(r),
        _program(r),
        str(r.load),
        f"{r.tokens_per_second:.1f}",
        f"{(r.high - r.low) / r.value:.0%}",
        cell(r.over_peer, ".2f"),
        cell(r.over_dense, ".2f"),
        f"{r.limit_ms / r.value:.2f}" if r.limit_ms else "",
        cell(r.agreed, ".0%"),
    ]


def _cell(r: PeerTokenTime) -> str:
    notes = [cell(r.over_peer, ".2f") + "x"] if r.over_peer is not None else []
    notes += [f"{r.limit_ms / r.value:.2f}"] if r.limit_ms else []
    return f"{r.tokens_per_second:.1f}" + (f" ({', '.join(notes)})" if notes else "")
