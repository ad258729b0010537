"""Which engine runs the rows of a model."""

from __future__ import annotations

import torch
from torch import nn

from cats.decode.engines import gpu_refusal
from cats.decode.marks import runs_own_code
from cats.decode.rows.check import checked_rows
from cats.decode.rows.engine import RowEngine
from cats.decode.rows.watch import ENGINE
from cats.decode.runner import runner_of
from cats.decode.state import device_of
from cats.decode.tracing import exclusion
from cats.errors import BackendError, ConfigError, UnsupportedModelError

ROW_ENGINES = ("modules", "stream")


def check_row_engine(name: str) -> None:
    """
    Raises:
        ConfigError: If there is no such engine.
    """
    if name not in ROW_ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ROW_ENGINES)}; got {name!r}")


def make_row_engine(
    name: str, model: nn.Module, lines: int, capacity: int, *, rows: int
) -> RowEngine:
    """The engine of that name for a model as it is now, compared with single rows.

    Args:
        name: One of :data:`ROW_ENGINES`.
        model: A Hugging Face causal model.
        lines: Lines of the cache.
        capacity: Slots of each.
        rows: How many rows a step may have.

    Raises:
        UnsupportedModelError: If rows of different lengths cannot run together.
        BackendError: If ``stream`` was asked for and cannot run the model.
    """
    # refuses models without plain keys and values
    runner, _ = runner_of(model, ENGINE)
    if name == "modules":
        return checked_rows(model, lines, capacity, rows=rows, untraceable=runner.untraceable)
    reason = gpu_refusal(device_of(model)) or runner.untraceable
    if reason is None and runs_own_code(model):
        reason = "the model has forward hooks or replaced forward methods, which it would not run"
    if reason is None:
        # needs the packages whose absence `gpu_refusal` reports
        from cats.decode.stream.row_engine import StreamRows

        try:
            with exclusion.tracing(), torch.inference_mode():
                return StreamRows(model, lines, capacity, rows=rows)
        except UnsupportedModelError as error:
            reason = str(error)
    raise BackendError(
        f"the engine stream cannot run rows of this model: {reason}; engine='modules' runs any"
    )
