"""The state of one conversation: its buffers, what they hold, and how its last answer ended."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from cats.decode.capture import window_of
from cats.decode.extras import extras_on
from cats.decode.marks import Marks, hides_settings
from cats.decode.options import Options
from cats.decode.request import Request
from cats.decode.runner import Runner, runner_of
from cats.decode.sampling import check_drawn
from cats.decode.state import State
from cats.decode.stop import stops_of
from cats.decode.turns import Turn


class Session:
    """Runs one request after the other; what a prompt shares with the last one is not run again.

    Its owner lets one thread at a time run it.

    Attributes:
        reasons: Why each row of the last answer ended: ``"stop"`` (a token or text that ends it),
            ``"length"``, or ``"cancelled"``; empty before the first and while one is running.
    """

    def __init__(self, model: nn.Module, config: Any, engine: str) -> None:
        """
        Args:
            model: A Hugging Face causal model.
            config: Of its text part.
            engine: Name of the engine.
        """
        self.reasons: list[str] = []
        self._model, self._config, self._engine = model, config, engine
        self._state: State | None = None
        self._marks: Marks | None = None
        self._runner: ref[Runner] | None = None
        self._stored: tuple[Tensor, Tensor] | None = None
        self._cancelled = threading.Event()

    def close(self) -> None:
        """Forget the conversation and free its memory."""
        self._state = self._marks = self._stored = None

    def cancel(self) -> None:
        """End the answer that is running after its current token; from any thread."""
        self._cancelled.set()

    def answer(self, request: Request, turn: Turn) -> Iterator[Tensor]:
        """The tokens of each step, ``[B]``, int64 on the CPU; rows that ended get padding.

        Args:
            request: What to continue.
            turn: The right to run. A later answer takes it away; this one then raises at its next
                step, and leaves the account of the session alone.
        """
        self._cancelled.clear()
        self.reasons = []
        options = request.options
        stops = stops_of(options, request.tokenizer, request.ids, request.mask)
        runner, marks = runner_of(self._model, self._engine)
        state, start = self._ready_state(runner, request, marks)
        given = request.ids.to(state.device)
        # until this answer's account is complete, another one finds no prefix
        self._stored = None
        length, count = request.length, options.max_new_tokens
        started = 1  # steps whose tokens are chosen; all but the newest are in the cache
        read: list[Tensor] = []
        ended = torch.zeros(len(given), dtype=torch.bool)
        try:
            with torch.inference_mode():
                pending = deque([self._first(runner, state, request, start)])
            for number in range(count):
                turn.check()
                if self._cancelled.is_set() and read:
                    break
                with torch.inference_mode():
                    while started <= min(number + runner.engine.lag, count - 1):
                        self._step(runner, state, given, length + started, options)
                        pending.append(_Read(state, started))
                        started += 1
                    tokens = pending.popleft().wait()
                if options.sampling.do_sample:
                    check_drawn(tokens)
                read.append(tokens)
                shown = tokens.where(~ended, options.pad_token_id)
                for eos in options.eos_token_ids:
                    ended |= tokens == eos
                for stop in stops:
                    ended |= stop.add(shown)
                yield shown
                if ended.all():
                    break
        finally:
            # a text with images is not recognised by its ids
            if read and turn.is_valid():
                rest = "length" if len(read) == count else "cancelled"
                self.reasons = ["stop" if row else rest for row in ended.tolist()]
                if not request.extras:
                    self._store(request, read[: started - 1])

    def logits(self, ids: Tensor, request: Request) -> tuple[Tensor, str]:
        """What steps make of given tokens, in buffers of their own; see ``Decoder.logits``.

        Args:
            ids: Token ids ``[B, T]``.
            request: Their beginning, and one new token for each of the others and one more.

        Returns:
            Logits behind each token after the prompt, ``[B, T - P, V]``, NaN where the engine does
            not show them, and the name of the engine.
        """
        runner, _ = runner_of(self._model, self._engine)
        length, options = ids.shape[1], request.options
        state = State(self._model, self._config, len(ids), window_of(length))
        shape = options.max_new_tokens, len(ids), self._config.vocab_size
        state.logits = torch.full(shape, torch.nan, device=state.device)
        self._first(runner, state, request, 0)
        for end in range(request.length + 1, length + 1):
            state.tokens.copy_(ids[:, end - 1 : end])
            self._step(runner, state, ids[:, :end].to(state.device), end, options)
        # the first is that of the prompt
        return state.logits[1:].transpose(0, 1), runner.name_for(len(ids))

    def _store(self, request: Request, steps: list[Tensor]) -> None:
        """Keep account of the tokens that the cache holds."""
        ids, mask = request.ids.cpu(), request.mask.cpu()
        new = torch.stack(steps, 1) if steps else ids[:, :0]
        self._stored = (
            torch.cat([ids, new], dim=1),
            torch.cat([mask, torch.ones_like(new, dtype=torch.bool)], dim=1),
        )

    def _first(self, runner: Runner, state: State, request: Request, start: int) -> _Read:
        """Run the prompt, and prepare every step that may follow."""
        options, length = request.options, request.length
        ids, mask = request.ids.to(state.device), request.mask.to(state.device)
        state.extras = extras_on(request.extras, state.device)
        runner.check_extras(self._model, ids, mask, state.extras)
        state.begin(ids, mask, self._config.vocab_size, options)
        state.frequencies = runner.frequencies(length)
        state.rotary = None if start == 0 else state.rotary
        with runner.running(self._model, state):
            runner.engine.prefill(self._model, state, ids[:, start:], start, options)
        first = _Read(state, 0)
        if options.max_new_tokens > 1:
            lengths = range(length + 1, length + options.max_new_tokens)
            runner.engine.prepare(self._model, state, lengths, options)
        return first

    def _step(
        self, runner: Runner, state: State, ids: Tensor, length: int, options: Options
    ) -> None:
        """Run the newest tokens, which make ``length`` a row, and choose the next ones.

        Args:
            runner: Of the model.
            state: The buffers.
            ids: What came before the chosen tokens, ``[B, T]``, on the model's device.
            length: Of a row.
            options: Of this request.
        """
        with runner.running(self._model, state):
            if runner.runs_again_at(self._model, length):
                # NO_TOKEN, at which the host raises, is no token of a pass
                chosen = state.chosen[: length - ids.shape[1]].T.clamp(min=0)
                state.frequencies = runner.frequencies(length)
                whole = torch.cat([ids, chosen], dim=1)
                runner.engine.prefill(self._model, state, whole, 0, options)
                return
            if state.frequencies != runner.frequencies(length):
                state.frequencies = None  # its keys are of two kinds
            runner.engine.step(self._model, state, length, options)

    def _ready_state(self, runner: Runner, request: Request, marks: Marks) -> tuple[State, int]:
        """Buffers for the whole answer, and how many tokens of the prompt they hold."""
        ids, mask = request.ids, request.mask
        state, stored, known = self._state, self._stored, self._marks
        capacity = window_of(request.length + request.options.max_new_tokens)
        # a released model, or one of another structure, has another runner
        same_runner = self._runner is not None and self._runner() is runner
        self._runner = ref(runner)
        same_weights = known is not None and known.content == marks.content
        self._marks = marks
        if state is None or not same_runner or state.batch != len(ids):
            with torch.inference_mode():
                self._state = State(self._model, self._config, len(ids), capacity)
            return self._state, 0
        if capacity > state.capacity:
            with torch.inference_mode():
                state.grow(capacity)
        frequencies = runner.frequencies(request.length)
        if (
            stored is None
            or request.extras
            or not same_weights
            or hides_settings(self._model)
            or frequencies is None
            or frequencies != state.frequencies
        ):
            return state, 0
        return state, min(_common_columns(stored, (ids.cpu(), mask.cpu())), request.length - 1)


class _Read:
    """The tokens of one step, ``[B]``, on their way to the host while later steps run."""

    def __init__(self, state: State, step: int) -> None:
        chosen, reader = state.chosen[step], state.reader
        self._event: torch.cuda.Event | None = None
        if reader is None:
            self._host = chosen.clone()
            return
        # not between two steps, where the GPU would wait 10 us for it
        reader.wait_stream(torch.cuda.current_stream(state.device))
        self._host = torch.empty_like(chosen, device="cpu", pin_memory=True)
        with torch.cuda.stream(reader):
            self._host.copy_(chosen, non_blocking=True)
            self._event = reader.record_event()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


def _common_columns(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> int:
    """How many columns from the left agree in ids and mask."""
    n = min(a[0].shape[1], b[0].shape[1])
    equal = (a[0][:, :n] == b[0][:, :n]) & (a[1][:, :n] == b[1][:, :n])
    return int(equal.all(0).long().cumprod(0).sum())
