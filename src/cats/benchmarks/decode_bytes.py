"""Bytes of a model, and those that a step of the decode loop must read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import cast

from torch import Tensor, nn

from cats.benchmarks.decode_case import Case
from cats.calibration.collection import forward_hidden
from cats.errors import UnsupportedModelError
from cats.fusion import ReadShares
from cats.metrics import read_shares, realized_sparsity
from cats.model import evaluating, is_sparse, traffic
from cats.protocols import CausalModel
from cats.weights import table_of
from cats.weights.placement import input_device


def own_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def token_bytes(model: nn.Module, tokens: Tensor, case: Case) -> tuple[float, float]:
    """Bytes that a step must read, and the realised sparsity of the tokens that were timed.

    Of the weights, a step reads all except an embedding that is only looked up in, and except the
    rows and columns that masks drop. Of the cache it reads the used slots, here their mean number.
    For several prompts the result is a lower bound, since a neuron is read if any of them keeps it.

    Args:
        model: A model, dense or sparse.
        tokens: Prompts and new tokens, ``[B, T + N]``.
        case: What was timed.
    """
    read: dict[str, float] = {}
    dropped: dict[str, float] = {}
    if is_sparse(model):
        read = _after_prompt(read_shares, model, tokens, case.prompt_length)
        dropped = _after_prompt(realized_sparsity, model, tokens, case.prompt_length)
    mean_slots = case.prompt_length + case.new_tokens / 2
    bytes_read = traffic.token_bytes(model, read) + case.batch * slot_bytes(model) * mean_slots
    return bytes_read, fmean(dropped.values()) if dropped else 0.0


def bytes_of_rows(model: nn.Module, texts: Sequence[Tensor], steps: int) -> tuple[float, float]:
    """Bytes that a step of several rows must read, and the share of neurons that all rows drop.

    What one of the rows keeps is read. Each row reads its own slots of the cache.

    Args:
        model: A model, dense or sparse.
        texts: The tokens of each row, ``[T]``. The last ``steps`` of them are the inputs of the
            steps that ran together.
        steps: How many.
    """
    shares: dict[str, float] = {}
    dropped: list[float] = []
    if is_sparse(model):
        union = _Union(model, steps)
        for text in texts:
            with union, evaluating(model):
                forward_hidden(model, text[None].to(input_device(model)), None)
        shares, dropped = union.shares_of_steps()
    slots = sum(len(text) - (steps - 1) / 2 for text in texts)
    bytes_read = traffic.token_bytes(model, shares) + slot_bytes(model) * slots
    return bytes_read, fmean(dropped) if dropped else 0.0


class _Union(ReadShares):
    """What any of several rows keeps in the last steps of its text."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__(model)
        if self.experts:
            raise UnsupportedModelError(
                f"{self.experts[0]}: what several rows read of stacked experts is not counted"
            )
        self._steps = steps
        self._masks: dict[str, Tensor] = {}

    def count(self, name: str, values: Tensor) -> None:
        kept = (values != 0).reshape(-1, values.shape[-1])[-self._steps :]
        self._masks[name] = kept | self._masks.get(name, kept)

    def shares_of_steps(self) -> tuple[dict[str, float], list[float]]:
        """As ``shares``, and the share of neurons that all rows drop, of each MLP."""
        for name, mask in self._masks.items():
            super().count(name, mask)
        neurons = [mask for name, mask in self._masks.items() if name in self.mlps]
        return self.shares(), [1 - float(mask.float().mean()) for mask in neurons]


def slot_bytes(model: nn.Module) -> int:
    """Bytes of the keys and values of one token."""
    causal = cast(CausalModel, model)
    config = causal.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # keys and values have the dtype of the numbers
    table = table_of(causal.get_input_embeddings())
    assert table is not None
    return 2 * config.num_hidden_layers * int(heads) * int(head_size) * table[0].dtype.itemsize


def _after_prompt(
    measure: Callable[[nn.Module, list[Tensor]], dict[str, float]],
    model: nn.Module,
    tokens: Tensor,
    prompt_length: int,
) -> dict[str, float]:
    """A mean over the inputs of the steps: all tokens after the prompt."""
    inputs, prompt = tokens[:, :-1], tokens[:, :prompt_length]
    on_inputs, on_prompt = (measure(model, [ids]) for ids in (inputs, prompt))
    n, p = inputs.shape[1], prompt_length
    # a causal model computes the same for the prompt with and without what follows
    return {name: (on_inputs[name] * n - on_prompt[name] * p) / (n - p) for name in on_inputs}
