"""The layers of a decoder-only model of the common form, read from modules and configuration."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.model.find import find_gated_mlps
from cats.model.linear import Linear
from cats.model.mlp import GatedOperands
from cats.weights import table_of

_NO_WINDOW = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLayer:
    """One decoder layer of the common form.

    ``h += post(attention(norm(h)))``, then ``h += post(mlp(norm(h)))``, where the norms called
    ``post`` may be missing. Norms are weights: ``[D]``, and ``[head_size]`` for norms of heads.

    Attributes:
        attention_norm: Norm before attention.
        attention_post_norm: Norm after attention, or None.
        mlp_norm: Norm before the MLP.
        mlp_post_norm: Norm after the MLP, or None.
        q, k, v, o: The projections.
        q_norm, k_norm: Norms of each head, or None.
        mlp: Matrices, thresholds and activation of the MLP.
        scale: Factor of the attention scores.
        softcap: Limit of the attention scores, by tanh; 0 for none.
        window: How many tokens a query attends to, itself included.
        rotary: Which table of cosines and sines it uses.
        epsilon: Epsilon of all norms.
        weight_offset: 1 where norms multiply by ``1 + weight``, else 0.
    """

    attention_norm: Tensor
    attention_post_norm: Tensor | None
    mlp_norm: Tensor
    mlp_post_norm: Tensor | None
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    mlp: GatedOperands
    scale: float
    softcap: float
    window: int
    rotary: str
    epsilon: float
    weight_offset: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """A decoder-only model with layers of the common form.

    Attributes:
        base: The module that holds embedding, layers and last norm.
        embedding: ``[V, D]``; where it is in codes that the head shares, its layer is the head's.
        layers: The layers, the first one first.
        norm: Weights of the last norm, ``[D]``.
        head: The output head, which gives the logits.
        heads: Number of query heads.
        key_heads: Number of key and value heads.
        head_size: Columns of one head.
        logit_softcap: Limit of the logits, by tanh; 0 for none.
    """

    base: nn.Module
    embedding: Linear
    layers: list[DecoderLayer]
    norm: Tensor
    head: Linear
    heads: int
    key_heads: int
    head_size: int
    logit_softcap: float

    @property
    def hidden_size(self) -> int:
        return self.norm.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype


def describe_decoder(model: nn.Module) -> Decoder:
    """What modules and configuration suggest; the caller must compare it with the model.

    MLPs are found by structure and probe, attention by the names that transformers uses.

    Raises:
        UnsupportedModelError: If something is not of the common form.
        AttributeError: If a part of the common form is missing.
    """
    # Any: attributes of a model that may be of another form
    causal_model: Any = model
    base = causal_model.get_decoder()
    config = causal_model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    try:
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    except Exception as error:  # transformers has its own error for sizes that differ by layer
        raise UnsupportedModelError(f"its layers have heads of several sizes ({error})") from error
    _norm_form(base.norm)
    return Decoder(
        base=base,
        embedding=_embedding(causal_model.get_input_embeddings()),
        layers=[
            _layer(layer, config, heads, key_heads, head_size, i)
            for i, layer in enumerate(base.layers)
        ],
        norm=base.norm.weight,
        head=Linear.of(causal_model.get_output_embeddings(), "the head"),
        heads=heads,
        key_heads=key_heads,
        head_size=head_size,
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0),
    )


def _embedding(module: nn.Module) -> Linear:
    found = table_of(module)
    if found is None:
        raise UnsupportedModelError(f"{type(module).__name__} is no table of embeddings")
    return Linear(found[0], None, found[1])


def _layer(
    layer: Any, config: Any, heads: int, key_heads: int, head_size: int, index: int
) -> DecoderLayer:
    attention = layer.self_attn
    has_post_norms = hasattr(layer, "pre_feedforward_layernorm")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if has_post_norms:
        norms += [layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
    q_norm, k_norm = head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    forms = {_norm_form(norm) for norm in (*norms, *head_norms) if norm is not None}
    if len(forms) != 1:
        raise UnsupportedModelError(f"the norms of layer {index} differ from each other")
    epsilon, weight_offset = forms.pop()
    if any(norm is not None and norm.weight.shape != (head_size,) for norm in head_norms):
        raise UnsupportedModelError(f"layer {index} does not norm its queries head by head")
    q, k, v = _projections(attention, heads * head_size, key_heads * head_size)
    kind = getattr(attention, "layer_type", None) or (
        config.layer_types[index] if getattr(config, "layer_types", None) else "full_attention"
    )
    mlp, *others = find_gated_mlps(layer)
    if others:
        raise UnsupportedModelError(f"layer {index} has {1 + len(others)} gated MLPs, expected one")
    weights = [norm.weight for norm in norms]
    return DecoderLayer(
        attention_norm=weights[0],
        attention_post_norm=weights[1] if has_post_norms else None,
        mlp_norm=weights[2] if has_post_norms else weights[1],
        mlp_post_norm=weights[3] if has_post_norms else None,
        q=q,
        k=k,
        v=v,
        o=Linear.of(attention.o_proj, "o_proj"),
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        mlp=mlp.operands(),
        scale=float(attention.scaling),
        softcap=float(getattr(attention, "attn_logit_softcapping", None) or 0),
        window=_window(attention, config, kind) or _NO_WINDOW,
        rotary=kind,
        epsilon=epsilon,
        weight_offset=weight_offset,
    )


def _projections(attention: Any, queries: int, keys: int) -> list[Linear]:
    if hasattr(attention, "qkv_proj"):
        stacked = Linear.of(attention.qkv_proj, "qkv_proj")
        ends = [0, queries, queries + keys, queries + 2 * keys]
        return [stacked.part(start, stop) for start, stop in pairwise(ends)]
    return [Linear.of(getattr(attention, name), name) for name in ("q_proj", "k_proj", "v_proj")]


def _window(attention: Any, config: Any, kind: str) -> int | None:
    if not hasattr(attention, "sliding_window"):
        # the window of the configuration holds for all layers, or for the sliding ones
        in_all_layers = not getattr(config, "layer_types", None)
        attention = config if in_all_layers or kind == "sliding_attention" else None
    window = getattr(attention, "sliding_window", None)
    return None if window is None else int(window)


def _norm_form(norm: nn.Module) -> tuple[float, float]:
    """Epsilon of a root-mean-square norm, and the number that it adds to its weights: 0 or 1."""
    weight = getattr(norm, "weight", None)
    has_bias = getattr(norm, "bias", None) is not None
    if not isinstance(weight, Tensor) or weight.ndim != 1 or has_bias:
        raise UnsupportedModelError(f"{type(norm).__name__} is no root-mean-square norm")
    epsilon = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    if epsilon is None:
        raise UnsupportedModelError(f"{type(norm).__name__} has no attribute for its epsilon")
    x = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean() + epsilon)
    with torch.no_grad():
        actual = norm(x[None, None])[0, 0].float()
    for offset in (0.0, 1.0):
        expected = normed * (weight.float() + offset)
        if (actual - expected).norm() <= 1e-2 * expected.norm():
            return float(epsilon), offset
    raise UnsupportedModelError(f"{type(norm).__name__} is no root-mean-square norm")
