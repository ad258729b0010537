"""What the benchmark of decoding measured, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cats.results import Result

if TYPE_CHECKING:
    from rich.table import Table


def table(results: Sequence[Result]) -> Table:
    """One row a variant and sparsity, of one run of ``cats bench decode``.

    ``spread`` is the distance of the quartiles over the median; ``limit`` the share of the rate
    that the read bandwidth allows.
    """
    # imported here: reading results needs no terminal
    from rich.table import Table

    by_quantity = {
        quantity: {
            (r.settings["variant"], r.settings["sparsity"]): r
            for r in results
            if r.quantity == quantity
        }
        for quantity in ("time", "time_to_first_token", "start_up")
    }
    first = results[0]
    read = next(r for r in results if r.quantity == "read_bandwidth")
    out = Table(
        title=f"{first.settings['model']}, {first.settings['dtype']}, batch "
        f"{first.settings['batch']}, on {first.environment['device']}: reads {read.value:.0f} GB/s",
        title_justify="left",
    )
    for column in (
        "variant", "target", "dropped", "tok/s", "ms", "spread", "GB/s", "limit", "first, ms",
        "start, s",
    ):  # fmt: skip
        out.add_column(column, justify="left" if column == "variant" else "right")
    for key, step in by_quantity["time"].items():
        settings = step.settings
        size, limit = settings["bytes"], settings["limit_ms"]
        assert isinstance(size, float)
        assert isinstance(limit, float)
        out.add_row(
            str(settings["variant"]),
            f"{settings['sparsity']:.0%}",
            f"{settings['realized_sparsity']:.1%}",
            f"{1e3 / step.value:.1f}",
            f"{step.value:.2f}",
            f"{(step.high - step.low) / step.value:.0%}",
            f"{size / step.value / 1e6:.0f}",
            f"{limit / step.value:.2f}",
            f"{by_quantity['time_to_first_token'][key].value:.0f}",
            f"{by_quantity['start_up'][key].value:.1f}",
        )
    return out
