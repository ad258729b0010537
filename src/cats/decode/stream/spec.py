"""What the layers of a model compute, read from their modules and the model's configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from cats.decode.rotary import LengthRule
from cats.errors import UnsupportedModelError
from cats.functional import ACTIVATIONS
from cats.fusion import FusedGatedMLP
from cats.model import CatsActivation, activation_kind

_EVERYTHING = 2**31 - 1
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer, or some rows of one: weight ``[rows, columns]``, bias ``[rows]`` or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class MLPSpec:
    """A gated MLP: the operands of ``cats::gated_mlp``.

    Attributes:
        down: ``[D, F]``, column by column in memory.
        thresholds: ``[F]``, float32; zero for a dense MLP.
    """

    gate: Matrix
    up: Matrix
    down: Tensor
    thresholds: Tensor
    activation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One decoder layer of the common form.

    ``h += post(attention(norm(h)))``, then ``h += post(mlp(norm(h)))``, where the norms called
    ``post`` may be missing. Norms are weights ``[D]``, of heads ``[head_size]``.

    Attributes:
        attention_norm: In front of attention.
        attention_post_norm: Behind it, or None.
        mlp_norm: In front of the MLP.
        mlp_post_norm: Behind it, or None.
        q, k, v, o: The projections.
        q_norm, k_norm: Norms of each head, or None.
        scale: Multiplies the scores.
        softcap: Largest score, by tanh; 0 for none.
        window: Slots in sight, the new one included.
        rotary: Which table of cosines and sines it uses.
        epsilon: Of all norms.
        weight_offset: 1 where norms multiply by ``1 + weight``.
    """

    attention_norm: Tensor
    attention_post_norm: Tensor | None
    mlp_norm: Tensor
    mlp_post_norm: Tensor | None
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    q_norm: Tensor | None
    k_norm: Tensor | None
    mlp: MLPSpec
    scale: float
    softcap: float
    window: int
    rotary: str
    epsilon: float
    weight_offset: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only model of such layers.

    Attributes:
        base: The module that holds embedding, layers and last norm.
        embedding: The table, ``[V, D]``.
        layers: In order.
        norm: Weights of the last norm.
        head: Logits of its output.
        heads: Query heads.
        key_heads: Key and value heads.
        head_size: Columns of each.
        logit_softcap: Largest logit, by tanh; 0 for none.
        length_rule: How rotary frequencies depend on the length; None where they do not.
    """

    base: nn.Module
    embedding: Tensor
    layers: list[LayerSpec]
    norm: Tensor
    head: Matrix
    heads: int
    key_heads: int
    head_size: int
    logit_softcap: float
    length_rule: LengthRule | None

    def detached(self) -> ModelSpec:
        """The same over tensors that share the memory of the weights, whatever becomes of these."""
        found: ModelSpec = _detached(self)
        return found

    @property
    def hidden_size(self) -> int:
        return self.norm.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype


def read_spec(model: nn.Module) -> ModelSpec:
    """The specification that modules and configuration suggest; a probe must confirm it.

    Raises:
        UnsupportedModelError: If something is not of the common form.
    """
    whole: Any = model
    base = whole.get_decoder()
    config = whole.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rule = LengthRule.of(config)
    if rule is not None and rule.kind != "longrope":
        raise UnsupportedModelError("its rotary frequencies change with each length")
    _norm(base.norm)
    kinds = {(p.dtype, p.device) for p in base.parameters()}
    if len(kinds) != 1:
        raise UnsupportedModelError("its weights have several dtypes or devices")
    if (dtype := kinds.pop()[0]) not in _DTYPES:
        raise UnsupportedModelError(f"no kernel takes weights in {dtype}")
    return ModelSpec(
        base=base,
        embedding=whole.get_input_embeddings().weight,
        layers=[
            _layer(layer, config, heads, key_heads, head_size, i)
            for i, layer in enumerate(base.layers)
        ],
        norm=base.norm.weight,
        head=_matrix(whole.get_output_embeddings(), "the head"),
        heads=heads,
        key_heads=key_heads,
        head_size=head_size,
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0),
        length_rule=rule,
    )


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, list):
        return [_detached(item) for item in value]
    if isinstance(value, Matrix | MLPSpec | LayerSpec | ModelSpec):
        return replace(value, **{f.name: _detached(getattr(value, f.name)) for f in fields(value)})
    return value


def _layer(
    layer: Any, config: Any, heads: int, key_heads: int, head_size: int, index: int
) -> LayerSpec:
    attention = layer.self_attn
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if sandwich:
        norms += [layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
    of_heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    facts = {_norm(norm) for norm in (*norms, *of_heads) if norm is not None}
    if len(facts) != 1:
        raise UnsupportedModelError(f"the norms of layer {index} differ from each other")
    epsilon, offset = facts.pop()
    if any(norm is not None and norm.weight.shape != (head_size,) for norm in of_heads):
        raise UnsupportedModelError(f"layer {index} does not norm its queries head by head")
    q, k, v = _projections(attention, heads * head_size, key_heads * head_size)
    kind = getattr(attention, "layer_type", None) or (
        config.layer_types[index] if getattr(config, "layer_types", None) else "full_attention"
    )
    window = _window(attention, config, kind)
    weights = [norm.weight for norm in norms]
    return LayerSpec(
        attention_norm=weights[0],
        attention_post_norm=weights[1] if sandwich else None,
        mlp_norm=weights[2] if sandwich else weights[1],
        mlp_post_norm=weights[3] if sandwich else None,
        q=q, k=k, v=v,
        o=_matrix(attention.o_proj, "o_proj"),
        q_norm=None if of_heads[0] is None else of_heads[0].weight,
        k_norm=None if of_heads[1] is None else of_heads[1].weight,
        mlp=_mlp(layer.mlp),
        scale=float(attention.scaling),
        softcap=float(getattr(attention, "attn_logit_softcapping", None) or 0),
        window=window or _EVERYTHING,
        rotary=kind,
        epsilon=epsilon,
        weight_offset=offset,
    )  # fmt: skip


def _window(attention: Any, config: Any, kind: str) -> int | None:
    if not hasattr(attention, "sliding_window"):
        everywhere = not getattr(config, "layer_types", None)
        attention = config if everywhere or kind == "sliding_attention" else None
    window = getattr(attention, "sliding_window", None)
    return None if window is None else int(window)


def _norm(norm: Any) -> tuple[float, float]:
    """Epsilon of a root-mean-square norm, and what it adds to its weights: 0 or 1."""
    weight = getattr(norm, "weight", None)
    if weight is None or getattr(norm, "bias", None) is not None or weight.ndim != 1:
        raise UnsupportedModelError(f"{type(norm).__name__} is no root-mean-square norm")
    epsilon = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    if epsilon is None:
        raise UnsupportedModelError(f"{type(norm).__name__} does not tell its epsilon")
    x = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)
    wide = x.float()
    plain = wide * torch.rsqrt(wide.square().mean() + epsilon)
    with torch.no_grad():
        found = norm(x[None, None])[0, 0].float()
    for offset in (0.0, 1.0):
        expected = plain * (weight.float() + offset)
        if (found - expected).norm() <= 1e-2 * expected.norm():
            return float(epsilon), offset
    raise UnsupportedModelError(f"{type(norm).__name__} is no root-mean-square norm")


def _matrix(linear: Any, name: str) -> Matrix:
    if type(linear) is not nn.Linear:
        raise UnsupportedModelError(
            f"{name} is {type(linear).__name__}, expected nn.Linear (merge adapters first)"
        )
    _check_plain(linear.weight, name)
    if not linear.weight.is_contiguous():
        raise UnsupportedModelError(f"the weight of {name} is not row-major")
    return Matrix(linear.weight, linear.bias)


def _check_plain(weight: Tensor, name: str) -> None:
    """Complain about a tensor that keeps its numbers in others, as some quantised ones do."""
    if type(weight.data) is not Tensor:
        raise UnsupportedModelError(
            f"the weight of {name} is {type(weight.data).__name__}, expected a plain tensor"
        )


def _rows(matrix: Matrix, sizes: list[int]) -> list[Matrix]:
    weights = matrix.weight.split(sizes)
    biases = [None] * len(sizes) if matrix.bias is None else matrix.bias.split(sizes)
    return [Matrix(*pair) for pair in zip(weights, biases, strict=True)]


def _projections(attention: Any, queries: int, keys: int) -> list[Matrix]:
    if hasattr(attention, "qkv_proj"):
        return _rows(_matrix(attention.qkv_proj, "qkv_proj"), [queries, keys, keys])
    return [_matrix(getattr(attention, name), name) for name in ("q_proj", "k_proj", "v_proj")]


def _mlp(mlp: Any) -> MLPSpec:
    if isinstance(mlp, FusedGatedMLP):
        gate, up, down, *biases = mlp.operands()
        _check_plain(down, "down")
        if biases[2] is not None:
            raise UnsupportedModelError("down has a bias")
        matrices = Matrix(gate, biases[0]), Matrix(up, biases[1])
        return MLPSpec(*matrices, down, mlp.thresholds, mlp.activation)
    act = next((c for n, c in mlp.named_children() if n in ("act_fn", "activation_fn")), None)
    if act is None:
        raise UnsupportedModelError(f"{type(mlp).__name__} has no activation module")
    inner = act.act if isinstance(act, CatsActivation) else act
    kind = activation_kind(inner)
    if kind not in ACTIVATIONS:
        raise UnsupportedModelError(f"no kernel computes the activation {type(inner).__name__}")
    if hasattr(mlp, "gate_up_proj"):
        stacked = _matrix(mlp.gate_up_proj, "gate_up_proj")
        gate_up = _rows(stacked, [len(stacked.weight) // 2] * 2)
    else:
        gate_up = [_matrix(getattr(mlp, name), name) for name in ("gate_proj", "up_proj")]
    linear = mlp.down_proj
    if type(linear) is not nn.Linear or linear.bias is not None:
        raise UnsupportedModelError("down_proj is no nn.Linear without bias")
    _check_plain(linear.weight, "down_proj")
    neurons = len(gate_up[0].weight)
    threshold = act.threshold if isinstance(act, CatsActivation) else torch.zeros(())
    thresholds = threshold.to(linear.weight.device).expand(neurons).contiguous()
    return MLPSpec(gate_up[0], gate_up[1], linear.weight, thresholds, kind)
