"""Models of real sizes with random weights: speed depends on sizes, not on what a model knows."""

import torch
from torch import nn

from cats.errors import ConfigError

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _sizes(*values: int) -> dict[str, int]:
    return dict(zip(_SIZES, values, strict=True))


_LLAMA_1B = {"head_dim": 64, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, int]] = {
    "mistral-7b": _sizes(4096, 14336, 32, 32, 8, 32000, 32768),
    "llama-2-7b": _sizes(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-3.2-1b": _sizes(2048, 8192, 16, 32, 8, 128256, 131072) | _LLAMA_1B,
    "smollm2-135m": _sizes(576, 1536, 30, 9, 3, 49152, 8192) | {"tie_word_embeddings": True},
}


def random_model(
    name: str, dtype: torch.dtype, device: torch.device, *, layers: int | None = None
) -> nn.Module:
    """A Llama model of one of :data:`SHAPES`, or of fewer of its layers, in evaluation mode.

    Raises:
        ConfigError: If there is no such shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}; got {name!r}")
    sizes = SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    config = AutoConfig.for_model("llama", **sizes)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
