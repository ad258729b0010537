"""All that a conversation holds on the model's device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cats.decode.cache import SlotCache
from cats.decode.options import Options
from cats.decode.sampling import choose, process
from cats.errors import UnsupportedModelError
from cats.weights.placement import has_weights, input_device


class State:
    """Buffers of ``B`` rows; a step reads and writes them in place, so that it can be captured.

    Rows may have different lengths. Rows of one prompt batch are padded on the left.

    Attributes:
        cache: Keys and values.
        tokens: The newest token of each row, not yet in the cache, ``[B, 1]``, int64.
        positions: Its position in the row, ``[B, 1]``.
        slots: Its slot in the cache, ``[B]``, int64.
        step: How many tokens of each row are chosen since :meth:`begin`, ``[1]``, int64.
        chosen: The tokens that each step has chosen, ``[capacity, B]``, int64. Each step has a row
            of its own, so the host reads the tokens of one step while later steps run.
        reader: The stream on which it does; None where the device is no GPU.
        valid: Whether a slot holds no padding, ``[B, capacity]``, bool. Slots that are not yet
            written count as valid; the causal mask hides them.
        finished: Whether a row has ended, ``[B]``.
        seen: Whether a token of the vocabulary occurred, ``[B, V]``; None where nothing asks.
        noise: Draws of the step, ``[B, V]``, float32; None where nothing is drawn.
        logits: From what each step chose, ``[steps, B, V]``, float32; None where no one asks for
            them.
        padded: Whether a row has padding.
        rotary: What rotary modules have stored for this text, where that depends on its length.
        extras: What the model takes of the next prompt beside ids and mask.
        frequencies: Which rotary frequencies the stored keys have, see :class:`LengthRule`; None
            where no later pass has the same.
        unmasked_slots: How many slots a new token may see before some layer masks any of them.
        eos: Tokens that end a row, ``[E]``.
        captured: CUDA graphs over these very buffers; empty after each change of them.
    """

    def __init__(self, model: nn.Module, config: Any, batch: int, capacity: int) -> None:
        self.device = device_of(model)
        self.cache = SlotCache(config, capacity)
        self.tokens = self._zeros(batch, 1)
        # One buffer, so that one operator adds 1 to all three. Its rows begin at multiples of 16
        # bytes, as compiled steps expect of their inputs.
        self._counters = self._zeros(3, batch + batch % 2)
        self.positions = self._counters[0, :batch, None]
        self.slots = self._counters[1, :batch]
        self.step = self._counters[2, :1]
        # streams of another priority are other ones than those that captures and callers get
        cuda = self.device.type == "cuda"
        self.reader = torch.cuda.Stream(self.device, priority=-1) if cuda else None
        self.chosen = self._chosen_buffer()
        self.valid = torch.ones(batch, capacity, dtype=torch.bool, device=self.device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self.seen: Tensor | None = None
        self.noise: Tensor | None = None
        self.logits: Tensor | None = None
        self.padded = False
        self.frequencies: int | None = 0
        self.rotary: list[dict[str, Any]] | None = None
        self.extras: Mapping[str, Any] = {}
        spans = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        self.unmasked_slots = min((span - 1 for span in spans if span), default=2**62)
        self.eos = self._zeros(0)
        self.generator = torch.Generator(self.device)
        self.captured: dict[Hashable, Any] = {}

    @property
    def batch(self) -> int:
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    def grow(self, capacity: int) -> None:
        """Keep what is stored, in buffers for more tokens."""
        self.cache.grow(capacity)
        more = self.valid.new_ones(self.batch, capacity - self.valid.shape[1])
        self.valid = torch.cat([self.valid, more], dim=1)
        self.chosen = self._chosen_buffer()
        self.captured.clear()

    def begin(self, ids: Tensor, mask: Tensor, vocabulary: int, options: Options) -> None:
        """Take a prompt, ``[B, T]`` with its mask; the engine has yet to run it.

        The last column becomes the newest tokens; those before it have their slots in the cache.
        """
        length = ids.shape[1]
        self.valid.fill_(True)
        self.valid[:, :length] = mask
        self.padded = not bool(mask.all())
        self.start_at(length - 1)
        self.positions.copy_(mask.sum(1, keepdim=True) - 1)
        self.finished.fill_(False)
        if self.eos.tolist() != list(options.eos_token_ids):
            self.eos = torch.tensor(options.eos_token_ids, dtype=torch.int64, device=self.device)
            self.captured.clear()
        shape = self.batch, vocabulary
        # kept for later turns once they are there, since a captured step holds their addresses
        if options.sampling.repetition_penalty != 1:
            if self.seen is None:
                self.seen = torch.empty(shape, dtype=torch.bool, device=self.device)
            # the last token instead of what is padding before the first
            penalised = ids.where(mask.cumsum(1) > 0, ids[:, -1:])
            self.seen.fill_(False).scatter_(1, penalised, True)
        if options.processors is not None:
            options.processors.begin(ids, mask)
        if options.sampling.do_sample:
            if self.noise is None:
                self.noise = torch.empty(shape, device=self.device)
            seed = options.seed
            self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)

    def start_at(self, slot: int) -> None:
        """Say that the newest token of each row has this slot and position; no step has run."""
        self.slots.fill_(slot)
        self.positions.fill_(slot)
        self.step.zero_()

    def take_extras(self) -> Mapping[str, Any]:
        """The extras, once: no later pass gets them."""
        extras, self.extras = self.extras, {}
        return extras

    def advance(self, logits: Tensor, options: Options) -> None:
        """Choose the next tokens from logits ``[B, V]``, and move on."""
        if self.logits is not None:
            self.logits.index_copy_(0, self.step, logits[None].float())
        if options.processors is not None:
            logits = options.processors.scores(logits)
        scores = process(logits, self.seen, options.sampling)
        if options.sampling.do_sample:
            assert self.noise is not None
            self.noise.exponential_(generator=self.generator)
            chosen = choose(scores, self.noise)
        else:
            chosen = choose(scores, None)
        if len(self.eos):
            chosen = torch.where(self.finished, options.pad_token_id, chosen)
            self.finished.logical_or_((chosen[:, None] == self.eos).any(1))
        # the host raises where nothing could be drawn; a step must not meet it
        token = chosen.clamp(min=0) if options.sampling.do_sample else chosen
        if options.sampling.repetition_penalty != 1:
            assert self.seen is not None
            self.seen.scatter_(1, token[:, None], True)
        if options.processors is not None:
            options.processors.add(token)
        self.tokens.copy_(token[:, None])
        self.chosen.index_copy_(0, self.step, chosen[None])
        self._counters.add_(1)

    def moving(self) -> list[Tensor]:
        """The buffers of which a step reads what :meth:`advance` made of them."""
        buffers = [self.tokens, self._counters, self.finished]
        return buffers if self.seen is None else [*buffers, self.seen]

    def _chosen_buffer(self) -> Tensor:
        # a prompt has at least one token, so that an answer has fewer steps than slots
        chosen = self._zeros(self.capacity, self.batch)
        if self.reader is not None:
            chosen.record_stream(self.reader)
        return chosen

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs.

    Its weights may lie on several devices, or be loaded when they are needed.

    Raises:
        UnsupportedModelError: If its weights are nowhere.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    if not has_weights(embedding):
        raise UnsupportedModelError(
            f"the weights of {type(model).__name__} are on the meta device, which holds no "
            "numbers: load them, for example with from_pretrained"
        )
    return input_device(embedding)
