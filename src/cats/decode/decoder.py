"""The decode loop: ``generate`` and ``Decoder``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn

from cats.decode.capture import window_of
from cats.decode.engines import AutoEngine, Engine, check_engine, make_engine
from cats.decode.inputs import Prompts, batch_of
from cats.decode.options import Options, resolve
from cats.decode.state import State
from cats.decode.stop import StopStrings
from cats.decode.turns import Turn, Turns
from cats.errors import BackendError, ConfigError, UnsupportedModelError

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
    **options: Any,
) -> Tensor:
    """Continue prompts, as ``model.generate`` does, with less overhead a token.

    Args:
        model: A Hugging Face causal model, sparse or dense.
        inputs: Token ids ``[B, T]``, what a tokenizer returns, or lists of ids; with a tokenizer
            also texts.
        attention_mask: ``[B, T]``, for prompts padded on the left.
        engine: ``"auto"``, ``"eager"``, ``"compiled"`` or ``"stream"``.
        tokenizer: Needed for ``stop_strings`` and for texts.
        callback: Called with each step's tokens, ``[B]``, int64 on the CPU.
        **options: As in transformers' ``GenerationConfig``, from which the rest comes:
            max_new_tokens, max_length, do_sample, temperature, top_k, top_p, min_p,
            repetition_penalty, eos_token_id, pad_token_id, stop_strings; and ``seed``.

    Returns:
        Prompts and new tokens, ``[B, T + N]``, int64, on the device of ``inputs``; rows that ended
        early are filled up with ``pad_token_id``.

    Raises:
        ConfigError: If an option cannot be right, or the prompt and its continuation are longer
            than the model's context.
        DataError: If the prompts cannot be right.
        UnsupportedModelError: If the model does not cache plain keys and values.
        BackendError: If the engine that was asked for cannot run.
    """
    return Decoder(model, engine=engine).generate(
        inputs, attention_mask=attention_mask, tokenizer=tokenizer, callback=callback, **options
    )


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
        self._marks: Hashable = None
        self._stored: tuple[Tensor, Tensor] | None = None

    @property
    def engine(self) -> str:
        """Name of the engine that runs one row without padding."""
        return self.engine_for(1)

    def engine_for(self, batch: int) -> str:
        """Name of the engine that runs so many rows without padding; a forced one's, always."""
        engine, _ = _engine(self.model, self._engine_name)
        return engine.name_for(batch) if isinstance(engine, AutoEngine) else engine.name

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
        **options: Any,
    ) -> Tensor:
        """See :func:`cats.generate`; what the prompt shares with the last call is not run again."""
        with self._turns.take() as turn:
            ids, mask, resolved = self._prepare(inputs, attention_mask, options, tokenizer)
            columns = []
            for tokens in self._run(turn, ids, mask, resolved, tokenizer):
                columns.append(tokens)
                if callback is not None:
                    callback(tokens)
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
                yield from self._run(turn, ids, mask, resolved, tokenizer)

        return _Stream(tokens())

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
            engine, _ = _engine(self.model, self._engine_name)
            state = State(self.model, self._config, len(ids), window_of(length))
            shape = state.capacity, len(ids), self._config.vocab_size
            state.logits = torch.full(shape, torch.nan, device=state.device)
            self._first(engine, state, prompt, mask[:, :prompt_length], 0, options)
            for end in range(prompt_length + 1, length + 1):
                state.tokens.copy_(ids[:, end - 1 : end])
                engine.step(self.model, state, end, options)
            found = state.logits[prompt_length:length]
        if found.isnan().all():
            raise BackendError(f"the engine {engine.name} does not show its logits")
        return found.transpose(0, 1)

    def _prepare(
        self,
        inputs: Prompts,
        attention_mask: Tensor | None,
        options: dict[str, Any],
        tokenizer: Any = None,
    ) -> tuple[Tensor, Tensor, Options]:
        pad = resolve(self.model, 0, {**options, "max_new_tokens": 1}).pad_token_id
        ids, mask = batch_of(
            inputs, attention_mask, pad_token_id=pad, vocabulary=self._config.vocab_size,
            tokenizer=tokenizer,
        )  # fmt: skip
        resolved = resolve(self.model, ids.shape[1], options)
        context = getattr(self._config, "max_position_embeddings", None)
        length = ids.shape[1] + resolved.max_new_tokens
        if context is not None and length > context:
            raise ConfigError(
                f"the prompt has {ids.shape[1]} tokens and {resolved.max_new_tokens} new ones were "
                f"asked for, but the model's context is {context}: shorten one of them"
            )
        return ids, mask, resolved

    def _run(
        self, turn: Turn, ids: Tensor, mask: Tensor, options: Options, tokenizer: Any
    ) -> Iterator[Tensor]:
        """The tokens of each step, on the CPU; keeps account of what the cache holds."""
        stop = (
            StopStrings(options.stop_strings, tokenizer, len(ids)) if options.stop_strings else None
        )
        length, count = ids.shape[1], options.max_new_tokens
        engine, marks = _engine(self.model, self._engine_name)
        state, start = self._ready_state(ids, mask, length + count, marks)
        # until this call's account is complete, another one finds no prefix
        self._stored = None
        started = 1  # steps whose tokens are chosen; all but the newest are in the cache
        read: list[Tensor] = []
        ended = torch.zeros(len(ids), dtype=torch.bool)
        try:
            with torch.inference_mode():
                pending = deque([self._first(engine, state, ids, mask, start, options)])
            for number in range(count):
                turn.check()
                with torch.inference_mode():
                    while started <= min(number + engine.lag, count - 1):
                        engine.step(self.model, state, length + started, options)
                        pending.append(_Read(state, length + started))
                        started += 1
                    tokens = pending.popleft().wait()
                read.append(tokens)
                shown = tokens.where(~ended, options.pad_token_id)
                for eos in options.eos_token_ids:
                    ended |= tokens == eos
                if stop is not None:
                    ended |= stop.add(shown)
                yield shown
                if ended.all():
                    break
        finally:
            if read and turn.is_valid():
                new = torch.stack(read[: started - 1], 1) if started > 1 else ids[:, :0].cpu()
                self._stored = (
                    torch.cat([ids.cpu(), new], dim=1),
                    torch.cat([mask.cpu(), torch.ones_like(new, dtype=torch.bool)], dim=1),
                )

    def _first(
        self,
        engine: Engine,
        state: State,
        ids: Tensor,
        mask: Tensor,
        start: int,
        options: Options,
    ) -> _Read:
        """Run the prompt, and prepare every step that may follow."""
        ids, mask = ids.to(state.device), mask.to(state.device)
        state.begin(ids, mask, self._config.vocab_size, options)
        engine.prefill(self.model, state, ids[:, start:], start, options)
        first = _Read(state, ids.shape[1])
        if options.max_new_tokens > 1:
            lengths = range(ids.shape[1] + 1, ids.shape[1] + options.max_new_tokens)
            engine.prepare(self.model, state, lengths, options)
        return first

    def _ready_state(
        self, ids: Tensor, mask: Tensor, length: int, marks: Hashable
    ) -> tuple[State, int]:
        """Buffers for ``length`` tokens a row, and how many tokens of the prompt they hold."""
        state, stored = self._state, self._stored
        capacity = window_of(length)
        if state is None or marks != self._marks or state.batch != len(ids):
            with torch.inference_mode():
                self._state = State(self.model, self._config, len(ids), capacity)
            self._marks = marks
            return self._state, 0
        if capacity > state.capacity:
            with torch.inference_mode():
                state.grow(capacity)
        if stored is None:
            return state, 0
        return state, min(_common_columns(stored, (ids.cpu(), mask.cpu())), ids.shape[1] - 1)


class _Stream(Iterator[Tensor]):
    """What a generator yields; it is closed when this is dropped, and before the interpreter ends.

    Python would leave a generator that is half read at exit to the end of torch itself.
    """

    def __init__(self, tokens: Generator[Tensor]) -> None:
        self._tokens = tokens
        self.close = finalize(self, tokens.close)

    def __next__(self) -> Tensor:
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


# What was traced or compiled of each model, by the name of the engine. An engine holds weights,
# not the model, so that an entry goes when its model goes.
_ENGINES: WeakKeyDictionary[nn.Module, dict[str, tuple[Hashable, Engine]]] = WeakKeyDictionary()


def _engine(model: nn.Module, name: str) -> tuple[Engine, Hashable]:
    """The engine for a model as it is now, and the fingerprint of that."""
    engines = _ENGINES.setdefault(model, {})
    marks = _fingerprint(model)
    if name not in engines or engines[name][0] != marks:
        engine = make_engine(name, model)
        # an engine may lay out weights anew
        engines[name] = _fingerprint(model), engine
    marks, engine = engines[name]
    return engine, marks


def _fingerprint(model: nn.Module) -> Hashable:
    """Differs where a module, tensor, hook or setting of a module was added, changed or replaced.

    A trace keeps what modules decide by their settings, such as whether an adapter is merged.
    """
    modules = tuple(
        (id(m), len(m._forward_hooks), len(m._forward_pre_hooks), _settings(m))
        for m in model.modules()
    )
    tensors = tuple(
        (t.data_ptr(), t.dtype, t.device, 0 if t.is_inference() else t._version)
        for t in (*model.parameters(), *model.buffers())
    )
    config: Any = model.config
    return modules, tensors, getattr(config, "_attn_implementation", None)


# What every module has, but for its mode.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def _settings(module: nn.Module) -> Hashable:
    """Attributes that are numbers, texts, or lists and dictionaries of these."""
    found: list[tuple[str, Hashable]] = []
    # called for every module before each generation: nothing is built for what does not count
    for name, value in vars(module).items():
        if value is None or type(value) in (bool, int, float, str):
            found.append((name, value))
        elif name not in _OF_EVERY_MODULE and _is_plain(value):
            found.append((name, repr(value)))
    return tuple(found)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
