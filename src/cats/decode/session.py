"""The state of one conversation: its buffers, what they hold, and how its last answer ended."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
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
from cats.protocols import ModelConfig


class Session:
    """Runs one request after the other. The beginning that two prompts share runs once.

    Only one thread at a time may use it.

    Attributes:
        reasons: Why each row of the last answer ended: ``"stop"`` (a token or text that ends it),
            ``"length"``, or ``"cancelled"``. Empty before the first answer and during an answer.
    """

    def __init__(self, model: nn.Module, config: ModelConfig, engine: str) -> None:
        """
        Args:
            model: A Hugging Face causal model.
            config: The configuration of its text part.
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
        """End the running answer after its current token. Any thread may call this."""
        self._cancelled.set()

    def answer(self, request: Request, turn: Turn) -> Iterator[Tensor]:
        """The tokens of each step, ``[B]``, int64 on the CPU. Rows that ended get padding.

        Args:
            request: The prompt and its options.
            turn: The right to run. When a later answer takes it, this one raises at its next step
                and no longer changes what the session remembers.
        """
        self._cancelled.clear()
        self.reasons = []
        options = request.options
        stops = stops_of(options, request.tokenizer, request.ids, request.mask)
        runner, marks = runner_of(self._model, self._engine)
        state, start = self._ready_state(runner, request, marks)
        prompt = request.ids.to(state.device)
        # what the cache holds is known again when this answer has ended
        self._stored = None
        length, count = request.length, options.max_new_tokens
        started = 1  # steps; the cache holds the tokens of all but the last
        tokens_read: list[Tensor] = []
        ended = torch.zeros(len(prompt), dtype=torch.bool)
        try:
            with torch.inference_mode():
                pending = deque([self._first(runner, state, request, start)])
            for number in range(count):
                turn.check()
                if self._cancelled.is_set() and tokens_read:
                    break
                with torch.inference_mode():
                    while started <= min(number + runner.engine.lag, count - 1):
                        self._step(runner, state, prompt, length + started, options)
                        pending.append(_Read(state, started))
                        started += 1
                    tokens = pending.popleft().wait()
                if options.sampling.do_sample:
                    check_drawn(tokens)
                tokens_read.append(tokens)
                shown = tokens.where(~ended, options.pad_token_id)
                for eos in options.eos_token_ids:
                    ended |= tokens == eos
                for stop in stops:
                    ended |= stop.add(shown)
                yield shown
                if ended.all():
                    break
        finally:
            if tokens_read and turn.is_valid():
                otherwise = "length" if len(tokens_read) == count else "cancelled"
                self.reasons = ["stop" if row else otherwise for row in ended.tolist()]
                # ids do not say which image a prompt had
                if not request.extras:
                    self._store(request, tokens_read[: started - 1])

    def logits(self, ids: Tensor, request: Request) -> tuple[Tensor, str]:
        """The logits of decode steps over known tokens; see ``Decoder.logits``.

        They run in buffers of their own, so that the conversation does not change.

        Args:
            ids: Token ids ``[B, T]``.
            request: The first ``P`` tokens as the prompt, with ``max_new_tokens`` of ``T - P + 1``.

        Returns:
            The logits after each token that follows the prompt, ``[B, T - P, V]``, NaN where the
            engine does not show them; and the name of the engine.
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
        # the first ones follow the prompt
        return state.logits[1:].transpose(0, 1), runner.name_for(len(ids))

    def _store(self, request: Request, steps: list[Tensor]) -> None:
        """Remember which tokens the cache holds: those of the prompt and of these steps."""
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
        """Run the newest tokens, and choose the next ones.

        Args:
            runner: Of the model.
            state: The buffers.
            ids: The tokens before the chosen ones, ``[B, T]``, on the model's device.
            length: Tokens of the longest row, the newest included.
            options: Of this request.
        """
        with runner.running(self._model, state):
            if runner.runs_again_at(self._model, length):
                # the embedding has no row for NO_TOKEN, at which the host raises
                chosen = state.chosen[: length - ids.shape[1]].T.clamp(min=0)
                state.frequencies = runner.frequencies(length)
                text = torch.cat([ids, chosen], dim=1)
                runner.engine.prefill(self._model, state, text, 0, options)
                return
            if state.frequencies != runner.frequencies(length):
                state.frequencies = None  # keys of different frequencies are stored
            runner.engine.step(self._model, state, length, options)

    def _ready_state(self, runner: Runner, request: Request, marks: Marks) -> tuple[State, int]:
        """Buffers for the whole answer, and how many tokens of the prompt they hold."""
        ids, mask = request.ids, request.mask
        state, stored, old_marks = self._state, self._stored, self._marks
        capacity = window_of(request.length + request.options.max_new_tokens)
        # a model that was released, or whose structure changed, has another runner
        same_runner = self._runner is not None and self._runner() is runner
        self._runner = ref(runner)
        same_weights = old_marks is not None and old_marks.content == marks.content
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
        # on the stream of the steps, the copy would delay the next step by 10 us
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
