"""Tiny quantised checkpoints of every format, each with the dense model of the same numbers."""

import json

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from cats.weights import QuantisedLinear
from tests import models
from tests.formats import test_awq, test_compressed_tensors, test_gguf, test_gptq

GROUP = 8
KINDS = ["compressed-tensors", "float8", "awq", "gptq", "gptq ordered", "torchao"]


def layers(model):
    """The linear layers that are quantised: all but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name != "lm_head"
    }


def write(kind, folder, *, config=LlamaConfig, **changes):
    """A checkpoint in a folder, and the dense model; the head is stored in ordinary numbers."""
    model = models.make_model(config, **changes)
    names = layers(model)
    tensors = {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in names or name.endswith(".bias")
    }
    made, settings, metadata = _MAKERS[kind](model, names)
    model.save_pretrained(folder)
    save_file(tensors | made, folder / "model.safetensors", {"format": "pt", **metadata})
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(stored))
    return model


def dense_twin(quantised, **changes):
    """A dense model with the numbers of a quantised one."""
    dense = models.make_model(type(quantised.config), **changes)
    state = {k: v for k, v in quantised.state_dict().items() if k in dense.state_dict()}
    dense.load_state_dict(state, strict=False)
    for name, module in quantised.named_modules():
        if isinstance(module, QuantisedLinear):
            with torch.no_grad():
                dense.get_submodule(name).weight.copy_(module.matrix.dequantised())
    return dense


def _compressed(model, names, format_, **weights):
    how = test_compressed_tensors.scheme(format_, **weights)
    made = {}
    for seed, (name, linear) in enumerate(names.items()):
        rows, columns = linear.weight.shape
        parts = test_compressed_tensors.compress(how, rows, columns, seed=seed)
        parts["weight_scale"] = parts["weight_scale"] * columns**-0.5
        made |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return made, test_compressed_tensors.config(how), {}


def _pack_quantized(model, names):
    return _compressed(
        model, names, "pack-quantized", strategy="group", group_size=GROUP, symmetric=False
    )


def _float8(model, names):
    return _compressed(model, names, "float-quantized", num_bits=8, type="float")


def _awq(model, names):
    made = {}
    for seed, (name, linear) in enumerate(names.items()):
        rows, columns = linear.weight.shape
        parts = test_awq.draw(GROUP, seed, rows=rows, columns=columns)
        parts["scales"] *= columns**-0.5
        made |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return made, test_awq.CONFIG | {"group_size": GROUP}, {}


def _gptq(model, names, *, ordered=False):
    made = {}
    for seed, (name, linear) in enumerate(names.items()):
        rows, columns = linear.weight.shape
        groups = torch.arange(columns) // GROUP
        generator = torch.Generator().manual_seed(seed)
        g_idx = groups[torch.randperm(columns, generator=generator)] if ordered else groups
        parts, _ = test_gptq.draw(
            4, group_size=GROUP, g_idx=g_idx, rows=rows, columns=columns, seed=seed
        )
        parts["scales"] *= columns**-0.5
        made |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return made, test_gptq.config(group_size=GROUP, desc_act=ordered), {}


def _gptq_ordered(model, names):
    return _gptq(model, names, ordered=True)


def _torchao(model, names):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    how = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    quantize_(model, how, lambda _, name: name in names)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors, metadata = flatten_tensor_state_dict(state)
    made = {n: t for n, t in tensors.items() if n.rpartition(".")[2].startswith("_weight_")}
    for name, linear in names.items():
        linear.weight = nn.Parameter(linear.weight.dequantize())
        assert type(model.get_submodule(name).weight.data) is torch.Tensor
    settings = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {}}},
    }
    return made, settings, metadata


_MAKERS = {
    "compressed-tensors": _pack_quantized,
    "float8": _float8,
    "awq": _awq,
    "gptq": _gptq,
    "gptq ordered": _gptq_ordered,
    "torchao": _torchao,
}

# Rows of whole blocks.
SIZES = {
    kind: dict(hidden_size=size, intermediate_size=max(64, size), head_dim=size // 2)
    for kind, (size, _, _) in test_gguf.BLOCKS.items()
}


def write_gguf(kind, path, *, architecture="llama", tied=False, config=LlamaConfig, **changes):
    """A GGUF file of a model with random blocks."""
    sizes = SIZES[kind] | changes
    model = models.make_model(config, **sizes, tie_word_embeddings=tied)
    settings = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_vocab_size(settings.vocab_size)
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    known = gguf.get_tensor_name_map(arch, settings.num_hidden_layers)
    generator = np.random.default_rng(0)
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        module, _, part = name.rpartition(".")
        key = f"{known.get_name(module)}.{part}"
        if tied and module == "lm_head":
            continue
        numbers = tensor.numpy() + generator.normal(size=tensor.shape).astype(np.float32) / 100
        if part != "weight" or "norm" in module or "embed" in module:
            writer.add_tensor(key, numbers)
            continue
        rows, columns = tensor.shape
        data = test_gguf.draw(kind, rows, columns // test_gguf.BLOCKS[kind][0], seed)
        for at in test_gguf.BLOCKS[kind][2]:
            size = test_gguf.BLOCKS[kind][1]
            halves = data.reshape(rows, -1, size)[..., at : at + 2].copy().view(np.float16)
            scale = {"Q4_K": 1e-3, "Q5_K": 1e-3, "Q6_K": 1e-4}.get(kind, 1e-2)
            blocks = data.reshape(rows, -1, size)
            blocks[..., at : at + 2] = (halves * np.float16(scale)).view(np.uint8)
        writer.add_tensor(key, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
