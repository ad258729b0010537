"""A tiny model with random weights of each causal family of transformers."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cats.errors import UnsupportedModelError
from cats.protocols import ModelConfig

VOCABULARY = 64
# More would not be tiny: a setting that this file does not know.
_MOST_PARAMETERS = 40_000_000

# What a configuration gets of these if it has a field of that name. Sizes differ from each other
# where they may, so that a mistaken one shows.
_SIZES: dict[str, Any] = dict(
    # width
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "n_embed"), 32),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "backbone_hidden_size"), 32),
    # neurons
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("dense_intermediate_size", "mlp_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    # depth
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "layers"), 2),
    **dict.fromkeys(("decoder_layers",), 2),
    **dict.fromkeys(("encoder_layers",), 1),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    index_head_dim=16,
    index_n_heads=2,
    index_topk=8,
    # state-space layers and linear attention
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_head_dim=8,
    expand=2,
    mamba_expand=2,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=8,
    mamba_d_ssm=64,
    mamba_num_heads=4,
    mamba_head_dim=16,
    ssm_state_size=8,
    state_size=8,
    n_groups=1,
    mamba_n_groups=1,
    # experts
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    num_experts_per_token=2,
    n_group=1,
    topk_group=1,
    zero_expert_num=1,
    num_dense_layers=1,
    first_k_dense_replace=1,
    mlp_layer_types=["dense", "sparse"],
    # text
    vocab_size=VOCABULARY,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size_per_layer_input=8,
    encoder_hash_byte_group_vocab=64,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    sliding_window=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
# What a family needs besides: sizes that depend on each other.
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": _TWO_KINDS,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "kimi_linear": _TWO_KINDS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "qwen3_5_text": _TWO_KINDS,
    "qwen3_5_moe_text": _TWO_KINDS,
    "qwen3_next": _TWO_KINDS,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# Parts of models whose configuration does not say which part it has by default.
_PARTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "gemma4_assistant": {
        "text_config": (
            "gemma4_text",
            {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
        )
    },
}


def model_types() -> list[str]:
    """The names of all causal families that this release of transformers has."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str) -> nn.Module:
    """A model with random weights, always the same, in evaluation mode.

    Raises:
        UnsupportedModelError: If it cannot be built; the message says why.
    """
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        size = sum(p.numel() for p in empty.parameters())
        if size > _MOST_PARAMETERS:
            raise ValueError(f"{size:,} parameters, which its settings do not make fewer")
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # the code of a family may raise anything
        reason = (str(error).strip().splitlines() or [""])[-1].strip()
        raise UnsupportedModelError(
            f"no tiny model of {model_type} can be built ({type(error).__name__}: {reason})"
        ) from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # gates of about unit variance, as those of real models
            if parameter.ndim >= 2 and "norm" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def tiny_config(model_type: str) -> ModelConfig:
    """The configuration of a family with small sizes, the parts of multimodal models included."""
    cls = CONFIG_MAPPING[model_type]
    return cast(ModelConfig, cls(**_settings(cls, {})))


def _settings(cls: type[Any], changes: dict[str, Any]) -> dict[str, Any]:
    if dataclasses.is_dataclass(cls):
        names = {field.name for field in dataclasses.fields(cls)}
    else:
        names = set(inspect.signature(cls.__init__).parameters)
    names |= getattr(cls, "attribute_map", {}).keys()
    settings = {name: value for name, value in _SIZES.items() if name in names}
    if "qk_rope_head_dim" in names:
        # latent attention has no grouped queries
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    model_type = getattr(cls, "model_type", "")
    settings |= _CHANGES.get(model_type, {}) | changes
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        if name in _PARTS.get(model_type, {}):
            part_type, part_changes = _PARTS[model_type][name]
            part = CONFIG_MAPPING[part_type]
            settings[name] = part(**_settings(part, part_changes))
            continue
        if name not in names:
            continue
        if part.__name__ == "AutoConfig":
            default = getattr(cls(), name, None)
            if default is None:
                continue
            part = type(default)
        settings[name] = part(**_settings(part, {}))
    return settings
