"""Models of real sizes with random weights: speed depends on sizes, not on what a model knows."""

from typing import Any

import torch
from torch import nn

from cats.errors import ConfigError

SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=32768,
    ),
    "llama-2-7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096,
    ),
    "llama-3.2-1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
}  # fmt: skip


def random_model(
    name: str, dtype: torch.dtype, device: torch.device, *, layers: int | None = None
) -> nn.Module:
    """A Llama model of one of :data:`SHAPES`, or of fewer of its layers, in evaluation mode.

    Raises:
        ConfigError: If there is no such shape.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if name not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}; got {name!r}")
    sizes = SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    config: Any = LlamaConfig
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config(**sizes), dtype=dtype)
    return model.eval()
