"""Bytes of a model, and those that a step of the decode loop must read."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import cast

from torch import Tensor, nn

from cats.benchmarks.decode_case import Case
from cats.calibration.collection import forward_hidden
from cats.metrics import DroppedNeurons, realized_sparsity
from cats.model import CatsActivation, evaluating, traffic
from cats.protocols import CausalModel
from cats.weights import table_of
from cats.weights.placement import input_device


def own_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def token_bytes(model: nn.Module, tokens: Tensor, case: Case) -> tuple[float, float]:
    """Bytes that a step must read, and the realised sparsity of the tokens that were timed.

    Of the weights, a step reads all except an embedding that is only looked up in, and except the
    rows of ``up`` and columns of ``down`` of dropped neurons. Of the cache it reads the used slots,
    here their mean number. For several prompts the result is a lower bound, since a neuron is read
    if any of them keeps it.

    Args:
        model: A model, dense or sparse.
        tokens: Prompts and new tokens, ``[B, T + N]``.
        case: What was timed.
    """
    shares: dict[str, float] = {}
    if any(isinstance(module, CatsActivation) for module in model.modules()):
        shares = _sparsity_after_prompt(model, tokens, case.prompt_length)
    mean_slots = case.prompt_length + case.new_tokens / 2
    bytes_read = traffic.token_bytes(model, shares) + case.batch * slot_bytes(model) * mean_slots
    return bytes_read, fmean(shares.values()) if shares else 0.0


def bytes_of_rows(model: nn.Module, texts: Sequence[Tensor], steps: int) -> tuple[float, float]:
    """Bytes that a step of several rows must read, and the share of neurons that all rows drop.

    A neuron is read where any of the rows keeps it. Each row reads its own slots of the cache.

    Args:
        model: A model, dense or sparse.
        texts: The tokens of each row, ``[T]``. The last ``steps`` of them are the inputs of the
            steps that ran together.
        steps: How many.
    """
    shares: dict[str, float] = {}
    if any(isinstance(module, CatsActivation) for module in model.modules()):
        union: dict[str, Tensor] = {}
        for text in texts:
            with _Kept(model) as kept, evaluating(model):
                forward_hidden(model, text[None].to(input_device(model)), None)
            for name, mask in kept.masks.items():
                union[name] = mask[-steps:] | union.get(name, mask[-steps:])
        shares = {name: 1 - float(mask.float().mean()) for name, mask in union.items()}
    slots = sum(len(text) - (steps - 1) / 2 for text in texts)
    bytes_read = traffic.token_bytes(model, shares) + slot_bytes(model) * slots
    return bytes_read, fmean(shares.values()) if shares else 0.0


class _Kept(DroppedNeurons):
    """Which neurons each MLP keeps in one pass, ``[T, F]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.masks: dict[str, Tensor] = {}

    def count(self, name: str, kept: Tensor) -> None:
        self.masks[name] = kept.reshape(-1, kept.shape[-1])


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


def _sparsity_after_prompt(
    model: nn.Module, tokens: Tensor, prompt_length: int
) -> dict[str, float]:
    """Realised sparsity of each MLP on the inputs of the steps: all tokens after the prompt."""
    inputs, prompt = tokens[:, :-1], tokens[:, :prompt_length]
    on_inputs, on_prompt = (realized_sparsity(model, [ids]) for ids in (inputs, prompt))
    n, p = inputs.shape[1], prompt_length
    # a causal model computes the same for the prompt with and without what follows
    return {name: (on_inputs[name] * n - on_prompt[name] * p) / (n - p) for name in on_inputs}
