"""Write a Llama-shaped model as a GGUF file, which llama.cpp reads, and we do again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cats.errors import ConfigError, UnsupportedModelError
from cats.formats.gguf import rows_in_order
from cats.formats.gguf_tokenizer import write_tokenizer
from cats.protocols import Tokenizer
from cats.storage import replacing

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
"""What matrices can be stored as."""
_BLOCK = 32
# The embedding, and the head that may be the same matrix.
_TABLES = ("model.embed_tokens", "lm_head")


def export_gguf(
    model: nn.Module,
    path: str | Path,
    *,
    kind: str = "q8_0",
    table_kind: str | None = None,
    tokenizer: Tokenizer | None = None,
    name: str = "model",
    on_tensor: Callable[[], None] = lambda: None,
) -> None:
    """Write a GGUF file, which gets its name only when it is complete.

    Args:
        model: A dense Llama or Mistral model; the package ``gguf`` rounds its numbers.
        path: The file.
        kind: How the matrices of linear layers are stored, one of :data:`KINDS`.
        table_kind: How embedding and head are; None: ``"q8_0"`` beside 4 bits, else ``kind``.
        tokenizer: Is stored too. Without one, llama.cpp takes ids instead of text.
        name: Of the model, in the file.
        on_tensor: Called after each tensor.

    Raises:
        ConfigError: If a kind is unknown, or the package ``gguf`` is not installed.
        UnsupportedModelError: If the model or the tokenizer is of another form.
        StorageError: If the file cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf: pip install gguf") from error
    for value in (kind, table_kind or kind):
        if value not in KINDS:
            raise ConfigError(f"a GGUF type must be one of {', '.join(KINDS)}; got {value!r}")
    table_kind = table_kind or ("q8_0" if kind.startswith("q4") else kind)
    config: Any = model.config
    _check(model, config, kind)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    kinds = {f"{module}.weight": table_kind for module in _TABLES}
    tensors = [
        (tensor_name, tensor, _raw(tensor, kinds.get(tensor_name, kind), gguf))
        for tensor_name, tensor in model.state_dict().items()
        if not (tensor_name == "lm_head.weight" and config.tie_word_embeddings)
    ]
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        _write_settings(writer, config, name)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            write_tokenizer(writer, tokenizer, config.vocab_size)
        for tensor_name, tensor, raw in tensors:
            module, _, part = tensor_name.rpartition(".")
            block, size = gguf.GGML_QUANT_SIZES[raw]
            shape, nbytes = tuple(tensor.shape), tensor.numel() // block * size
            # a type for what has its shape in numbers, not in bytes
            dtype: Any = "float32"
            key = f"{names.get_name(module)}.{part}"
            writer.add_tensor_info(key, shape, dtype, nbytes, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor, raw in tensors:
            numbers = _in_order_of_file(tensor_name, tensor, config).float().numpy()
            writer.write_tensor_data(gguf.quantize(numbers, raw))
            on_tensor()
        writer.close()


def _check(model: nn.Module, config: Any, kind: str) -> None:
    """
    Raises:
        UnsupportedModelError: If a file of the architecture ``llama`` would be another model.
    """
    if type(model).__name__ not in ("LlamaForCausalLM", "MistralForCausalLM"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not written as GGUF here, expected a Llama or Mistral "
            "model: use convert_hf_to_gguf.py of llama.cpp"
        )
    if getattr(config, "sliding_window", None):
        raise UnsupportedModelError("a GGUF file of this form holds no sliding window")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModelError(
            f"rotary frequencies of the kind {rope['rope_type']} are not written as GGUF here, "
            "expected the default ones: use convert_hf_to_gguf.py of llama.cpp"
        )
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            if any(True for _ in module.children()) or "norm" in name:
                continue
            if [*module.parameters(), *(b for b in module.buffers() if b.ndim > 1)]:
                raise UnsupportedModelError(
                    f"{name} is a {type(module).__name__}: export the dense, unquantised model"
                )
            continue
        if getattr(module, "bias", None) is not None:
            raise UnsupportedModelError(f"{name} has a bias, which is not written as GGUF here")
        columns = module.weight.shape[1]
        if kind.startswith("q") and columns % _BLOCK:
            raise UnsupportedModelError(
                f"{name} has {columns} columns, which are no blocks of {_BLOCK}: take --type f16"
            )


def _raw(tensor: Tensor, kind: str, gguf: Any) -> Any:
    """How a tensor is stored: norms as float32."""
    return gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind.upper()]


def _in_order_of_file(name: str, tensor: Tensor, config: Any) -> Tensor:
    """A tensor whose rows are in the order of the file."""
    module = name.split(".")[-2]
    if module not in ("q_proj", "k_proj"):
        return tensor.detach()
    heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
    return tensor.detach()[rows_in_order(len(tensor), heads).argsort()]


def _write_settings(writer: Any, config: Any, name: str) -> None:
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_quantization_version(2)
