import json

import pytest
import torch

import cats
from cats import smollm2
from cats.errors import ConfigError, ModelMismatchError, StorageError, UnsupportedModelError
from cats.finetuning import FinetuneOptions, load_adapter
from cats.finetuning.adapters import (
    add_adapters,
    check_targets,
    dense_teacher,
    merge,
    put_adapter,
    remove_adapters_,
    save_adapter,
)
from tests import models

OPTIONS = FinetuneOptions(rank=4, dropout=0.0)


@pytest.fixture
def adapted(make):
    """A sparse model whose adapters change its output."""
    model = add_adapters(make(), OPTIONS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


def test_teacher_is_the_dense_model_and_the_student_comes_back(adapted, make, ids):
    before = models.logits(adapted, ids)
    with dense_teacher(adapted):
        teacher = models.logits(adapted, ids)
    assert torch.equal(teacher, models.logits(make("dense"), ids))
    assert torch.equal(models.logits(adapted, ids), before)
    assert not torch.allclose(before, teacher, atol=0.1)
    assert all(p.requires_grad == ("lora" in n) for n, p in adapted.named_parameters())


def test_teacher_of_relu_has_the_dense_activation(make, ids):
    with dense_teacher(add_adapters(make("relu"), OPTIONS).eval()) as _:
        pass
    model = add_adapters(make("relu"), OPTIONS).eval()
    with dense_teacher(model):
        assert torch.equal(models.logits(model, ids), models.logits(make("dense"), ids))


def test_removed_adapters_leave_the_model_as_it_was(adapted, make, ids):
    base = remove_adapters_(adapted.get_base_model())
    assert torch.equal(models.logits(base, ids), models.logits(make(), ids))
    assert [n for n, _ in base.named_parameters()] == [n for n, _ in make().named_parameters()]
    add_adapters(base, OPTIONS)


def test_stacked_layers_get_adapters():
    from transformers import Phi3Config

    model = models.make_model(Phi3Config)
    names = cats.finetuning.adapters.target_layers(model)
    assert names == ["down_proj", "gate_up_proj", "qkv_proj"]


def test_model_without_known_attention_needs_targets():
    with pytest.raises(ConfigError, match="name the layers"):
        cats.finetuning.adapters.target_layers(models.Body(models.MLP()))


def test_adapter_of_another_model_is_refused(tune, tmp_path):
    tune(options={"steps": 2})
    torch.manual_seed(5)
    models.make_model().save_pretrained(tmp_path / "other")
    with pytest.raises(ModelMismatchError):
        load_adapter(tmp_path / "other", tmp_path / "run" / "adapter")


def test_adapter_on_the_built_in_model_loads_by_its_name(tune, base, ids, tmp_path, monkeypatch):
    tune(options={"steps": 2})
    monkeypatch.setattr(smollm2, "checkpoint", lambda: base)
    adapter = tmp_path / "run" / "adapter"
    named, expected = load_adapter("smollm2", adapter), load_adapter(base, adapter)
    assert torch.equal(models.logits(named, ids), models.logits(expected, ids))


def test_folder_without_adapter_is_an_error(base, tmp_path):
    with pytest.raises(StorageError, match="holds no adapter"):
        load_adapter(base, tmp_path)


def _unreadable(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    return StorageError


def _of_another_rank(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    return ModelMismatchError


def _of_other_layers(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["x"]}))
    return ModelMismatchError


@pytest.mark.parametrize("damage", [_unreadable, _of_another_rank, _of_other_layers])
def test_adapter_that_does_not_fit_leaves_the_model_as_it_was(damage, adapted, make, ids, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    error = damage(tmp_path / "adapter")
    model = make()
    before, modules = models.logits(model, ids), [*model.modules()]
    attributes, flags = set(vars(model)), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error):
        put_adapter(model, tmp_path / "adapter")
    assert [*model.modules()] == modules
    assert set(vars(model)) == attributes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(models.logits(model, ids), before)


def test_adapter_on_a_fused_model_is_refused(adapted, make, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UnsupportedModelError, match="unfuse_"):
        put_adapter(cats.fuse_(make()), tmp_path / "adapter")


def test_merge_that_fails_leaves_the_model_as_it_was(adapted, ids, monkeypatch):
    before, modules = models.logits(adapted, ids), [*adapted.modules()]
    weights = {name: p.clone() for name, p in adapted.named_parameters()}
    layer = adapted.get_submodule("base_model.model.model.layers.1.mlp.down_proj")

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(layer, "merge", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        merge(adapted)
    assert [*adapted.modules()] == modules
    assert all(torch.equal(p, weights[name]) for name, p in adapted.named_parameters())
    assert torch.equal(models.logits(adapted, ids), before)
    monkeypatch.undo()
    torch.testing.assert_close(models.logits(merge(adapted), ids), before, rtol=1e-3, atol=1e-3)


def test_adapter_is_put_on_the_base_of_a_revision(tmp_path):
    model = models.fill_hub_cache(tmp_path, revision="v2", subfolder="sub")
    tuned = add_adapters(model, OPTIONS)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(tuned, None, tmp_path / "adapter")
    loaded = load_adapter(
        "org/model", tmp_path / "adapter", revision="v2", subfolder="sub", cache_dir=tmp_path
    )
    ids = models.make_ids(seed=1)
    assert models.logits(loaded, ids).equal(models.logits(tuned.eval(), ids))


def test_message_names_layers_of_other_libraries_too():
    class Quantised(torch.nn.Linear):
        pass

    model = models.make_model()
    for layer in model.model.layers:
        layer.mlp.up_proj = Quantised(16, models.F)
    with pytest.raises(ConfigError, match=r"layers are named .*q_proj, up_proj"):
        check_targets(model, ["w1"])
