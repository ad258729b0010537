"""The decode loop: ``generate`` and ``Decoder``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, TypeVar
from weakref import finalize

import torch
from torch import Tensor, nn

from cats.decode.capture import window_of
from cats.decode.engines import check_engine
from cats.decode.extras import extras_of, extras_on
from cats.decode.inputs import Prompts, batch_of
from cats.decode.marks import Marks
from cats.decode.options import Options, padding, resolve
from cats.decode.rotary import LengthRule
from cats.decode.runner import Runner, runner_of
from cats.decode.sampling import check_drawn
from cats.decode.state import State
from cats.decode.stop import stops_of
from cats.decode.text import Detokenizer
from cats.decode.turns import Turn, Turns
from cats.errors import BackendError, ConfigError, DataError, UnsupportedModelError

Piece = TypeVar("Piece")

# The likeliest token, whatever the model's own settings are; no end before the last token.
_PLAIN: dict[str, Any] = {
    "do_sample": False, "repetition_penalty": 1.0, "eos_token_id": None, "stop_strings": None,
}  # fmt: skip


def generate(
    model: nn.Module,
    inputs: Prompts,
    *,
    attention_mask: Tensor | None = None,
    engine: str = "auto",
    tokenizer: Any = None,
    callback: Callable[[Tensor], object] | None = None,
    streamer: Any = None,
    **options: Any,
) -> Tensor:
    """Continue prompts, as ``model.generate`` does, with less overhead a token.

    Args:
        model: A Hugging Face causal model, sparse or dense.
        inputs: Token ids ``[B, T]``, what a tokenizer returns, or lists of ids; with a tokenizer
            also texts.
        attention_mask: ``[B, T]``, for prompts padded on the left. Without one, ``pad_token_id`` in
            a tensor of ids is padding, as in transformers.
        engine: ``"auto"``, ``"eager"``, ``"compiled"`` or ``"stream"``.
        tokenizer: Needed for ``stop_strings`` and for texts.
        callback: Called with each step's tokens, ``[B]``, int64 on the CPU.
        streamer: One of transformers, given the prompt and each step's tokens.
        **options: As in transformers' ``GenerationConfig``, with the same defaults, or a whole
            ``generation_config``; ``logits_processor``, ``stopping_criteria`` and
            ``prefix_allowed_tokens_fn``; and ``seed``. Those that change the scores in other ways
            than do_sample, temperature, top_k, top_p, min_p and repetition_penalty run on each step
            as transformers' own processors, which costs time on a GPU. Other kinds of generation,
            such as beams, are refused. Stop strings are looked for in the new text only.

    Returns:
        Prompts and new tokens, ``[B, T + N]``, int64, on the device of ``inputs``; rows that ended
        early are filled up with ``pad_token_id``. ``B`` counts ``num_return_sequences`` rows for
        each prompt.

    Raises:
        ConfigError: If an option cannot be right, or the prompt and its continuation are longer
            than the model's context.
        DataError: If the prompts cannot be right.
        UnsupportedModelError: If the model does not cache plain keys and values.
        BackendError: If the engine that was asked for cannot run.
        LogitsError: If a token is to be drawn, and the logits are NaN or infinite.
    """
    return Decoder(model, engine=engine).generate(
        inputs, attention_mask=attention_mask, tokenizer=tokenizer, callback=callback,
        streamer=streamer, **options,
    )  # fmt: skip


class Decoder:
    """A conversation with a model: its next prompt costs only what is new in it.

    Several decoders of one model share what was traced or compiled. Threads that use one decoder
    wait for each other.
    """

    def __init__(self, model: nn.Module, *, engine: str = "auto") -> None:
        """
        Args:
            model: A Hugging Face causal model, sparse or dense. It may be changed between calls:
                other modules, hooks and settings, and weights that are replaced or written to,
                are seen. Two ways to write are not, since torch keeps no account of them:
                in place through ``weight.data``, and through memory shared with NumPy. Call
                :meth:`reset` after those; the next prompt then runs whole.
            engine: ``"auto"``, ``"eager"``, ``"compiled"`` or ``"stream"``.
        """
        # what torch.compile(model) wraps
        model = getattr(model, "_orig_mod", model)
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "get_text_config"):
            raise UnsupportedModelError(
                f"expected a Hugging Face causal model, got {type(model).__name__}"
            )
        check_engine(engine)
        self.model = model
        self._config: Any = config.get_text_config(decoder=True)
        self._engine_name = engine
        self._turns = Turns()
        self._state: State | None = None
        self._marks: Marks | None = None
        self._stored: tuple[Tensor, Tensor] | None = None

    @property
    def engine(self) -> str:
        """Name of the engine that runs one row without padding."""
        return self.engine_for(1)

    def engine_for(self, batch: int) -> str:
        """Name of the engine that runs so many rows without padding; a forced one's, always."""
        return runner_of(self.model, self._engine_name)[0].name_for(batch)

    def reset(self) -> None:
        """Forget the conversation and free its memory; needed after writes through ``.data``."""
        with self._turns.take():
            self._state = self._stored = None

    def generate(
        self,
        inputs: Prompts,
        *,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
        callback: Callable[[Tensor], object] | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> Tensor:
        """See :func:`cats.generate`; what the prompt shares with the last call is not run again."""
        shows = [s for s in (callback, getattr(streamer, "put", None)) if s is not None]
        with self._turns.take() as turn:
            ids, mask, resolved = self._prepare(inputs, attention_mask, options, tokenizer)
            columns = []
            extras = extras_of(inputs, self.model)
            if streamer is not None:
                streamer.put(ids.cpu())
            for tokens in self._run(turn, ids, mask, resolved, tokenizer, extras):
                columns.append(tokens)
                for show in shows:
                    show(tokens)
        if streamer is not None:
            streamer.end()
        return torch.cat([ids, torch.stack(columns, dim=1).to(ids.device)], dim=1)

    def stream(
        self,
        inputs: Prompts,
        *,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """The tokens of each step, ``[B]``, int64 on the CPU, as they come.

        The iterator may be dropped at any time. Another call on this decoder ends it: its next
        token is an error.
        """

        def tokens() -> Generator[Tensor]:
            with self._turns.take() as turn:
                ids, mask, resolved = self._prepare(inputs, attention_mask, options, tokenizer)
                extras = extras_of(inputs, self.model)
                yield from self._run(turn, ids, mask, resolved, tokenizer, extras)

        return _Stream(tokens())

    def stream_text(
        self,
        inputs: Prompts,
        *,
        tokenizer: Any,
        attention_mask: Tensor | None = None,
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> Iterator[str]:
        """The new text of one row, in pieces, as soon as later tokens cannot change it.

        The pieces join to ``tokenizer.decode`` of all new tokens; a stop string is part of it, as
        in transformers. The iterator behaves as that of :meth:`stream`.

        Raises:
            DataError: At its first piece, if there is more than one row.
        """

        def pieces() -> Generator[str]:
            with self._turns.take() as turn:
                ids, mask, resolved = self._prepare(inputs, attention_mask, options, tokenizer)
                if len(ids) > 1:
                    raise DataError(
                        f"stream_text continues one prompt, got {len(ids)} rows: use stream, or a "
                        "decoder for each"
                    )
                text = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
                extras = extras_of(inputs, self.model)
                for tokens in self._run(turn, ids, mask, resolved, tokenizer, extras):
                    if piece := text.add(tokens.tolist()):
                        yield piece
                if piece := text.end():
                    yield piece

        return _Stream(pieces())

    def logits(self, ids: Tensor, *, prompt_length: int) -> Tensor:
        """What this engine's steps make of given tokens, whatever they would choose themselves.

        The conversation is left as it is; buffers and a captured step of its own are used.

        Args:
            ids: Token ids ``[B, T]``, without padding.
            prompt_length: How many of them are the prompt; a step runs each of the others.

        Returns:
            Logits behind each token after the prompt, ``[B, T - prompt_length, V]``, float32, on
            the model's device.

        Raises:
            ConfigError: If there is no token after the prompt, or one too many for the context.
            BackendError: If the engine cannot run, or does not show its logits.
        """
        length = ids.shape[1]
        if not 0 < prompt_length < length:
            raise ConfigError(
                f"expected a prompt shorter than the {length} tokens, got {prompt_length}"
            )
        with self._turns.take(), torch.inference_mode():
            mask = torch.ones_like(ids, dtype=torch.bool)
            given = {**_PLAIN, "max_new_tokens": length - prompt_length + 1}
            prompt, _, options = self._prepare(ids[:, :prompt_length], None, given)
            runner, _ = runner_of(self.model, self._engine_name)
            state = State(self.model, self._config, len(ids), window_of(length))
            shape = state.capacity, len(ids), self._config.vocab_size
            state.logits = torch.full(shape, torch.nan, device=state.device)
            self._first(runner, state, prompt, mask[:, :prompt_length], 0, options)
            for end in range(prompt_length + 1, length + 1):
                state.tokens.copy_(ids[:, end - 1 : end])
                self._step(runner, state, ids[:, :end].to(state.device), end, options)
            found = state.logits[prompt_length:length]
        if found.isnan().all():
            name = runner.name_for(len(ids))
            raise BackendError(f"the engine {name} does not show its logits")
        return found.transpose(0, 1)

    def _prepare(
        self,
        inputs: Prompts,
        attention_mask: Tensor | None,
        options: dict[str, Any],
        tokenizer: Any = None,
    ) -> tuple[Tensor, Tensor, Options]:
        pad, infer_mask = padding(self.model, options)
        ids, mask = batch_of(
            inputs, attention_mask, pad_token_id=pad, vocabulary=self._config.vocab_size,
            infer_mask=infer_mask, tokenizer=tokenizer,
        )  # fmt: skip
        resolved = resolve(self.model, ids.shape[1], options)
        if resolved.num_return_sequences > 1:
            ids, mask = (t.repeat_interleave(resolved.num_return_sequences, 0) for t in (ids, mask))
        rule = LengthRule.of(self._config)
        context = (
            getattr(self._config, "max_position_embeddings", None) if rule is None else rule.limit
        )
        length = ids.shape[1] + resolved.max_new_tokens
        if context is not None and length > context:
            raise ConfigError(
                f"the prompt has {ids.shape[1]} tokens and {resolved.max_new_tokens} new ones were "
                f"asked for, but the model's context is {context}: shorten one of them"
            )
        return ids, mask, resolved

    def _run(
        self,
        turn: Turn,
        ids: Tensor,
        mask: Tensor,
        options: Options,
        tokenizer: Any,
        extras: Mapping[str, Any],
    ) -> Iterator[Tensor]:
        """The tokens of each step, on the CPU; keeps account of what the cache holds."""
        if extras and options.num_return_sequences > 1:
            raise ConfigError(
                f"num_return_sequences is not taken with {', '.join(extras)}: repeat the rows"
            )
        stops = stops_of(options, tokenizer, ids, mask)
        length, count = ids.shape[1], options.max_new_tokens
        runner, marks = runner_of(self.model, self._engine_name)
        state, start = self._ready_state(runner, ids, mask, length + count, marks, bool(extras))
        given = ids.to(state.device)
        # until this call's account is complete, another one finds no prefix
        self._stored = None
        started = 1  # steps whose tokens are chosen; all but the newest are in the cache
        read: list[Tensor] = []
        ended = torch.zeros(len(ids), dtype=torch.bool)
        try:
            with torch.inference_mode():
                if extras:
                    state.extras = extras_on(extras, state.device)
                    runner.check_extras(self.model, given, mask.to(state.device), state.extras)
                pending = deque([self._first(runner, state, ids, mask, start, options)])
            for number in range(count):
                turn.check()
                with torch.inference_mode():
                    while started <= min(number + runner.engine.lag, count - 1):
                        self._step(runner, state, given, length + started, options)
                        pending.append(_Read(state, length + started))
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
            if read and turn.is_valid() and not extras:
                new = torch.stack(read[: started - 1], 1) if started > 1 else ids[:, :0].cpu()
                self._stored = (
                    torch.cat([ids.cpu(), new], dim=1),
                    torch.cat([mask.cpu(), torch.ones_like(new, dtype=torch.bool)], dim=1),
                )

    def _first(
        self,
        runner: Runner,
        state: State,
        ids: Tensor,
        mask: Tensor,
        start: int,
        options: Options,
    ) -> _Read:
        """Run the prompt, and prepare every step that may follow."""
        ids, mask = ids.to(state.device), mask.to(state.device)
        state.begin(ids, mask, self._config.vocab_size, options)
        state.frequencies = runner.frequencies(ids.shape[1])
        engine = runner.engine
        with runner.running():
            engine.prefill(self.model, state, ids[:, start:], start, options)
        first = _Read(state, ids.shape[1])
        if options.max_new_tokens > 1:
            lengths = range(ids.shape[1] + 1, ids.shape[1] + options.max_new_tokens)
            engine.prepare(self.model, state, lengths, options)
        return first

    def _step(
        self, runner: Runner, state: State, ids: Tensor, length: int, options: Options
    ) -> None:
        """Run the newest tokens, which make ``length`` a row, and choose the next ones.

        Args:
            runner: Of the model.
            state: The conversation.
            ids: What came before the chosen tokens, ``[B, T]``, on the model's device.
            length: Of a row.
            options: Of this call.
        """
        with runner.running():
            if runner.runs_again_at(self.model, length):
                # NO_TOKEN, at which the host raises, is no token of a pass
                chosen = state.chosen[ids.shape[1] : length].T.clamp(min=0)
                state.frequencies = runner.frequencies(length)
                whole = torch.cat([ids, chosen], dim=1)
                runner.engine.prefill(self.model, state, whole, 0, options)
                return
            if state.frequencies != runner.frequencies(length):
                state.frequencies = None  # its keys are of two kinds
            runner.engine.step(self.model, state, length, options)

    def _ready_state(
        self,
        runner: Runner,
        ids: Tensor,
        mask: Tensor,
        length: int,
        marks: Marks,
        extras: bool,
    ) -> tuple[State, int]:
        """Buffers for ``length`` tokens a row, and how many tokens of the prompt they hold."""
        state, stored, known = self._state, self._stored, self._marks
        capacity = window_of(length)
        if (
            state is None
            or known is None
            or known.structure != marks.structure
            or state.batch != len(ids)
        ):
            with torch.inference_mode():
                self._state = State(self.model, self._config, len(ids), capacity)
            self._marks = marks
            return self._state, 0
        same_weights, self._marks = known.content == marks.content, marks
        if capacity > state.capacity:
            with torch.inference_mode():
                state.grow(capacity)
        frequencies = runner.frequencies(ids.shape[1])
        if (
            stored is None
            or extras
            or not same_weights
            or frequencies is None
            or frequencies != state.frequencies
        ):
            return state, 0
        return state, min(_common_columns(stored, (ids.cpu(), mask.cpu())), ids.shape[1] - 1)


class _Stream(Iterator[Piece]):
    """What a generator yields; it is closed when this is dropped, and before the interpreter ends.

    Python would leave a generator that is half read at exit to the end of torch itself.
    """

    def __init__(self, tokens: Generator[Piece]) -> None:
        self._tokens = tokens
        self.close = finalize(self, tokens.close)

    def __next__(self) -> Piece:
        return next(self._tokens)


class _Read:
    """The tokens chosen for a slot, ``[B]``, on their way to the host while later steps run."""

    def __init__(self, state: State, slot: int) -> None:
        chosen, reader = state.chosen[slot], state.reader
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
