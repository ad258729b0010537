"""Whether rows of different lengths give what each of them gives alone."""

from __future__ import annotations

import torch
from torch import nn

from cats.decode.rows.modules import ModuleRows
from cats.decode.runner import largest_difference
from cats.decode.tracing import copy_to_probe, exclusion, first_line, relative_difference
from cats.errors import CatsError, UnsupportedModelError

_TEXTS = 3


def checked_rows(model: nn.Module, lines: int, capacity: int) -> ModuleRows:
    """An engine for rows of any lengths, compared with single rows.

    Args:
        model: A Hugging Face causal model that can be decoded from keys and values.
        lines: Lines of the cache.
        capacity: Slots of each.

    Raises:
        UnsupportedModelError: If rows of different lengths cannot run together.
    """
    with exclusion.tracing(), torch.inference_mode():
        try:
            # hooks of the user do not see what is run for the check
            engine = ModuleRows(copy_to_probe(model), lines, capacity)
            difference = difference_from_single_rows(engine)
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
    return engine


def difference_from_single_rows(rows: ModuleRows) -> float:
    """Relative difference between the logits of a step of several rows and those of single rows.

    Lines are filled with random keys and values, so that lengths beyond a sliding window cost no
    more than short ones. They are zero afterwards. In 16 bits, a rounding can choose other neurons
    or experts for one text, but not for all: the smallest of several differences counts.

    Args:
        rows: An engine whose lines are free.
    """
    generator = torch.Generator(rows.device).manual_seed(0)
    last = rows.capacity - 1
    span = rows.span if rows.span is not None else 17
    # within what a layer sees, just beyond it, and far beyond it
    lengths = [min(length, last) for length in (2, span + 1, span + 40)][: rows.lines]
    # from the last line to the first: a row that is found by its number would be seen
    order = torch.arange(len(lengths), device=rows.device).flip(0)
    positions = torch.tensor(lengths, device=rows.device)[:, None]
    differences = []
    for _ in range(_TEXTS):
        for line, length in enumerate(lengths):
            for buffer in rows.cache.line(line):
                buffer[:, :, :length].normal_(generator=generator)
        shape = len(lengths), 1
        tokens = torch.randint(rows.vocabulary, shape, generator=generator, device=rows.device)
        together = rows.logits(order, positions[order], tokens[order], max(lengths) + 1)
        alone = [rows.single(line, tokens[line], lengths[line]) for line in order.tolist()]
        differences.append(relative_difference(together.float(), torch.cat(alone).float()))
    for line, length in enumerate(lengths):
        rows.clear(line, 0, length + 1)
    return min(differences)
