"""Steps of rows as flat lists of operators, with our own operators on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cats.decode.cpu_kernels import use_cpu_kernels
from cats.decode.forward import TRACED_SLOTS, last_logits, trace_for_any_length
from cats.decode.rows.cache import RowCache
from cats.decode.rows.masks import Mask, Masks
from cats.decode.tracing import shadow_of


class TracedSteps:
    """One list of operators per number of rows, 1, 2, 4 and so on; each serves any length.

    Fewer rows than that are filled up by copies of the first one, whose logits nobody reads.
    """

    def __init__(self, cache: RowCache, masks: Masks) -> None:
        self._cache, self._masks = cache, masks
        self._steps: dict[int, Callable[..., Tensor]] = {}

    def forget(self) -> None:
        """The model is no longer the one that was traced."""
        self._steps.clear()

    def trace(self, model: nn.Module, size: int) -> bool:
        """Trace the step of ``size`` rows; whether its operators do not depend on the length.

        Raises:
            Exception: Whatever stops the tracing, such as a branch on the value of a tensor.
        """
        cache, traced_model = self._cache, shadow_of(model)
        if cache.capacity < TRACED_SLOTS:
            return False

        def step(
            tokens: Tensor,
            positions: Tensor,
            rows: Tensor,
            mask: Mask,
            stored: list[Tensor],
        ) -> Tensor:
            cache.lines, cache.slots, cache.first = rows, positions[:, 0], 0
            cache.window = TRACED_SLOTS
            own = cache.buffers()
            cache.use(stored)
            try:
                return last_logits(traced_model, tokens, positions, mask, cache)
            finally:
                cache.use(own)

        device = cache.buffers()[0].device
        positions = torch.zeros(size, 1, dtype=torch.int64, device=device)
        stored = [t.new_zeros(size, t.shape[1], TRACED_SLOTS, t.shape[3]) for t in cache.buffers()]
        rows, mask = torch.arange(size, device=device), self._masks.of(positions, TRACED_SLOTS)
        graph = trace_for_any_length(step, (positions.clone(), positions, rows, mask, stored))
        if graph is not None:
            self._steps[size] = use_cpu_kernels(graph)
        return graph is not None

    def logits(
        self, lines: Sequence[int], positions: Sequence[int], tokens: Tensor, window: int
    ) -> Tensor | None:
        """As :meth:`ModuleRows.logits`; None where no step for so many rows was traced."""
        count = len(lines)
        size = min((size for size in self._steps if size >= count), default=None)
        if size is None:
            return None
        # beyond the rows comes the first one, again and again
        chosen = [*range(count), *[0] * (size - count)]
        lines = [lines[i] for i in chosen]
        device = tokens.device
        rows = torch.arange(size, device=device)
        place = torch.tensor([positions[i] for i in chosen], device=device)
        if size > count:
            tokens = tokens[torch.tensor(chosen, device=device)]
        views = self._cache.consecutive(lines, window)
        stored, line = views, torch.tensor(lines, device=device)
        if stored is None:
            stored = [t[:, :, :window].index_select(0, line) for t in self._cache.buffers()]
        mask = self._masks.of(place[:, None], window)
        logits = self._steps[size](tokens[:, None], place[:, None], rows, mask, stored)
        if views is None:
            # the new keys and values lie in the copy
            line, slot, row = line[:count], place[:count], rows[:count]
            for buffer, copied in zip(self._cache.buffers(), stored, strict=True):
                buffer[line, :, slot] = copied[row, :, slot]
        return logits[:count]
