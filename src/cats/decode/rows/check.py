"""Whether rows of different lengths give what each of them gives alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cats.decode.eager import warn_untraced
from cats.decode.marks import runs_own_code
from cats.decode.rows.modules import ModuleRows
from cats.decode.runner import largest_difference
from cats.decode.tracing import copy_to_probe, exclusion, first_line, relative_difference
from cats.errors import CatsError, UnsupportedModelError

_TEXTS = 3
# Lengths of rows where nothing hides earlier tokens.
_SOME = 17


def checked_rows(
    model: nn.Module, lines: int, capacity: int, *, rows: int, untraceable: str | None = None
) -> ModuleRows:
    """An engine for rows of any lengths, compared with single rows.

    Args:
        model: A Hugging Face causal model that can be decoded from keys and values.
        lines: Lines of the cache.
        capacity: Slots of each.
        rows: How many rows a step may have.
        untraceable: Why steps of the model must not be traced; None where they may be.

    Raises:
        UnsupportedModelError: If rows of different lengths cannot run together.
    """
    with exclusion.tracing(), torch.inference_mode():
        try:
            # hooks of the user do not see what is run for the check
            engine = ModuleRows(copy_to_probe(model), lines, capacity)
            difference = difference_from_single_rows(engine, engine.logits, min(lines, 3))
        except (CatsError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model may raise anything for masks that it does not expect
            raise UnsupportedModelError(
                f"it does not take rows of different lengths ({first_line(error)})"
            ) from error
        if not difference <= largest_difference(model):
            raise UnsupportedModelError(
                f"a step of rows of different lengths differs from single rows by {difference:.1%}"
            )
        engine.model = model
        if not runs_own_code(model):
            reason = untraceable or _trace(engine, rows)
            if reason is not None:
                warn_untraced(model, reason)
    return engine


def _trace(engine: ModuleRows, rows: int) -> str | None:
    """Trace the steps of up to so many rows; why they cannot be used, or None."""
    size = 1
    while size < 2 * min(rows, engine.lines):
        try:
            if not engine.traced.trace(engine.model, size):
                return None  # too short a cache, or attention that depends on the length
            count = min(size, rows, engine.lines)
            difference = difference_from_single_rows(engine, engine.traced.logits, count)
        except Exception as error:  # a model may raise anything in a tracer
            engine.traced.forget()
            return first_line(error)
        if not difference <= largest_difference(engine.model):
            engine.traced.forget()
            return f"its logits differ by {difference:.1%} from the model's own"
        size *= 2
    return None


def difference_from_single_rows(
    rows: ModuleRows, step: Callable[..., Tensor | None], count: int
) -> float:
    """Relative difference between the logits of a step of several rows and those of single rows.

    Lines are filled with random keys and values, so that lengths beyond a sliding window cost no
    more than short ones. They are zero afterwards. In 16 bits, a rounding can choose other neurons
    or experts for one text, but not for all: the smallest of several differences counts.

    Args:
        rows: An engine whose lines are free.
        step: What is compared: :meth:`ModuleRows.logits`, or the same of traced steps.
        count: How many rows.
    """
    generator = torch.Generator(rows.device).manual_seed(0)
    span = _SOME if rows.span is None else rows.span
    # within what a layer sees, just beyond it, and far beyond it
    lengths = [(2, span + 1, span + 40)[line % 3] + line for line in range(count)]
    lengths = [min(length, rows.capacity - 1) for length in lengths]
    # from the last line to the first: a row that is found by its number would be seen
    order = [*reversed(range(count))]
    differences = []
    for _ in range(_TEXTS):
        for line, length in enumerate(lengths):
            for buffer in rows.cache.line(line):
                buffer[:, :, :length].normal_(generator=generator)
        tokens = torch.randint(rows.vocabulary, (count,), generator=generator, device=rows.device)
        places = [lengths[line] for line in order]
        together = step(order, places, tokens, max(lengths) + 1)
        assert together is not None
        alone = [
            rows.single(line, tokens[i : i + 1], lengths[line]) for i, line in enumerate(order)
        ]
        difference = relative_difference(together.float(), torch.cat(alone).float())
        differences.append(difference)
        if difference <= largest_difference(rows.model):
            break
    for line, length in enumerate(lengths):
        rows.clear(line, 0, length + 1)
    return min(differences)
