"""Rows of any lengths by the model's own modules, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cats.decode.forward import arguments_of, last_logits, prefill
from cats.decode.rotary import LengthRule
from cats.decode.rows.cache import RowCache
from cats.decode.rows.choice import choose_tokens
from cats.decode.rows.masks import Masks
from cats.decode.rows.reads import ReadCounter
from cats.decode.rows.row import Row
from cats.decode.rows.traced import TracedSteps
from cats.decode.state import State, device_of
from cats.errors import UnsupportedModelError
from cats.protocols import CausalModel
from cats.weights.placement import is_dispatched


class ModuleRows:
    """Calls the model with a mask, positions and slots for each row; see :class:`RowEngine`.

    A piece of a prompt runs as in :class:`cats.Decoder`: one row, for which the model makes its
    own masks.

    Attributes:
        model: The model.
        cache: Its keys and values.
        traced: What runs instead of the modules where it was traced.
        vocabulary: Size of its vocabulary.
    """

    def __init__(self, model: nn.Module, lines: int, capacity: int) -> None:
        """
        Args:
            model: A Hugging Face causal model that can be decoded from keys and values.
            lines: Lines of the cache.
            capacity: Slots of each.

        Raises:
            UnsupportedModelError: If rows of different lengths cannot run together.
        """
        self.model = model
        self._config = cast(CausalModel, model).config.get_text_config(decoder=True)
        self.vocabulary = self._config.vocab_size
        self.lines, self.capacity = lines, capacity
        self.device = device_of(model)
        self.lag = 1 if self.device.type == "cuda" else 0
        self._check_form()
        self._single = State(model, self._config, 1, capacity)
        self._masks = Masks(self._single.cache.kinds, self._config, next(model.parameters()).dtype)
        # shows what each layer stores
        prefill(model, self._single, self._single.tokens, 0)
        self.cache = RowCache(self._single.cache.buffers(), lines, capacity)
        self.traced = TracedSteps(self.cache, self._masks)
        self._reads: ReadCounter | None = None
        # the newest token of each line
        self._tokens = torch.zeros(lines, dtype=torch.int64, device=self.device)

    def prefill(self, row: Row, count: int) -> Tensor | None:
        stop = row.done + count
        logits = self.single(row.line.index, row.ids[row.done : stop], row.done)
        if stop < len(row.ids):
            return None
        token = choose_tokens(logits, [row.choice])
        self._tokens[row.line.index] = token[0].clamp(min=0)
        return token

    def step(self, rows: Sequence[Row]) -> Tensor:
        lines, positions = [row.line.index for row in rows], [row.position for row in rows]
        index = torch.tensor(lines, device=self.device)
        inputs = lines, positions, self._tokens[index], max(positions) + 1
        logits = self.traced.logits(*inputs)
        if logits is None:
            logits = self.logits(*inputs)
        tokens = choose_tokens(logits, [row.choice for row in rows])
        self._tokens[index] = tokens.clamp(min=0)
        return tokens

    def counted_step(self, row: Row) -> tuple[Tensor, float]:
        line = row.line.index
        if self._reads is None:
            self._reads = ReadCounter(self.model)
        newest = self._tokens[line : line + 1]
        logits, share = self._reads.run(
            lambda model: self._run_single(model, line, newest, row.position)
        )
        token = choose_tokens(logits, [row.choice])
        self._tokens[line] = token[0].clamp(min=0)
        return token, share

    def forget(self) -> None:
        self.traced.forget()
        self._reads = None

    def free(self) -> None:
        self.forget()
        self.cache.free()

    @property
    def span(self) -> int | None:
        """How far sliding layers see; None without any."""
        return self._masks.span

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        self.cache.copy(source, target, slice(start, stop))

    def clear(self, line: int, start: int, stop: int) -> None:
        self.cache.clear(line, slice(start, stop))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def single(self, line: int, ids: Tensor, start: int) -> Tensor:
        """Logits ``[1, V]`` of the last of some tokens ``[T]`` of one line, from slot ``start``."""
        return self._run_single(self.model, line, ids, start)

    def _run_single(self, model: nn.Module, line: int, ids: Tensor, start: int) -> Tensor:
        state = self._single
        with state.cache.working_on(self.cache.line(line)):
            return prefill(model, state, ids[None], start)

    def logits(
        self, lines: Sequence[int], positions: Sequence[int], tokens: Tensor, window: int
    ) -> Tensor:
        """Logits ``[R, V]`` of one token per row, module by module.

        Args:
            lines: The line of each row.
            positions: Position and slot of its newest token.
            tokens: That token, ``[R]``.
            window: How many slots attention reads.
        """
        place = torch.tensor(positions, device=self.device)[:, None]
        self.cache.use_rows(lines, place[:, 0], window, self.device)
        mask = self._masks.of(place, window)
        logits = last_logits(self.model, tokens[:, None], place, mask, self.cache)
        return logits.to(self.device)

    def _check_form(self) -> None:
        """
        Raises:
            UnsupportedModelError: If something other than its layers forbids rows.
        """
        reason = None
        if LengthRule.of(self._config) is not None:
            reason = "its rotary frequencies depend on the length of the text"
        elif missing := {"attention_mask", "position_ids"} - arguments_of(self.model):
            reason = f"its forward pass takes no {' and no '.join(sorted(missing))}"
        elif is_dispatched(self.model):
            reason = "accelerate moves its inputs or weights between devices (device_map)"
        if reason is not None:
            raise UnsupportedModelError(reason)
