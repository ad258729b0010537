"""Bytes of a model, and those that a step of the decode loop must read."""

from __future__ import annotations

from statistics import fmean
from typing import cast

from torch import Tensor, nn

from cats.benchmarks.decode_case import Case
from cats.metrics import realized_sparsity
from cats.model import CatsActivation, traffic
from cats.protocols import CausalModel
from cats.weights import table_of


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
    causal = cast(CausalModel, model)
    config = causal.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # keys and values have the dtype of the numbers
    table = table_of(causal.get_input_embeddings())
    assert table is not None
    slot = 2 * config.num_hidden_layers * heads * head_size * table[0].dtype.itemsize
    mean_slots = case.prompt_length + case.new_tokens / 2
    bytes_read = traffic.token_bytes(model, shares) + case.batch * slot * mean_slots
    return bytes_read, fmean(shares.values()) if shares else 0.0


def _sparsity_after_prompt(
    model: nn.Module, tokens: Tensor, prompt_length: int
) -> dict[str, float]:
    """Realised sparsity of each MLP on the inputs of the steps: all tokens after the prompt."""
    inputs, prompt = tokens[:, :-1], tokens[:, :prompt_length]
    on_inputs, on_prompt = (realized_sparsity(model, [ids]) for ids in (inputs, prompt))
    n, p = inputs.shape[1], prompt_length
    # a causal model computes the same for the prompt with and without what follows
    return {name: (on_inputs[name] * n - on_prompt[name] * p) / (n - p) for name in on_inputs}
