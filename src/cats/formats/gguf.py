"""GGUF files: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K, block by block.

A row is a run of blocks, each with its scales. Codes of a block come in halves: the low four bits
of its bytes are the first columns, the high four bits the columns after them. Codes of five and
six bits take a byte each here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cats.errors import ConfigError, FormatError, StorageError, UnsupportedModelError
from cats.formats.base import Format, Layer
from cats.formats.gguf_header import Header, StoredTensor
from cats.weights import Quantised
from cats.weights.quantised import packed

# Sizes come from the file, so reading a damaged file can raise any of these.
DAMAGED = (IndexError, KeyError, OverflowError, MemoryError, struct.error)

_PREFIX = "gguf_"
# Architectures that are read here. Their tensors are those of transformers, except that some have
# the rows of q and k in another order, and some store norms plus 1.
_PERMUTED = ("llama",)
_NORMS_PLUS_ONE = ("gemma2", "gemma3")
_ARCHITECTURES = (*_PERMUTED, *_NORMS_PLUS_ONE, "qwen2", "qwen3")


class GGUF(Format):
    name = "GGUF"

    def __init__(self) -> None:
        self.parts = frozenset(_PREFIX + name for name in _READERS)

    def markers(self) -> frozenset[str]:
        return self.parts

    def read(self, layer: Layer) -> Quantised:
        part = next(iter(layer.tensors))
        columns, size, read = _READERS[part.removeprefix(_PREFIX)]
        if layer.columns % columns:
            raise layer.error(f"has {layer.columns} columns, which are no blocks of {columns}")
        count = layer.columns // columns
        stored = layer.take(part, (layer.rows, count * size), [torch.uint8])
        # [rows, blocks, bytes]
        fields = read(stored.unflatten(1, (count, size)))
        return Quantised(columns=layer.columns, dtype=layer.dtype, **fields)

    def write(self, name: str, weight: Quantised, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise UnsupportedModelError(
            "a model of a GGUF file is not saved again: keep the file, and save thresholds beside "
            "it with CatsConfig.save; cats.from_pretrained(FILE, thresholds=...) loads both"
        )


def split(path: str | Path) -> tuple[str, str] | None:
    """Folder and name of a GGUF file; None for another path."""
    path = Path(path)
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return None
    return str(path.parent), path.name


def read_file(path: Path, model: nn.Module, config: Any) -> dict[str, Tensor] | None:
    """The tensors of a file under the names of a model; None if its architecture is not read here.

    Args:
        path: The file.
        model: On ``meta``: its names and shapes are those of the result.
        config: Of the model.

    Returns:
        Weights of linear layers and of a plain embedding as blocks, ``<layer>.gguf_<type>``; all
        others as numbers. The blocks of an embedding that is the head too are those of the head.

    Raises:
        ConfigError: If the package ``gguf`` is not installed.
        StorageError: If the file cannot be read.
        FormatError: If it is damaged, or a tensor is missing.
    """
    header = read_header(path)
    import gguf

    architecture = header.settings.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        return None
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    stored = header.tensors
    tensors: dict[str, Tensor] = {}
    # embeddings of other classes do more than look up
    kinds = (nn.Linear, nn.Embedding)
    matrices = {name: module for name, module in model.named_modules() if type(module) in kinds}
    is_tied = config.tie_word_embeddings and "output.weight" not in stored
    for name, like in model.state_dict().items():
        module, _, part = name.rpartition(".")
        key = f"{known.get_name(module)}.{part}"
        if key not in stored:
            if module == "lm_head" and config.tie_word_embeddings:
                continue
            raise FormatError(f"{path}: has no {key}, which {name} is read from")
        tensor = stored[key]
        if tensor.shape != tuple(like.shape):
            raise FormatError(f"{path}: {key} is {list(tensor.shape)}, expected {list(like.shape)}")
        order = None
        if architecture in _PERMUTED and key.split(".")[-2] in ("attn_q", "attn_k"):
            heads = "num_attention_heads" if "attn_q" in key else "num_key_value_heads"
            order = rows_in_order(len(like), getattr(config, heads))
        kind = tensor.kind
        is_matrix = module in matrices and part == "weight"
        if kind in _READERS and is_matrix:
            data = torch.from_numpy(tensor.data.copy())
            # a tied head has no tensor in the file
            is_head = is_tied and known.get_name(module) == "token_embd"
            owner = "lm_head" if is_head else module
            tensors[f"{owner}.{_PREFIX}{kind}"] = data if order is None else data[order]
            continue
        is_linear = is_matrix and type(matrices[module]) is nn.Linear
        if is_linear and kind not in ("F32", "F16", "BF16"):
            raise UnsupportedModelError(
                f"{path}: {key} is {kind}, expected {', '.join(_READERS)}: quantise the model "
                "again with llama-quantize MODEL-F16.gguf MODEL-Q4_K_M.gguf Q4_K_M"
            )
        numbers = torch.from_numpy(_numbers(tensor))
        if architecture in _NORMS_PLUS_ONE and "norm" in module.rpartition(".")[2]:
            numbers = numbers - 1
        tensors[name] = numbers if order is None else numbers[order]
    return tensors


def read_header(path: Path) -> Header:
    """
    Raises:
        ConfigError: If the package ``gguf`` is not installed.
        StorageError: If the file cannot be read.
        FormatError: If it is damaged.
    """
    try:
        return Header.read(path)
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf: pip install gguf") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error})") from error
    except (ValueError, *DAMAGED) as error:
        raise FormatError(f"{path}: not a whole GGUF file ({error})") from error


def _numbers(tensor: StoredTensor) -> Any:
    """A copy in float32, by the package ``gguf``."""
    import gguf

    return gguf.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.kind]).copy()


def rows_in_order(rows: int, heads: int) -> Tensor:
    """For each row of q or k, its row in the file, where the halves of a head are interleaved."""
    order = torch.arange(rows).reshape(heads, rows // heads // 2, 2)
    return order.transpose(1, 2).reshape(rows)


def _q8_0(blocks: Tensor) -> dict[str, Any]:
    codes = blocks[..., 2:] ^ 0x80
    return _fields(codes, _halves(blocks[..., :2]), zero=128)


def _q4_0(blocks: Tensor) -> dict[str, Any]:
    return _fields(_nibbles(blocks[..., 2:], 16), _halves(blocks[..., :2]), bits=4, zero=8)


def _q4_1(blocks: Tensor) -> dict[str, Any]:
    scales, shifts = _halves(blocks[..., :2]), _halves(blocks[..., 2:4])
    return _fields(_nibbles(blocks[..., 4:], 16), scales, bits=4, shifts=shifts)


def _q5_0(blocks: Tensor) -> dict[str, Any]:
    codes = _nibbles(blocks[..., 6:], 16) | _fifth_bits(blocks[..., 2:6])
    return _fields(codes, _halves(blocks[..., :2]), zero=16)


def _q5_1(blocks: Tensor) -> dict[str, Any]:
    codes = _nibbles(blocks[..., 8:], 16) | _fifth_bits(blocks[..., 4:8])
    return _fields(codes, _halves(blocks[..., :2]), shifts=_halves(blocks[..., 2:4]))


def _q4_k(blocks: Tensor) -> dict[str, Any]:
    scales, shifts = _scales_of_k(blocks)
    return _fields(_nibbles(blocks[..., 16:], 32), scales, bits=4, shifts=shifts)


def _q5_k(blocks: Tensor) -> dict[str, Any]:
    scales, shifts = _scales_of_k(blocks)
    # bit g of byte c is that of column c of the group g
    groups = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[..., None, 16:48] >> groups & 1) << 4
    return _fields(_nibbles(blocks[..., 48:], 32) | high.flatten(-2), scales, shifts=shifts)


def _scales_of_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and shifts of the eight groups of a block of Q4_K or Q5_K, float32."""
    # products of a 16-bit and a 6-bit number: float32 holds them exactly, 16 bits do not
    scale, minimum = _halves(blocks[..., :2]).float(), _halves(blocks[..., 2:4]).float()
    low, middle, high = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)), -1)
    minima = torch.cat((middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)), -1)
    return scale * scales, -(minimum * minima)


def _q6_k(blocks: Tensor) -> dict[str, Any]:
    # 32 columns at a time: their low four bits are in one of two runs of 64 bytes, their high two
    # bits in one of two runs of 32 bytes
    low = _nibbles(blocks[..., :128], 64).unflatten(-1, (8, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)
    high = (blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts[:, None] & 3).flatten(-3, -2)
    codes = (low | high << 4).flatten(-2)
    scale = _halves(blocks[..., 208:210]).float()
    scales = scale * blocks[..., 192:208].contiguous().view(torch.int8)
    # codes of six bits take a byte each
    return _fields(codes, scales, zero=32)


def _fields(
    codes: Tensor, scales: Tensor, *, bits: int = 8, zero: int = 0, shifts: Tensor | None = None
) -> dict[str, Any]:
    codes = codes.flatten(1)
    scales = scales.flatten(1).contiguous()
    return {
        "codes": packed(codes) if bits == 4 else codes.contiguous(),
        "scales": scales,
        "bits": bits,
        "group_size": codes.shape[1] // scales.shape[1],
        "zero": zero,
        "shifts": None if shifts is None else shifts.flatten(1).contiguous(),
    }


def _halves(data: Tensor) -> Tensor:
    """float16 numbers of two bytes each."""
    return data.contiguous().view(torch.float16)


def _nibbles(data: Tensor, run: int) -> Tensor:
    """The low four bits of each run of bytes, then the high ones."""
    data = data.unflatten(-1, (-1, run))
    return torch.stack((data & 15, data >> 4), -2).flatten(-3)


def _fifth_bits(data: Tensor) -> Tensor:
    """Bit ``c`` of four bytes as the fifth bit of the code of column ``c``."""
    bits = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[..., None] >> bits & 1) << 4).flatten(-2)


# Columns and bytes of a block, and its reader.
_READERS: dict[str, tuple[int, int, Callable[[Tensor], dict[str, Any]]]] = {
    "Q8_0": (32, 34, _q8_0),
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}
