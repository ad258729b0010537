import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GgufConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

import cats
from cats import checkpoint, fingerprint
from cats.errors import (
    ConfigError,
    FormatError,
    ModelMismatchError,
    StorageError,
    UnsupportedModelError,
)
from cats.finetuning.adapters import add_adapters, load_adapter, merge, save_adapter
from cats.finetuning.options import FinetuneOptions
from cats.weights import Quantised, QuantisedLinear, weight_of
from tests import models
from tests.formats import checkpoints


def needs(kind):
    library = {"compressed-tensors": "compressed_tensors", "float8": "compressed_tensors"}
    pytest.importorskip(library.get(kind, "torchao" if kind == "torchao" else "torch"))


@pytest.fixture(params=checkpoints.KINDS)
def kind(request):
    needs(request.param)
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    checkpoints.write(kind, tmp_path / "model")
    return tmp_path / "model"


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_codes_stay_and_the_head_is_as_stored(kind, folder):
    model = checkpoint.load_dense(folder)
    quantised = {n for n, m in model.named_modules() if type(m) is QuantisedLinear}
    assert quantised == checkpoints.layers(models.make_model()).keys()
    assert type(model.lm_head) is nn.Linear
    assert {p.ndim for p in model.parameters()} <= {1, 2}
    # no dequantised copy: what is left of matrices are the embedding and the head
    assert sum(p.numel() for p in model.parameters() if p.ndim == 2) == 2 * 257 * 16
    assert not model.training
    ids = models.make_ids()
    twin = checkpoints.dense_twin(model)
    torch.testing.assert_close(models.logits(model, ids), models.logits(twin, ids))


def test_saved_again_it_is_the_same_checkpoint(kind, folder, tmp_path):
    model = checkpoint.load_dense(folder)
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert tensor.dtype == again[name].dtype
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)), name
    stored = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again")]
    assert stored[0]["quantization_config"] == stored[1]["quantization_config"]
    entries = [metadata(f / "model.safetensors") for f in (folder, tmp_path / "again")]
    assert {k: v for k, v in entries[0].items() if k != "tensor_names"} == {
        k: v for k, v in entries[1].items() if k != "tensor_names"
    }
    loaded = checkpoint.load_dense(tmp_path / "again")
    assert fingerprint.of_model(loaded) == fingerprint.of_model(model)


@pytest.mark.parametrize("kind", ["compressed-tensors", "awq", "gptq", "torchao"])
def test_packed_for_kernels_it_is_saved_as_read_and_takes_adapters(kind, tmp_path, monkeypatch):
    needs(kind)
    monkeypatch.setattr(checkpoints, "GROUP", 32)
    checkpoints.write(kind, tmp_path / "model", hidden_size=64, intermediate_size=96, head_dim=32)
    model = checkpoint.load_dense(tmp_path / "model")
    layers = [m for m in model.modules() if type(m) is QuantisedLinear]
    hashed, ids = fingerprint.of_model(model), models.make_ids()
    for layer in layers:
        layer.pack_columns_() if layer.in_features == 96 else layer.pack_rows_()
    assert fingerprint.of_model(model) == hashed
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / f / "model.safetensors") for f in ("model", "again"))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)), name
    packed = [b.clone() for layer in layers for b in layer.buffers()]
    adapted = add_adapters(model, FinetuneOptions(rank=2))
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert any(p.grad.any() for p in trained)
    after = [b for layer in layers for b in layer.buffers()]
    assert all(torch.equal(old, new) for old, new in zip(packed, after, strict=True))


@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_sparse_and_quantised_checkpoints_load_save_and_load(kind, folder, tmp_path, shard):
    model = checkpoint.load_dense(folder)
    batches = [models.make_ids()]
    config = cats.calibrate(model, batches, target_sparsity=0.5)
    cats.sparsify_(model, config)
    model.save_pretrained(tmp_path / "sparse", max_shard_size=shard)
    assert checkpoint.is_sparse_checkpoint(tmp_path / "sparse")
    loaded = cats.from_pretrained(tmp_path / "sparse")
    ids = models.make_ids(seed=3)
    assert torch.equal(models.logits(loaded, ids), models.logits(model, ids))
    assert fingerprint.of_model(loaded) == fingerprint.of_model(checkpoint.load_dense(folder))
    from_file = cats.from_pretrained(folder, thresholds=config)
    assert torch.equal(models.logits(from_file, ids), models.logits(model, ids))
    checkpoints.write(kind, tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(ModelMismatchError):
        cats.from_pretrained(tmp_path / "other", thresholds=config)


def test_another_dtype_leaves_scales_alone(kind, folder):
    model = checkpoint.load_dense(folder, dtype=torch.bfloat16)
    plain = checkpoint.load_dense(folder)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            twin = plain.get_submodule(name)
            assert torch.equal(module.scales, twin.scales)
            numbers = twin.matrix.dequantised().bfloat16()
            assert torch.equal(module.matrix.dequantised(), numbers)
    assert models.logits(model, models.make_ids()).dtype == torch.bfloat16
    assert model.to(torch.float32).dtype == torch.float32
    assert torch.isfinite(models.logits(model, models.make_ids())).all()


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"], indirect=True)
def test_biases_are_read(kind, tmp_path):
    checkpoints.write(kind, tmp_path, config=Qwen2Config)
    model = checkpoint.load_dense(tmp_path)
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    twin = checkpoints.dense_twin(model)
    ids = models.make_ids()
    torch.testing.assert_close(models.logits(model, ids), models.logits(twin, ids))


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors, entries = load_file(path), metadata(path)
    change(tensors)
    save_file(tensors, path, entries)


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("kind", ["gptq"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.scales"), "up_proj has no scales"),
        (lambda t: t.pop(f"{LAYER}.qweight"), "stored without its qweight"),
        (lambda t: t.update({f"{LAYER}.qzeros": torch.zeros(1, 5).int()}), r"qzeros int32 \[1, 5"),
        (lambda t: t[f"{LAYER}.g_idx"].fill_(7), "groups 7 to 7, expected 0 to 1"),
        (lambda t: t.pop("model.norm.weight"), r"missing.*model\.norm"),
        (
            lambda t: t.update({"model.embed_tokens.qweight": torch.zeros(2, 8).int()}),
            "a Embedding, not an nn.Linear",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises((FormatError, UnsupportedModelError), match=message):
        checkpoint.load_dense(folder)


@pytest.mark.parametrize("kind", ["awq"], indirect=True)
def test_truncated_files_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((FormatError, StorageError)):
        checkpoint.load_dense(folder)


@pytest.mark.parametrize("kind", ["awq"], indirect=True)
def test_a_layer_that_is_no_longer_quantised_is_not_saved(folder, tmp_path):
    model = checkpoint.load_dense(folder)
    model.set_submodule(LAYER, nn.Linear(16, models.F, bias=False))
    with pytest.raises(UnsupportedModelError, match="up_proj was quantised and is a Linear"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["awq"], indirect=True)
def test_offloading_is_refused(folder):
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(UnsupportedModelError, match="not offloaded"):
        checkpoint.load_dense(folder, device_map=places)


@pytest.mark.parametrize("kind", ["gptq"], indirect=True)
def test_settings_of_the_model_are_passed_on(folder):
    model = checkpoint.load_dense(folder, use_cache=False, attn_implementation="eager")
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "eager"


def test_adapters_are_trained_on_frozen_codes(kind, folder):
    model = cats.from_pretrained(
        folder,
        thresholds=cats.calibrate(
            checkpoint.load_dense(folder), [models.make_ids()], target_sparsity=0.5
        ),
    )
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith(".codes")}
    ids = models.make_ids()
    logits = models.logits(model, ids)
    adapted = add_adapters(model, FinetuneOptions(rank=2))
    assert torch.equal(models.logits(adapted, ids), logits)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, lr=1.0).step()
    assert not torch.equal(models.logits(adapted, ids), logits)
    after = {
        name.replace("base_layer.", "").removeprefix("base_model.model."): buffer
        for name, buffer in adapted.named_buffers()
    }
    for name, codes in before.items():
        assert torch.equal(after[name].view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("kind", ["gptq", "float8"], indirect=True)
def test_adapters_are_saved_and_loaded_but_not_merged(kind, folder, tmp_path):
    adapted = add_adapters(checkpoint.load_dense(folder), FinetuneOptions(rank=2)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(adapted, None, tmp_path / "adapter")
    loaded = load_adapter(folder, tmp_path / "adapter")
    ids = models.make_ids()
    assert torch.equal(models.logits(loaded, ids), models.logits(adapted, ids))
    with pytest.raises(UnsupportedModelError, match="not merged into quantised"):
        merge(loaded)
    assert torch.equal(models.logits(loaded, ids), models.logits(adapted, ids))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "stored as bitsandbytes"),
        ({"quant_method": "hqq"}, "stored as hqq"),
        ({"quant_method": "gptq", "bits": 3}, "stored as gptq with 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq with the layout gemv"),
    ],
)
def test_what_nobody_here_reads_is_refused_with_the_reason(settings, message, tmp_path):
    models.make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=f"{message}.*llm-compressor"):
        checkpoint.load_dense(tmp_path)


# GGUF


@pytest.mark.parametrize("kind", checkpoints.SIZES)
def test_gguf_files_are_read_as_transformers_reads_them(kind, tmp_path):
    path = checkpoints.write_gguf(kind, tmp_path / "model.gguf")
    model = checkpoint.load_dense(path)
    assert type(model.lm_head) is QuantisedLinear
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    for name, weight in dense.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        found = weight_of(module)
        mine = found.dequantised() if isinstance(found, Quantised) else module.weight
        assert torch.equal(mine, weight), name
    ids = models.make_ids()
    torch.testing.assert_close(models.logits(model, ids), models.logits(dense, ids))
    named = checkpoint.load_dense(tmp_path, gguf_file=path.name)
    assert fingerprint.of_model(named) == fingerprint.of_model(model)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", LlamaConfig),
        ("qwen2", Qwen2Config),
        ("qwen3", Qwen3Config),
        ("gemma2", Gemma2Config),
        ("gemma3", Gemma3TextConfig),
    ],
)
def test_gguf_files_of_other_models(architecture, config, tmp_path):
    path = tmp_path / "model.gguf"
    # transformers does not read the size of a head of Qwen 3: it is the one of the real models
    changes = {"head_dim": 128} if config is Qwen3Config else {}
    checkpoints.write_gguf(
        "Q8_0", path, architecture=architecture, config=config, tied=True, **changes
    )
    model = checkpoint.load_dense(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    ids = models.make_ids()
    torch.testing.assert_close(models.logits(model, ids), models.logits(dense, ids))


def test_thresholds_lie_beside_a_gguf_file(tmp_path):
    path = checkpoints.write_gguf("Q4_1", tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="dense checkpoint"):
        cats.from_pretrained(path)
    model = checkpoint.load_dense(path)
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    sparse = cats.from_pretrained(path, thresholds=config)
    ids = models.make_ids(seed=1)
    expected = models.logits(cats.sparsify_(model, config), ids)
    assert torch.equal(models.logits(sparse, ids), expected)
    with pytest.raises(UnsupportedModelError, match="GGUF file is not saved again"):
        sparse.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("keep", [100, 4000, -200])
def test_truncated_gguf_files_are_refused(keep, tmp_path):
    path = checkpoints.write_gguf("Q4_1", tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises((FormatError, StorageError)):
        checkpoint.load_dense(path)
