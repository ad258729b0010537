"""What a conversation holds on the model's device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cats.decode.cache import SlotCache
from cats.decode.options import Options
from cats.decode.rotary import Frequencies
from cats.decode.sampling import choose, process
from cats.errors import UnsupportedModelError
from cats.protocols import CausalModel, ModelConfig
from cats.weights.placement import has_weights, input_device


class State:
    """Buffers of ``B`` rows. A step reads and writes them in place, so that it can be captured.

    Rows may have different lengths. Prompts that run together are padded on the left.

    Attributes:
        cache: Keys and values.
        tokens: The newest token of each row, not yet in the cache, ``[B, 1]``, int64.
        positions: Its position in the row, ``[B, 1]``.
        slots: Its slot in the cache, ``[B]``, int64.
        step: The number of steps since :meth:`begin`, ``[1]``, int64. Each has chosen one token
            per row.
        chosen: The tokens that each step has chosen, ``[capacity, B]``, int64. No step writes
            to the line of another one, so the host reads a line while later steps run.
        reader: The stream on which the host reads; None on a CPU.
        valid: Whether a slot holds no padding, ``[B, capacity]``, bool. Slots that are not yet
            written count as valid; the causal mask hides them.
        finished: Whether a row has ended, ``[B]``, bool.
        seen: Whether a token is in the row, ``[B, V]``, bool; None without a repetition penalty.
        noise: Random numbers of the step, ``[B, V]``, float32; None without sampling.
        logits: The logits of each step, ``[steps, B, V]``, float32; None where they are not
            recorded.
        padded: Whether a row has padding.
        rotary: What the rotary modules store for this text; None where its length does not matter.
        extras: What the model takes with the next prompt beside ids and mask.
        frequencies: The rotary frequencies of the stored keys, as :meth:`LengthRule.range_of`
            numbers them; None where no later pass has the same.
        unmasked_slots: How many slots a new token can see before a layer masks one of them.
        eos: Tokens that end a row, ``[E]``, int64.
        captured: CUDA graphs over these buffers, and what else depends on their addresses. It is
            emptied when a buffer is replaced.
    """

    def __init__(self, model: nn.Module, config: ModelConfig, batch: int, capacity: int) -> None:
        self.device = device_of(model)
        self.cache = SlotCache(config, capacity)
        self.tokens = self._zeros(batch, 1)
        # One buffer, so that one operator adds 1 to all three. Its rows begin at multiples of 16
        # bytes, as compiled steps expect of their inputs.
        self._counters = self._zeros(3, batch + batch % 2)
        self.positions = self._counters[0, :batch, None]
        self.slots = self._counters[1, :batch]
        self.step = self._counters[2, :1]
        # torch has a pool of streams per priority: captures and callers take theirs from another
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
        self.rotary: list[Frequencies] | None = None
        self.extras: Mapping[str, Any] = {}
        spans = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        self.unmasked_slots = min((span - 1 for span in spans if span), default=2**62)
        self.eos = self._zeros(0)
        self.generator = torch.Generator(self.device)
        self.captured: dict[Hashable, object] = {}

    @property
    def batch(self) -> int:
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    def grow(self, capacity: int) -> None:
        """Move keys and values to buffers for more tokens."""
        self.cache.grow(capacity)
        more = self.valid.new_ones(self.batch, capacity - self.valid.shape[1])
        self.valid = torch.cat([self.valid, more], dim=1)
        self.chosen = self._chosen_buffer()
        self.captured.clear()

    def begin(self, ids: Tensor, mask: Tensor, vocabulary: int, options: Options) -> None:
        """Make the buffers ready for the pass over a prompt.

        Args:
            ids: Token ids ``[B, T]``, padded on the left. They get the first ``T`` slots.
            mask: Whether a token is no padding, ``[B, T]``, bool.
            vocabulary: Size of the vocabulary.
            options: Of this request.
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
        # later turns use the same buffers, since captured steps hold their addresses
        if options.sampling.repetition_penalty != 1:
            if self.seen is None:
                self.seen = torch.empty(shape, dtype=torch.bool, device=self.device)
            # padding is replaced by the last token, which is in the row
            row_tokens = ids.where(mask.cumsum(1) > 0, ids[:, -1:])
            self.seen.fill_(False).scatter_(1, row_tokens, True)
        if options.processors is not None:
            options.processors.begin(ids, mask)
        if options.sampling.do_sample:
            if self.noise is None:
                self.noise = torch.empty(shape, device=self.device)
            seed = options.seed
            self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)

    def start_at(self, slot: int) -> None:
        """Give the newest token of each row this slot and position, and begin with step 0."""
        self.slots.fill_(slot)
        self.positions.fill_(slot)
        self.step.zero_()

    def take_extras(self) -> Mapping[str, Any]:
        """Return the extras and forget them, so that only one pass gets them."""
        extras, self.extras = self.extras, {}
        return extras

    def advance(self, logits: Tensor, options: Options) -> None:
        """Choose the next tokens from logits ``[B, V]``; slots, positions and the step count on."""
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
        # where nothing could be drawn, the host raises; until then, steps need a valid token
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
        """The buffers that :meth:`advance` changes and the next step reads."""
        buffers = [self.tokens, self._counters, self.finished]
        return buffers if self.seen is None else [*buffers, self.seen]

    def _chosen_buffer(self) -> Tensor:
        # a prompt fills at least one slot, so an answer has fewer steps than there are slots
        chosen = self._zeros(self.capacity, self.batch)
        if self.reader is not None:
            chosen.record_stream(self.reader)
        return chosen

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's inputs. Its weights may lie on several devices, or be offloaded.

    Raises:
        UnsupportedModelError: If its weights are on the meta device.
    """
    embedding = cast(CausalModel, model).get_input_embeddings()
    if not has_weights(embedding):
        raise UnsupportedModelError(
            f"the weights of {type(model).__name__} are on the meta device, which holds no "
            "numbers: load them, for example with from_pretrained"
        )
    return input_device(embedding)
