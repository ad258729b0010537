"""The decode loop: ``generate`` and ``Decoder``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Protocol, TypeVar
from weakref import finalize

import torch
from torch import Tensor, nn

from cats.decode.engines import check_engine
from cats.decode.inputs import Prompts
from cats.decode.request import Request
from cats.decode.runner import runner_of
from cats.decode.session import Session
from cats.decode.text import Detokenizer
from cats.decode.turns import Turns
from cats.errors import BackendError, ConfigError, DataError, UnsupportedModelError
from cats.protocols import ModelConfig, Tokenizer

Piece = TypeVar("Piece")


class Streamer(Protocol):
    """One of transformers, such as ``TextStreamer``."""

    def put(self, value: Tensor) -> object:
        """Take the prompt, ``[B, T]``, and then the tokens of each step, ``[B]``."""

    def end(self) -> object:
        """No more tokens follow."""


def generate(
    model: nn.Module,
    inputs: Prompts,
    *,
    attention_mask: Tensor | None = None,
    engine: str = "auto",
    tokenizer: Tokenizer | None = None,
    callback: Callable[[Tensor], object] | None = None,
    streamer: Streamer | None = None,
    **options: Any,
) -> Tensor:
    """Continue prompts, as ``model.generate`` does, with less overhead per token.

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
        **options: As in transformers' ``GenerationConfig``, with the same defaults, or a complete
            ``generation_config``; ``logits_processor``, ``stopping_criteria`` and
            ``prefix_allowed_tokens_fn``; and ``seed``. The common options that change the scores
            are do_sample, temperature, top_k, top_p, min_p and repetition_penalty. The others run
            on each step as transformers' own processors, which costs time on a GPU. Other kinds
            of generation, such as beams, are refused. Stop strings are looked for in the new text
            only.

    Returns:
        Prompts and new tokens, ``[B, T + N]``, int64, on the device of ``inputs``; rows that ended
        early are filled up with ``pad_token_id``. ``B`` counts ``num_return_sequences`` rows per
        prompt.

    Raises:
        ConfigError: If an option is unknown or out of range, or the prompt and its continuation
            are longer than the model's context.
        DataError: If the prompts are no token ids of the model, or the mask does not fit them.
        UnsupportedModelError: If the model does not cache plain keys and values.
        BackendError: If the engine that was asked for cannot run.
        LogitsError: If a token is to be drawn, and the logits are NaN or infinite.
    """
    return Decoder(model, engine=engine).generate(
        inputs,
        attention_mask=attention_mask,
        tokenizer=tokenizer,
        callback=callback,
        streamer=streamer,
        **options,
    )


class Decoder:
    """A conversation with a model: its next prompt costs only what is new in it.

    Several decoders of one model share what was traced or compiled. Threads that use one decoder
    wait for each other.

    Example:
        >>> decoder = cats.Decoder(model)
        >>> ids = decoder.generate("A cat is", tokenizer=tokenizer, max_new_tokens=20)
        >>> decoder.reasons
        ['length']
    """

    def __init__(self, model: nn.Module, *, engine: str = "auto") -> None:
        """
        Args:
            model: A Hugging Face causal model, sparse or dense. It may be changed between calls.
                Other modules, hooks and settings are seen, and so are weights that are replaced
                or written to. Two kinds of write are not seen, because torch does not count them:
                in place through ``weight.data``, and through memory shared with NumPy. Call
                :meth:`reset` after those; the next prompt is then computed from its first token.
                After changes outside of the model, such as a function of torch that was
                replaced, call :func:`cats.release`.
            engine: ``"auto"``, ``"eager"``, ``"compiled"`` or ``"stream"``.
        """
        # torch.compile(model) keeps the model in this attribute
        model = getattr(model, "_orig_mod", model)
        config: ModelConfig | None = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise UnsupportedModelError(
                f"expected a Hugging Face causal model, got {type(model).__name__}"
            )
        check_engine(engine)
        self.model = model
        self._config = config.get_text_config(decoder=True)
        self._engine_name = engine
        self._turns = Turns()
        self._session = Session(model, self._config, engine)

    @property
    def engine(self) -> str:
        """Name of the engine that runs one row without padding."""
        return self.engine_for(1)

    def engine_for(self, batch: int) -> str:
        """Name of the engine that runs ``batch`` rows without padding.

        If the decoder was made for one engine, it is always that one.
        """
        return runner_of(self.model, self._engine_name)[0].name_for(batch)

    def reset(self) -> None:
        """Forget the conversation and free its memory; needed after writes through ``.data``."""
        with self._turns.take():
            self._session.close()

    def cancel(self) -> None:
        """End the answer that is running after its current token; from any thread."""
        self._session.cancel()

    @property
    def reasons(self) -> list[str]:
        """Why each row of the last answer ended: ``"stop"``, ``"length"`` or ``"cancelled"``."""
        return list(self._session.reasons)

    def generate(
        self,
        inputs: Prompts,
        *,
        attention_mask: Tensor | None = None,
        tokenizer: Tokenizer | None = None,
        callback: Callable[[Tensor], object] | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> Tensor:
        """See :func:`cats.generate`.

        The tokens that the prompt shares with the last call are not computed again.
        """
        if callback is not None and not callable(callback):
            raise ConfigError(f"callback: expected a function, got {type(callback).__name__}")
        with self._turns.take() as turn:
            request = self._request(inputs, attention_mask, options, tokenizer)
            ids, steps = request.ids, []
            if streamer is not None:
                streamer.put(ids.cpu())
            for tokens in self._session.answer(request, turn):
                steps.append(tokens)
                if callback is not None:
                    callback(tokens)
                if streamer is not None:
                    streamer.put(tokens)
        if streamer is not None:
            streamer.end()
        return torch.cat([ids, torch.stack(steps, dim=1).to(ids.device)], dim=1)

    def stream(
        self,
        inputs: Prompts,
        *,
        attention_mask: Tensor | None = None,
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """The tokens of each step, ``[B]``, int64 on the CPU, as they come.

        The iterator may be dropped at any time. Another call on this decoder ends it, and asking
        for its next token is then a ``ConfigError``.
        """

        def tokens() -> Generator[Tensor]:
            with self._turns.take() as turn:
                request = self._request(inputs, attention_mask, options, tokenizer)
                yield from self._session.answer(request, turn)

        return _Stream(tokens())

    def stream_text(
        self,
        inputs: Prompts,
        *,
        tokenizer: Tokenizer,
        attention_mask: Tensor | None = None,
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> Iterator[str]:
        """The new text of one row, in pieces. A piece comes once later tokens cannot change it.

        Together the pieces are ``tokenizer.decode`` of all new tokens; a stop string is part of
        it, as in transformers. The iterator ends as that of :meth:`stream` does.

        Raises:
            DataError: At the first piece, if there is more than one row.
        """

        def pieces() -> Generator[str]:
            with self._turns.take() as turn:
                request = self._request(inputs, attention_mask, options, tokenizer)
                if len(request.ids) > 1:
                    raise DataError(
                        f"stream_text continues one prompt, got {len(request.ids)} rows: use "
                        "stream, or one decoder per prompt"
                    )
                text = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
                for tokens in self._session.answer(request, turn):
                    if piece := text.add(tokens.tolist()):
                        yield piece
                if piece := text.end():
                    yield piece

        return _Stream(pieces())

    def logits(self, ids: Tensor, *, prompt_length: int) -> Tensor:
        """Logits of a text, computed step by step by this decoder's engine.

        The conversation does not change: the call has its own buffers and its own captured step.

        Args:
            ids: Token ids ``[B, T]``, without padding.
            prompt_length: How many of them are the prompt. Each of the others is one step.

        Returns:
            The logits that follow each token after the prompt, ``[B, T - prompt_length, V]``,
            float32, on the model's device.

        Raises:
            ConfigError: If there is no token after the prompt, or the context is too short.
            BackendError: If the engine cannot run, or does not show its logits.
        """
        ids = torch.as_tensor(ids)
        if ids.ndim != 2:
            raise DataError(f"expected token ids [B, T], got {list(ids.shape)}")
        length = ids.shape[1]
        if not 0 < prompt_length < length:
            raise ConfigError(
                f"expected a prompt shorter than the {length} tokens, got {prompt_length}"
            )
        # each option is set, so that the model's own settings do not count
        options = {
            "do_sample": False,
            "repetition_penalty": 1.0,
            "eos_token_id": None,
            "stop_strings": None,
            "max_new_tokens": length - prompt_length + 1,
        }
        mask = torch.ones_like(ids[:, :prompt_length])
        with self._turns.take(), torch.inference_mode():
            request = self._request(ids[:, :prompt_length], mask, options)
            logits, name = self._session.logits(ids, request)
        if logits.isnan().all():
            raise BackendError(f"the engine {name} does not show its logits")
        return logits

    def _request(
        self,
        inputs: Prompts,
        attention_mask: Tensor | None,
        options: Mapping[str, Any],
        tokenizer: Tokenizer | None = None,
    ) -> Request:
        return Request.of(self.model, self._config, inputs, attention_mask, options, tokenizer)


class _Stream(Iterator[Piece]):
    """What a generator yields. The generator is closed when this object is dropped, or at exit.

    Python itself would close a generator that is half read at exit only after torch has ended.
    """

    def __init__(self, tokens: Generator[Piece]) -> None:
        self._tokens = tokens
        self.close = finalize(self, tokens.close)

    def __next__(self) -> Piece:
        return next(self._tokens)
